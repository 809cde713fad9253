"""Recorded responses as rollouts: flat, listed and nested files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.data.sources.problems import read_problems
from phimr_nemo.data.sources.recorded import load_recorded_rollouts, recorded_rollouts
from phimr_nemo.errors import UserError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_nested_layout(tmp_path: Path) -> None:
    row = {
        "question": "Q",
        "ground_truth": "3 * 6 = 18\nA: 18",
        "small": {"is_correct": False, "solution": "A: 26"},
        "large": {"is_correct": True, "solution": "A: 18"},
        "meta": {"level": 1},
    }
    rows = recorded_rollouts(write(tmp_path / "r.jsonl", [row])).to_pylist()
    assert [(r["teacher"], r["response"], r["answer"]) for r in rows] == [
        ("small", "A: 26", "18"),
        ("large", "A: 18", "18"),
    ]
    assert [json.loads(r["metadata"]) for r in rows] == [{"is_correct": False}, {"is_correct": True}]


def test_flat_layout_counts_samples_of_a_teacher(tmp_path: Path) -> None:
    answers = [("a", "1"), ("b", "2"), ("a", "3")]
    path = write(
        tmp_path / "r.jsonl",
        [{"model": m, "question": "Q", "gold": "5", "response": r, "finish_reason": "length"} for m, r in answers],
    )
    rows = recorded_rollouts(path).to_pylist()
    assert [(r["teacher"], r["sample_index"]) for r in rows] == [("a", 0), ("b", 0), ("a", 1)]
    assert {r["finish_reason"] for r in rows} == {"length"}
    assert len({r["id"] for r in rows}) == 3
    assert recorded_rollouts(path).equals(recorded_rollouts(path))


def test_listed_layout_and_named_columns(tmp_path: Path) -> None:
    rows = [{"q": "Q", "a": 5, "tries": ["x", "y"], "by": "me", "generations": ["no"]}]
    path = write(tmp_path / "r.jsonl", rows)
    found = recorded_rollouts(path, question="q", answer="a", response="tries", teacher="by").to_pylist()
    assert [(r["response"], r["teacher"], r["sample_index"]) for r in found] == [("x", "me", 0), ("y", "me", 1)]


def test_null_and_empty_responses_in_a_list_are_lost_alone_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"question": "Q?", "answer": "1", "responses": ["a", None, " "]}) + "\n", "utf-8")
    table, counts = load_recorded_rollouts(path)
    assert table["response"].to_pylist() == ["a"]
    assert counts == {"read": 1, "incomplete": 0, "dropped: response that is null or empty": 2}


def test_thinking_is_joined_to_the_response(tmp_path: Path) -> None:
    row = {"problem": "P", "gtruth_answer": "0", "message_thinking": " Hm. ", "message_content": "It is 0."}
    (rollout,) = recorded_rollouts(write(tmp_path / "r.jsonl", [row])).to_pylist()
    assert rollout["response"] == "<think>\nHm.\n</think>\nIt is 0."


def test_problem_ids_equal_those_of_the_problem_reader(tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", [{"question": "Q", "answer": "so\n#### 1,000"}])
    recorded = write(tmp_path / "r.jsonl", [{"question": "Q", "answer": "1000", "response": "?"}])
    assert recorded_rollouts(recorded)["problem_id"].to_pylist() == read_problems(problems)["id"].to_pylist()


def test_bad_rows_are_named(tmp_path: Path) -> None:
    good = {"question": "Q", "answer": "1", "response": "r"}
    with pytest.raises(UserError, match="lacks a response column"):
        recorded_rollouts(write(tmp_path / "a.jsonl", [{"question": "Q", "answer": "1"}]))
    with pytest.raises(UserError, match="line 2 has no response"):
        recorded_rollouts(write(tmp_path / "b.jsonl", [good, {**good, "response": None}]))
    with pytest.raises(UserError, match="line 2 has no response"):
        recorded_rollouts(write(tmp_path / "c.jsonl", [good, {**good, "response": 5}]))
    with pytest.raises(UserError, match=r"lacks a response column \(mine\)"):
        recorded_rollouts(write(tmp_path / "d.jsonl", [good]), response="mine")


def test_real_gsm8k_solutions(shared_data: Path) -> None:
    path = shared_data / "rollouts" / "gsm8k_model_solutions.jsonl"
    table, counts = load_recorded_rollouts(path)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    models = [key for key, value in lines[0].items() if isinstance(value, dict)]
    assert table.num_rows == len(lines) * len(models) == 5276
    assert counts == {"read": 1319, "incomplete": 0}
    labels = [json.loads(text)["is_correct"] for text in table["metadata"].to_pylist()]
    assert sum(labels) == sum(line[model]["is_correct"] for line in lines for model in models)
    problems = read_problems(shared_data / "problems" / "gsm8k_test.jsonl")
    assert set(problems["id"].to_pylist()) == set(table["problem_id"].to_pylist())


def test_real_graded_rollouts(shared_data: Path) -> None:
    table, counts = load_recorded_rollouts(shared_data / "rollouts" / "graded_rollouts.jsonl.gz")
    assert counts == {
        "read": 5428,
        "incomplete": 5,
        "dropped: response that is null or empty": 34,
        "repaired: escapes within escapes": 6,
    }
    assert len(set(table["id"].to_pylist())) == table.num_rows == 5423 - 34


@pytest.mark.parametrize("name", ["r1_traces_openrouter.json", "r1_8b_traces.json"])
def test_real_traces_keep_their_thinking(shared_data: Path, name: str) -> None:
    responses = recorded_rollouts(shared_data / "rollouts" / name)["response"].to_pylist()
    assert len(responses) == 5
    assert all(text.startswith("<think>\n") and "</think>" in text for text in responses)
