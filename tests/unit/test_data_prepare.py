"""The stage prepare: every row is kept or listed with its reason, trajectories follow their problem, a kill costs
nothing, and generate reads what comes out."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import (
    AnnotationConfig,
    DecontaminationConfig,
    EvaluationSetConfig,
    NearDuplicatesConfig,
    PrepareConfig,
    RecordProblems,
    RunConfig,
    SourceConfig,
    load_config,
)
from phimr_nemo.data.prepare import stage as module
from phimr_nemo.data.sources.problems import load_problems
from phimr_nemo.errors import UserError
from phimr_nemo.generate.stage import read_configured_problems
from phimr_nemo.jobs.composed import run_prepare
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.store.check import check_directory, forget_damaged
from phimr_nemo.store.shards import read_manifest, read_table

TANK = "A farmer fills a tank with 30 litres of water and his boat carries 12 apples along the garden rope today."
EXAM = "A long evaluation question about 7 red and 9 blue balls in a box that must never be trained on by anyone."
GENERATIONS = ["<think>\nHm.\n</think>\n\\boxed{4}", "<think>\nNo.\n</think>\n\\boxed{5}"]


def openr1(problem: str, answer: str, generations: list[str]) -> dict[str, Any]:
    return {
        "problem": problem,
        "solution": f"So $\\boxed{{{answer}}}$.",
        "answer": answer,
        "problem_type": "Algebra",
        "source": "olympiads",
        "generations": generations,
        "correctness_math_verify": [True] * len(generations),
        "finish_reasons": ["stop", "length"][: len(generations)],
    }


def stratos(question: str, answer: str, thought: str) -> dict[str, Any]:
    response = (
        f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
        f"<|begin_of_solution|>\n\n\\boxed{{{answer}}}\n\n<|end_of_solution|>"
    )
    prompt = "Return your final response within \\boxed{}. "
    turns = [{"from": "user", "value": prompt + question}, {"from": "assistant", "value": response}]
    return {"system": "s", "conversations": turns}


SOURCES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "stratos": (
        "bespoke_stratos",
        [
            stratos("What is $2+2$?", "4", "Two and two."),
            stratos("Write a program.", "", "print"),
            stratos("Only here.", "1", "One."),
        ],
    ),
    "openr1": (
        "openr1_math",
        [
            openr1("What is  \\(2+2\\)", "4", GENERATIONS),
            openr1(EXAM.replace("7", "8"), "3", ["contaminated"]),
            openr1("Prove it.", "proof", ["p"]),
            openr1("Repeat?", "6", [GENERATIONS[0], GENERATIONS[0]]),
        ],
    ),
    "school": (
        "gsm8k",
        [
            {"question": TANK, "answer": "w\n#### 42"},
            {"question": TANK.replace("garden", "yard"), "answer": "w\n#### 42"},
            {"question": TANK.replace("30", "31"), "answer": "w\n#### 43"},
            {"question": "what is 2+2?", "answer": "w\n#### 5"},
            {"question": "", "answer": "#### 1"},
        ],
    ),
}


def configured(tmp_path: Path, **changes: Any) -> PrepareConfig:
    sources = []
    for name, (preset, rows) in SOURCES.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        sources.append(SourceConfig(name=name, path=str(path), preset=preset))  # type: ignore[arg-type]
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": EXAM}) + "\n", "utf-8")
    settings: dict[str, Any] = {
        "run": RunConfig(output=tmp_path / "out", seed=0),
        "sources": tuple(sources),
        "near_duplicates": NearDuplicatesConfig(threshold=0.7, permutations=250),
        "decontamination": DecontaminationConfig(
            sets=(EvaluationSetConfig(name="EXAM", path=tmp_path / "exam.jsonl"),), ngram=8, overlap=0.6
        ),
        "annotation": AnnotationConfig(),
        "shard_size": 2,
    }
    return PrepareConfig(**(settings | changes))


def outcome(output: Path) -> tuple[list[Any], list[Any], list[str], dict[str, int]]:
    return (
        read_table(output / "problems", "problems").to_pylist(),
        read_table(output / "rollouts", "rollouts").to_pylist(),
        (output / "drops.jsonl").read_text("utf-8").splitlines(),
        dict(read_manifest(output / "problems", "problems").counts),
    )


def test_every_row_is_kept_or_listed_with_its_reason(tmp_path: Path) -> None:
    config = configured(tmp_path)
    facts = run_prepare(config)
    problems, _, lines, counts = outcome(config.run.output)
    drops = [json.loads(line) for line in lines]
    assert [(row["source"], row["question"], row["answer"]) for row in problems] == [
        # One solution is no vote: without another source nobody tells an answer.
        ("stratos", "Write a program.", ""),
        ("stratos", "Only here.", ""),
        ("openr1", "What is  \\(2+2\\)", "4"),
        ("openr1", "Repeat?", "6"),
        ("school", TANK, "42"),
        ("school", TANK.replace("30", "31"), "43"),
    ]
    assert Counter((one["source"], one["reason"]) for one in drops) == {
        ("stratos", "exact duplicate"): 1,
        ("openr1", "no answer"): 1,
        ("openr1", "contaminated: ngram, EXAM"): 1,
        ("school", "no question or no answer"): 1,
        ("school", "exact duplicate with another answer"): 1,
        ("school", "near duplicate"): 1,
    }
    read = sum(len(rows) for _, rows in SOURCES.values())
    assert read == len(problems) + len(drops) == counts["read"]
    assert sum(count for name, count in counts.items() if name.startswith("dropped: ")) - 1 == len(drops)
    for name, (_, rows) in SOURCES.items():
        dropped = sum(count for key, count in counts.items() if key.startswith(f"{name}: dropped"))
        assert counts[f"{name}: read"] == len(rows) == counts[f"{name}: problems"] + dropped
    assert facts["problems"] == 6
    assert not (config.run.output / "candidates").exists()


def test_drops_name_the_kept_row_and_the_evaluation_question(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run_prepare(config)
    problems, _, lines, _ = outcome(config.run.output)
    by_reason = {json.loads(line)["reason"]: json.loads(line) for line in lines}
    ids = {row["question"]: row["id"] for row in problems}
    near = by_reason["near duplicate"]
    assert (near["kept"], near["kept_source"], near["match"]) == (ids[TANK], "school", TANK)
    assert 0.7 <= near["overlap"] < 1.0
    other = by_reason["exact duplicate with another answer"]
    assert (other["answer"], other["match_answer"], other["kept"]) == ("5", "4", ids["What is  \\(2+2\\)"])
    assert by_reason["contaminated: ngram, EXAM"]["match"] == EXAM
    assert by_reason["contaminated: ngram, EXAM"]["place"] == "line 2"


def test_trajectories_are_kept_as_they_are_under_the_problem_that_was_kept(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run_prepare(config)
    problems, rollouts, _, _ = outcome(config.run.output)
    ids = {row["question"]: row["id"] for row in problems}
    shared = [row for row in rollouts if row["problem_id"] == ids["What is  \\(2+2\\)"]]
    assert [(row["sample_index"], row["response"], row["finish_reason"]) for row in shared] == [
        (0, "<think>\nTwo and two.\n</think>\n\n\\boxed{4}", "stop"),
        (1, GENERATIONS[0], "stop"),
        (2, GENERATIONS[1], "length"),
    ]
    assert {row["teacher"] for row in rollouts} == {"deepseek-r1"}
    assert {(row["domain"], row["difficulty"]) for row in shared} == {("algebra", "college")}
    assert json.loads(shared[1]["metadata"]) == {"correctness_math_verify": True}
    assert {row["problem_id"] for row in rollouts} <= set(ids.values())
    assert len({row["id"] for row in rollouts}) == len(rollouts) == 6
    assert {row["answer"] for row in shared} == {"4"}
    assert [row["answer"] for row in rollouts if row not in shared] == ["", "", "6"]
    counts = read_manifest(config.run.output / "rollouts", "rollouts").counts
    repeated = "dropped: trajectories that repeat another of the same problem"
    assert counts == {"stop": 5, "length": 1, "gold: none": 2, repeated: 1}


def test_the_manifest_shows_examples_conflicts_and_all_inputs(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run_prepare(config)
    manifest = read_manifest(config.run.output / "problems", "problems")
    assert manifest.examples["near duplicate"] == [f"school, line 2: {TANK.replace('garden', 'yard')}"]
    assert manifest.examples["no answer"] == ["openr1, line 3"]
    sources = {f"sources.{number}.path" for number in range(len(config.sources))}
    assert set(manifest.inputs) == {*sources, "decontamination.sets.0.path"}
    assert "absent" not in manifest.inputs.values()
    (line,) = (config.run.output / "conflicts.jsonl").read_text("utf-8").splitlines()
    conflict = json.loads(line)
    assert conflict["answers"] == {"4": ["openr1"], "5": ["school"]}
    assert (conflict["solutions"], conflict["settled"]) == ({"4": 2}, "4")
    assert manifest.counts["conflicts: openr1 against school"] == 1
    assert manifest.counts["conflicts: settled"] == 1


def test_labels_of_a_dropped_duplicate_go_to_the_kept_row(tmp_path: Path) -> None:
    rows = [{"problem": "A lone question.", "answer": "4"}]
    labelled = [{"problem": "A lone  question", "answer": "4", "type": "Geometry", "difficulty": 9}]
    for name, content in (("plain", rows), ("labelled", labelled)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    solved = [{"question": "a lone question", "answer": "w", "solution": "\\boxed{4}"}]
    (tmp_path / "solved.json").write_text(json.dumps(solved), "utf-8")
    sources = (
        SourceConfig(name="plain", path=str(tmp_path / "plain.json"), preset="math"),
        SourceConfig(name="labelled", path=str(tmp_path / "labelled.json"), preset="math"),
    )
    config = configured(tmp_path, sources=sources, decontamination=None, annotation=None, near_duplicates=None)
    run_prepare(config)
    (problem,) = read_table(config.run.output / "problems", "problems").to_pylist()
    assert (problem["source"], problem["domain"], problem["difficulty"]) == ("labelled", "geometry", "graduate")


class Killed(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("moment", range(1, 24, 2))
def test_a_run_that_was_killed_continues_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """The n-th atomic write of the stage does not happen, as when the process is killed before it."""
    whole = configured(tmp_path)
    run_prepare(whole)
    expected = outcome(whole.run.output)
    config = configured(tmp_path, run=RunConfig(output=tmp_path / "again", seed=0))
    writes = 0

    def dying(function: Any) -> Any:
        def write(*arguments: Any, **settings: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == moment:
                raise Killed
            return function(*arguments, **settings)

        return write

    from phimr_nemo.data.prepare import candidates, look, texts

    with monkeypatch.context() as patch:
        patch.setattr(look, "write_json", dying(look.write_json))
        patch.setattr(candidates, "atomic_file", dying(candidates.atomic_file))
        patch.setattr(candidates, "write_json", dying(candidates.write_json))
        patch.setattr(texts, "write_shard", dying(texts.write_shard))
        patch.setattr(module, "finish", dying(module.finish))
        with pytest.raises(Killed):
            run_prepare(config)
    facts = run_prepare(config)
    assert outcome(config.run.output) == expected
    # As when it is killed while it removes what it no longer needs.
    (config.run.output / "candidates").mkdir()
    (config.run.output / "candidates" / "source-000.json").write_text("{}", "utf-8")
    assert facts == run_prepare(config)
    assert outcome(config.run.output) == expected
    assert not (config.run.output / "candidates").exists()


@pytest.mark.parametrize("kind", ["problems", "rollouts"])
def test_a_damaged_shard_is_made_again_and_no_other(tmp_path: Path, kind: str) -> None:
    config = configured(tmp_path)
    run_prepare(config)
    expected = outcome(config.run.output)
    shards = sorted((config.run.output / kind).glob("part-*.parquet"))
    whole = [shard.read_bytes() for shard in shards]
    written = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].write_bytes(whole[1][:100])
    (damage,) = check_directory(config.run.output / kind)
    assert damage.shards == [shards[1].name]
    forget_damaged(damage)
    run_prepare(config)
    assert outcome(config.run.output) == expected
    assert [shard.read_bytes() for shard in shards] == whole
    changed = [shard.stat().st_mtime_ns != before for shard, before in zip(shards, written, strict=True)]
    assert changed == [number == 1 for number in range(len(shards))]


def test_the_result_does_not_depend_on_the_shard_size(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run_prepare(config)
    other = configured(tmp_path, run=RunConfig(output=tmp_path / "other", seed=0), shard_size=1000)
    run_prepare(other)
    assert outcome(config.run.output) == outcome(other.run.output)


def test_sources_without_trajectories_make_no_rollouts(tmp_path: Path) -> None:
    config = configured(tmp_path)
    config = configured(tmp_path, sources=config.sources[2:])
    run_prepare(config)
    assert not (config.run.output / "rollouts").exists()
    assert read_manifest(config.run.output / "problems", "problems").rows == 3


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "Q", "answer": "no end"}\n', "utf-8")
    source = SourceConfig(name="bad", path=str(tmp_path / "bad.jsonl"), preset="gsm8k")
    with pytest.raises(UserError, match="source bad: none of its 1 rows is kept") as caught:
        run_prepare(configured(tmp_path, sources=(source,)))
    assert "'dropped: no answer': 1" in caught.value.problem


def test_preflight_refuses_settings_that_cannot_work(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with pytest.raises(UserError, match="occur more than once"):
        preflight("prepare", configured(tmp_path, sources=(*config.sources, config.sources[0])))
    with pytest.raises(UserError, match="preset=gsm8k and the columns"):
        SourceConfig(name="n", path=config.sources[0].path, preset="gsm8k", answer="a")
    with pytest.raises(UserError, match="does not exist"):
        preflight("prepare", configured(tmp_path, sources=(SourceConfig(name="n", path=str(tmp_path / "no")),)))
    preflight("prepare", config)


def test_the_command_and_generate_on_its_problems(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "What is 2+3?", "answer": "5"}\n', "utf-8")
    arguments = ["prepare", "--config", "conf/prepare/tiny.yaml", f"run.output={tmp_path / 'out'}"]
    result = CliRunner().invoke(app, [*arguments, f"sources=[{{name: mine, path: {tmp_path / 'mine.jsonl'}}}]"])
    assert result.exit_code == 0, result.output
    problems, counts = read_configured_problems(RecordProblems(kind="records", path=tmp_path / "out" / "problems"), 0)
    assert problems.column("question").to_pylist() == ["What is 2+3?"]
    assert counts == {"read": 1}


def test_files_whose_names_are_no_utf8_are_read(tmp_path: Path, repository: Path) -> None:
    """As an archive made elsewhere leaves them; what is told of them is text."""
    rows, named = tmp_path / "rows", os.fsdecode(b"gr\xf6\xdfe.jsonl")
    rows.mkdir()
    lines = [{"question": f"How much is {n} plus {n}?", "answer": str(2 * n)} for n in (3, 5)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"question": "And this?", "answer": None}])
    try:
        (rows / named).write_text(text, "utf-8")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    given = [f"run.output={tmp_path / 'out'}", f"sources=[{{name: own, path: {rows}}}]", "decontamination=null"]
    run_prepare(load_config(PrepareConfig, repository / "conf/prepare/paper.yaml", given))
    assert read_table(tmp_path / "out" / "problems", "problems").num_rows == 2
    problems, _ = load_problems(rows / named, limit=2)
    assert set(problems["source"].to_pylist()) == {"gr??e"}
