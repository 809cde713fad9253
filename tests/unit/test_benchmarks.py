"""Benchmarks by name: the whole of the right one, from any layout; GPQA's options in an order of their own."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from phimr_nemo.config import BenchmarkProblems, EvaluateConfig, load_config
from phimr_nemo.config.evaluation import FROM_FILES_ONLY, BenchmarkName
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate import benchmarks
from phimr_nemo.evaluate.benchmarks import BENCHMARKS, Benchmark, answers_digest, questions_digest, read_benchmark
from phimr_nemo.evaluate.gpqa import read_gpqa

# Answers of AIME 2024, I and II, as its organisers publish them (Art of Problem Solving, answer keys).
AIME24 = (
    "204 25 809 116 104 294 540 197 480 113 371 385 110 104 721 73 468 601 23 321 211 315 236 45 33 80 55 699 127 902"
)


def named(name: Any, path: Path | None, *, hub: bool = False) -> BenchmarkProblems:
    return BenchmarkProblems(kind="benchmark", name=name, path=path, hub=hub)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def refusal(problems: BenchmarkProblems) -> UserError:
    with pytest.raises(UserError) as caught:
        read_benchmark(problems)
    return caught.value


def aime(**changes: Any) -> list[dict[str, Any]]:
    rows = [{"problem": f"Question {place}?", "answer": f"{int(a):03d}"} for place, a in enumerate(AIME24.split())]
    return [{**row, **changes} if place == 7 else row for place, row in enumerate(rows)]


def test_aime_is_known_by_its_answers_whatever_its_wording(tmp_path: Path) -> None:
    """The published answers, typed in here, have the digest that the registry holds."""
    table, edition = read_benchmark(named("AIME24", write_lines(tmp_path / "aime.jsonl", aime())))
    assert table.num_rows == 30
    assert [int(answer) for answer in table["answer"].to_pylist()] == [int(a) for a in AIME24.split()]
    assert edition == "other"


def test_another_year_or_a_wrong_answer_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "aime.jsonl", aime())
    assert "not those of AIME25" in refusal(named("AIME25", path)).problem
    wrong = write_lines(tmp_path / "wrong.jsonl", aime(answer="003"))
    assert "not those of AIME24" in refusal(named("AIME24", wrong)).problem


def test_a_part_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "aime.jsonl", aime()[:-1])
    error = refusal(named("AIME24", path))
    assert "29 questions" in error.problem
    assert "AIME24 has 30" in error.rule


def test_a_question_without_an_answer_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "aime.jsonl", aime(answer=""))
    assert f"{path}, line 8: no question or no answer" in refusal(named("AIME24", path)).problem


@pytest.mark.parametrize(
    ("name", "hub", "said"),
    [
        ("AIME42", False, "name='AIME42'"),
        ("AIME24", False, "without a place"),
        ("GPQA-Diamond", True, "GPQA-Diamond with hub=true"),
        ("AMC", True, "AMC with hub=true"),
    ],
)
def test_what_cannot_be_read_is_refused_before(name: str, hub: bool, said: str) -> None:
    with pytest.raises(UserError) as caught:
        named(name, Path("a.jsonl") if name == "AIME42" else None, hub=hub)
    assert said in caught.value.problem


def test_the_names_are_those_of_the_configuration_and_hub_datasets_too() -> None:
    assert set(get_args(BenchmarkName)) == set(benchmarks.BENCHMARKS)
    without = {name for name, benchmark in benchmarks.BENCHMARKS.items() if benchmark.hub is None}
    assert without == set(FROM_FILES_ONLY)


def test_wrong_columns_are_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"title": "a", "body": "b"}])
    for name in ("MATH-500", "OlympiadBench"):
        assert "['body', 'title']" in refusal(named(name, path)).problem


def olympiad(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "question": f"Find $x_{{{number}}}$.",
        "solution": ["So it is."],
        "final_answer": [f"${number}$", "$2$"],
        "subfield": "Algebra",
        "modality": "Text-only",
        "subject": "Math",
    }
    return {**row, **changes}


def test_olympiadbench_is_read_in_its_own_layout_and_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        benchmarks.BENCHMARKS,
        "OlympiadBench",
        Benchmark("OlympiadBench", (2,), preset="olympiad_bench"),
    )
    image = olympiad(3, modality="Multimodal")
    own = write_lines(tmp_path / "own.jsonl", [olympiad(1), olympiad(2), image])
    table, edition = read_benchmark(named("OlympiadBench", own))
    assert table["answer"].to_pylist() == ["1, 2", "2, 2"]
    assert edition == "unknown"
    other = write_lines(tmp_path / "other.jsonl", [{"problem": "a?", "answer": 1}, {"problem": "b?", "answer": "x"}])
    assert read_benchmark(named("OlympiadBench", other))[0]["answer"].to_pylist() == ["1", "x"]


def test_a_question_twice_counts_but_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks.BENCHMARKS, "MATH-500", Benchmark("MATH-500", (3,)))
    rows = [{"problem": "a?", "answer": "1"}, {"problem": "b?", "answer": "2"}, {"problem": "a?", "answer": "1"}]
    table, _ = read_benchmark(named("MATH-500", write_lines(tmp_path / "m.jsonl", rows)))
    assert table["question"].to_pylist() == ["a?", "b?"]


def test_digests_know_order_spacing_and_zeros_for_nothing() -> None:
    assert answers_digest(["007", "12", " 5"]) == answers_digest(["5", "7", "12"])
    assert answers_digest(["7", "12", "5"]) != answers_digest(["7", "12", "6"])
    assert answers_digest(["7", "x"]) is None
    assert questions_digest(["a  b\n", "c"]) == questions_digest(["c", "a b"])
    assert questions_digest(["ab", "c"]) != questions_digest(["a b", "c"])


def gpqa_file(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def gpqa_row(number: int, **changes: str) -> dict[str, str]:
    row = {
        "Question": f"Which particle\nis number {number}?",
        "Correct Answer": f"right {number} ",
        "Incorrect Answer 1": f"wrong, {number}",
        "Incorrect Answer 2": f'"odd" {number}',
        "Incorrect Answer 3": f"none {number}",
        "High-level domain": "Physics",
        "Subdomain": "Particles",
        "Record ID": f"rec{number}",
    }
    return {**row, **changes}


GPQA_ROWS = [gpqa_row(number) for number in range(198)]


def test_gpqa_letters_follow_from_content_alone(tmp_path: Path) -> None:
    table = read_gpqa(gpqa_file(tmp_path / "a.csv", GPQA_ROWS))
    turned = [
        {
            **row,
            "Incorrect Answer 1": row["Incorrect Answer 3"],
            "Incorrect Answer 3": row["Incorrect Answer 1"],
        }
        for row in reversed(GPQA_ROWS)
    ]
    again = read_gpqa(gpqa_file(tmp_path / "b.csv", turned))
    ours = dict(zip(table["question"].to_pylist(), table["answer"].to_pylist(), strict=True))
    assert ours == dict(zip(again["question"].to_pylist(), again["answer"].to_pylist(), strict=True))
    for number, (asked, letter) in enumerate(ours.items()):
        lines = asked.splitlines()
        assert lines[:3] == ["Which particle", f"is number {number}?", ""]
        assert {line[3:] for line in lines[3:]} == {
            f"right {number}",
            f"wrong, {number}",
            f'"odd" {number}',
            f"none {number}",
        }
        assert f"{letter}) right {number}" in lines
    # Four letters, 198 questions: the standard deviation of each count is 6.1.
    assert all(abs(count - 198 / 4) < 4 * 6.1 for count in Counter(ours.values()).values())


def test_gpqa_is_counted_and_read_as_a_benchmark(tmp_path: Path) -> None:
    table, edition = read_benchmark(named("GPQA-Diamond", gpqa_file(tmp_path / "gpqa_diamond.csv", GPQA_ROWS)))
    assert (table.num_rows, edition) == (198, "unknown")
    part = gpqa_file(tmp_path / "part.csv", GPQA_ROWS[:100])
    assert "100 questions" in refusal(named("GPQA-Diamond", part)).problem


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a", "answer": "b"}], "lacks the columns ['Question'"),
        ([gpqa_row(0), gpqa_row(1, **{"Correct Answer": " "})], "row 2 has an empty question or option"),
        ([gpqa_row(0, **{"Incorrect Answer 2": "right 0"})], "row 1 has the same option twice"),
    ],
)
def test_a_bad_gpqa_file_is_refused(tmp_path: Path, rows: list[dict[str, str]], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_gpqa(gpqa_file(tmp_path / "bad.csv", rows))
    assert said in caught.value.problem


def test_a_gpqa_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00PK")
    with pytest.raises(UserError, match="cannot be read"):
        read_gpqa(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("AIME24", "aime24.jsonl"),
        ("AIME25", "aime25.json"),
        ("AMC", "amc.json"),
        ("MATH-500", "math500.jsonl"),
        ("GSM8K", "gsm8k_test.jsonl"),
    ],
)
def test_real_benchmark_files_are_read_whole(shared_data: Path, name: Any, file: str) -> None:
    table, edition = read_benchmark(named(name, shared_data / "problems" / file))
    assert edition == "tested"
    assert all(answer.strip() for answer in table["answer"].to_pylist())
    assert (table.num_rows,) == BENCHMARKS[name].questions


PRESETS = {
    "paper": ("AIME24", 64),
    "aime25": ("AIME25", 64),
    "amc23": ("AMC23", 64),
    "math500": ("MATH-500", 8),
    "gsm8k": ("GSM8K", 1),
    "olympiadbench": ("OlympiadBench", 8),
    "omnimath": ("Omni-MATH", 1),
    "gpqa": ("GPQA-Diamond", 8),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_have_the_published_protocol(preset: str) -> None:
    """T=0.6, top_p=0.95, 32768 tokens, 64 samples for AIME and 8 for MATH-500 and GPQA, the boxed prompt."""
    path = [] if preset != "gpqa" else ["problems.path=gpqa.csv"]
    config = load_config(EvaluateConfig, Path(f"conf/evaluate/{preset}.yaml"), path)
    assert isinstance(config.problems, BenchmarkProblems)
    assert (config.problems.name, config.samples) == PRESETS[preset]
    assert (config.temperature, config.top_p, config.max_new_tokens) == (0.6, 0.95, 32768)
    if preset != "gpqa":
        assert config.prompt.replace("{question}", "Q") == (
            "Please reason step by step, and put your final answer within \\boxed{}. Q"
        )
    assert config.run.output.name == {"paper": "aime24"}.get(preset, preset)
