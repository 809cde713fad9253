"""The stage `generate`: every kind of problems with every kind of teacher, and what the manifest says of it."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import (
    BaseConfig,
    FileProblems,
    GenerateConfig,
    RecordProblems,
    SyntheticProblems,
    load_config,
)
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.errors import UserError
from phimr_nemo.generate.stage import read_configured_problems, run_generate
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.shards import finish, read_manifest, read_table, write_shard

# Two questions answered by two models each, in the layout of OpenAI's recorded GSM8K solutions.
RECORDED: list[dict[str, Any]] = [
    {
        "question": "Tom has 3 apples and buys 4. How many has he?",
        "ground_truth": "He has 3 + 4 = <<3+4=7>>7.\nA: 7",
        "6b": {"is_correct": True, "solution": "3 + 4 = <<3+4=7>>7\nA: 7"},
        "175b": {"is_correct": False, "solution": "3 * 4 = <<3*4=12>>12\nA: 12"},
    },
    {
        "question": "A box holds 1,000 pens. How many do 2 boxes hold?",
        "ground_truth": "2 * 1000 = <<2*1000=2000>>2,000\nA: 2,000",
        "6b": {"is_correct": False, "solution": "1000 / 2 = <<1000/2=500>>500\nA: 500"},
        "175b": {"is_correct": True, "solution": "2 * 1000 = <<2*1000=2000>>2000\nA: 2,000"},
    },
]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(output: Path, *overrides: str) -> GenerateConfig:
    return load_config(GenerateConfig, Path("conf/generate/tiny.yaml"), [f"run.output={output}", *overrides])


def recorded_config(output: Path, path: Path, *overrides: str) -> GenerateConfig:
    return config(output, "problems=null", "teacher.kind=recorded", f"teacher.path={path}", *overrides)


def test_programmatic_teacher_answers_every_problem(tmp_path: Path) -> None:
    count, samples, seed = 11, 3, 5
    facts = run_generate(
        config(
            tmp_path / "out",
            *(f"problems.count={count}", f"rollouts_per_problem={samples}", "shard_size=4", f"run.seed={seed}"),
        )
    )
    problems = generate_problems(seed, count, "train")
    rollouts = read_table(tmp_path / "out", "rollouts")
    assert facts is not None
    assert facts["rows"] == count * samples
    expected = [name for name in problems.column("id").to_pylist() for _ in range(samples)]
    assert rollouts.column("problem_id").to_pylist() == expected
    assert rollouts.column("sample_index").to_pylist() == list(range(samples)) * count
    assert len(set(rollouts.column("id").to_pylist())) == count * samples
    answers = dict(zip(problems.column("id").to_pylist(), problems.column("answer").to_pylist(), strict=True))
    assert rollouts.column("answer").to_pylist() == [answers[name] for name in expected]


def test_the_mistake_rate_is_the_share_of_wrong_rollouts(tmp_path: Path) -> None:
    from phimr_nemo.verify import grade

    for rate, right in ((0.0, 40), (1.0, 0)):
        output = tmp_path / str(rate)
        run_generate(config(output, "problems.count=40", "rollouts_per_problem=1", f"teacher.mistake_rate={rate}"))
        rows = read_table(output, "rollouts").to_pylist()
        assert sum(grade(row["response"], row["answer"]).verdict == "correct" for row in rows) == right


def test_recorded_solutions_of_several_models_become_rollouts(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "recorded.jsonl", RECORDED)
    facts = run_generate(recorded_config(tmp_path / "out", source, "shard_size=3"))
    rows = read_table(tmp_path / "out", "rollouts").to_pylist()
    assert facts == {"rows": 4, "read": 2, "incomplete": 0}
    assert [(row["answer"], row["teacher"]) for row in rows] == [
        *(("7", "6b"), ("7", "175b")),
        *(("2000", "6b"), ("2000", "175b")),
    ]
    solutions = [row[name]["solution"] for row in RECORDED for name in ("6b", "175b")]
    assert [row["response"] for row in rows] == solutions
    labels = [row[name]["is_correct"] for row in RECORDED for name in ("6b", "175b")]
    assert [json.loads(row["metadata"])["is_correct"] for row in rows] == labels
    manifest = read_manifest(tmp_path / "out", "rollouts")
    assert manifest.inputs == {"teacher.path": sha256(source)}
    assert len(manifest.shards) == 2  # 4 rollouts, 3 a shard


def test_recorded_solutions_of_chosen_problems_only(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "recorded.jsonl", RECORDED)
    # The same question as GSM8K itself writes it.
    wanted = write_lines(
        tmp_path / "problems.jsonl",
        [{"question": RECORDED[1]["question"], "answer": "2 * 1000 = <<2*1000=2000>>2,000\n#### 2,000"}],
    )
    chosen = ("teacher.kind=recorded", f"teacher.path={source}", "problems.kind=file", f"problems.path={wanted}")
    facts = run_generate(config(tmp_path / "out", *chosen))
    rows = read_table(tmp_path / "out", "rollouts").to_pylist()
    assert {row["question"] for row in rows} == {RECORDED[1]["question"]}
    assert facts == {"rows": 2, "read": 2, "incomplete": 0, "of other problems": 2}
    inputs = read_manifest(tmp_path / "out", "rollouts").inputs
    assert inputs == {"teacher.path": sha256(source), "problems.path": sha256(wanted)}


def test_recorded_solutions_of_other_problems_are_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "recorded.jsonl", RECORDED)
    with pytest.raises(UserError, match="holds no response to the given problems"):
        run_generate(config(tmp_path / "out", "teacher.kind=recorded", f"teacher.path={source}"))
    assert not (tmp_path / "out").exists()


def test_a_limit_reads_the_first_rows(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "recorded.jsonl", RECORDED)
    run_generate(recorded_config(tmp_path / "out", source, "teacher.limit=1"))
    assert set(read_table(tmp_path / "out", "rollouts").column("answer").to_pylist()) == {"7"}


def test_a_model_as_teacher(tmp_path: Path) -> None:
    from phimr_nemo.model.base import run_base
    from phimr_nemo.model.files.hf import HFDirectory

    for seed in (0, 1):
        shape = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4")
        fixed = (f"run.output={tmp_path}/base-{seed}", f"run.seed={seed}")
        run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [*fixed, *shape]))
    teacher = tmp_path / "base-0" / "hf"
    new_tokens, count, samples = 6, 5, 2
    problems = write_lines(
        tmp_path / "problems.jsonl", [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(count)]
    )
    overrides = (
        *(
            "problems.kind=file",
            f"problems.path={problems}",
            "teacher.kind=model",
            "teacher.engine.kind=local",
            "teacher.temperature=1",
        ),
        *(
            "teacher.top_p=1",
            f"teacher.max_new_tokens={new_tokens}",
            f"rollouts_per_problem={samples}",
            "shard_size=2",
        ),
    )
    facts = run_generate(config(tmp_path / "out", f"teacher.path={teacher}", *overrides))
    assert facts is not None
    rows = read_table(tmp_path / "out", "rollouts").to_pylist()
    assert facts["rows"] == len(rows) == count * samples
    assert {row["teacher"] for row in rows} == {HFDirectory(teacher).weights_hash()}
    assert facts["tokens"] == sum(row["tokens"] for row in rows)
    for row in rows:
        assert row["tokens"] == new_tokens or (row["tokens"] < new_tokens and row["finish_reason"] == "stop")
    inputs = read_manifest(tmp_path / "out", "rollouts").inputs
    assert inputs["problems.path"] == sha256(problems)
    assert inputs["teacher.path"] == content_of(teacher)
    assert inputs["teacher"] == HFDirectory(teacher).weights_hash()
    # Seeds come from content: processes that share the work make the same rows.
    for index in (1, 0):
        run_generate(
            config(
                tmp_path / "shared",
                *(f"teacher.path={teacher}", *overrides, f"shard.index={index}", "shard.count=2"),
            )
        )
    assert read_table(tmp_path / "shared", "rollouts").to_pylist() == rows
    # Another model's rollouts do not mix with these.
    with pytest.raises(UserError, match="teacher"):
        run_generate(config(tmp_path / "out", f"teacher.path={tmp_path}/base-1/hf", *overrides))


def test_problems_of_the_project_and_of_a_file(tmp_path: Path) -> None:
    synthetic = SyntheticProblems(kind="synthetic", count=9, split="heldout")
    table, counts = read_configured_problems(synthetic, 3)
    assert table == generate_problems(3, 9, "heldout")
    assert counts == {"read": 9}
    rows = [{"q": f"{i}?", "a": str(i)} for i in range(4)]
    with gzip.open(tmp_path / "mine.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    mine = FileProblems(kind="file", path=tmp_path / "mine.jsonl.gz", question="q", answer="a", limit=3)
    table, _ = read_configured_problems(mine, 0)
    assert table.column("question").to_pylist() == ["0?", "1?", "2?"]


def gsm8k_answers(path: Path) -> list[str]:
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line)["answer"].rpartition("####")[2].strip().replace(",", "") for line in lines]


def math_answers(path: Path) -> list[str]:
    return [row["answer"].strip() for row in json.loads(path.read_text("utf-8")) if row["answer"] not in (None, "")]


def deepscaler_answers(path: Path) -> list[str]:
    text = gzip.decompress(path.read_bytes()).decode("utf-8").strip()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    # Escaped once more than JSON asks for: two backslashes before letters, where a line break would have a space.
    return [re.sub(r"\\\\(?=[a-z])", r"\\", row["answer"].strip()) for row in rows]


@pytest.mark.parametrize(
    ("name", "read_answers"),
    [
        ("gsm8k_train.jsonl", gsm8k_answers),
        ("gsm8k_test.jsonl", gsm8k_answers),
        ("math_train.json", math_answers),
        ("deepscaler_level_1.json.gz", deepscaler_answers),
    ],
)
def test_published_files_load_as_they_are(name: str, read_answers: Any, shared_data: Path) -> None:
    path = shared_data / "problems" / name
    table, counts = read_configured_problems(FileProblems(kind="file", path=path), 0)
    dropped = sum(value for key, value in counts.items() if key != "read" and not key.startswith("repaired"))
    assert counts["read"] == table.num_rows + dropped
    expected = read_answers(path)
    found = table.column("answer").to_pylist()
    # Repeated questions are dropped, so the loaded answers are a subsequence that lacks little.
    rest = iter(expected)
    assert all(answer in rest for answer in found)
    assert len(found) > 0.95 * len(expected)
    assert all(table.column("question").to_pylist())


def test_only_problems_without_a_response_are_asked(tmp_path: Path) -> None:
    problems = generate_problems(3, 9, "train")
    write_shard(tmp_path / "problems", 0, problems, kind="problems")
    finish(tmp_path / "problems", kind="problems", config={})
    for name, part in (("one", problems.slice(2, 3)), ("other", problems.slice(7, 1))):
        write_shard(tmp_path / name, 0, teacher_rollouts(part, 2, 0, 0.0), kind="rollouts")
        finish(tmp_path / name, kind="rollouts", config={})
    answered = RecordProblems(
        kind="records", path=tmp_path / "problems", answered=(tmp_path / "one", tmp_path / "other"), limit=4
    )
    left, counts = read_configured_problems(answered, 0)
    ids = problems.column("id").to_pylist()
    assert left.column("id").to_pylist() == [ids[place] for place in (0, 1, 5, 6)]
    assert counts == {"read": 4, "problems with a response": 4}
    # The planted fault: nothing is left out, and the first four are asked.
    everything, _ = read_configured_problems(dataclasses.replace(answered, answered=()), 0)
    assert everything.column("id").to_pylist() == ids[:4]
    write_shard(tmp_path / "all", 0, teacher_rollouts(problems, 1, 0, 0.0), kind="rollouts")
    finish(tmp_path / "all", kind="rollouts", config={})
    with pytest.raises(UserError, match="every problem"):
        read_configured_problems(dataclasses.replace(answered, answered=(tmp_path / "all",)), 0)
