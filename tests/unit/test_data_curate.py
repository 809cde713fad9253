"""Curation: what is kept and why the rest is not, counted."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.data.curate import (
    agreement,
    midtrain_conversations,
    preference_pairs,
    repetition,
    rl_prompts,
    sft_conversations,
)
from phimr_nemo.data.synthetic import generate_problems
from phimr_nemo.data.teacher import teacher_rollouts
from phimr_nemo.errors import UserError
from phimr_nemo.store import rows_to_table

NUMBERS = itertools.count()


def verdict(problem: str, response: str, name: str = "correct", **other: Any) -> dict[str, Any]:
    return {
        "id": f"r{next(NUMBERS)}",
        "problem_id": problem,
        "question": f"question {problem}",
        "answer": "1",
        "response": response,
        "teacher": "t",
        "sample_index": 0,
        "seed": 0,
        "finish_reason": "stop",
        "tokens": len(response),
        "domain": "algebra",
        "difficulty": "middle",
        "metadata": "{}",
        "verdict": name,
        "extracted": "",
        "reason": "",
        "grader": "g",
        **other,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return rows_to_table(rows, "verdicts")


def test_midtrain_keeps_the_verified_and_counts_the_rest() -> None:
    verdicts = table(
        verdict("a", "one"),
        verdict("a", "one"),
        verdict("a", "two"),
        verdict("a", "three"),
        verdict("b", "x", "wrong"),
        verdict("b", "y", "timeout"),
        verdict("b", "z", finish_reason="length"),
        verdict("b", "forged <|end|><|user|>"),
        verdict("b", "one"),
    )
    kept, drops = midtrain_conversations(verdicts, max_per_problem=2)
    assert list(zip(kept["problem_id"].to_pylist(), kept["response"].to_pylist(), strict=True)) == [
        ("a", "one"),
        ("a", "two"),
        ("b", "one"),
    ]
    assert drops == {
        "duplicate response": 1,
        "over max_per_problem": 1,
        "verdict wrong": 1,
        "verdict timeout": 1,
        "cut off": 1,
        "special token in text": 1,
    }
    everything, _ = midtrain_conversations(verdicts)
    assert everything.num_rows == 4


NAMES = st.sampled_from(["correct", "wrong", "unparsable", "timeout", "error"])
DRAWN = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "u", "uv", "uw"]), NAMES), max_size=30)


@settings(deadline=None)
@given(DRAWN, st.integers(1, 3))
def test_no_response_is_lost_uncounted(drawn: list[tuple[str, str, str]], most: int) -> None:
    verdicts = table(*(verdict(problem, text, name) for problem, text, name in drawn))
    for kept, drops in (
        midtrain_conversations(verdicts, max_per_problem=most),
        sft_conversations(verdicts, difficulties=["middle"], max_per_problem=most),
    ):
        assert kept.num_rows + sum(drops.values()) == len(drawn)
        right = {(problem, text) for problem, text, name in drawn if name == "correct"}
        pairs = list(zip(kept["problem_id"].to_pylist(), kept["response"].to_pylist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert set(pairs) <= right
        for problem in "abc":
            of_problem = sum(p == problem for p, _ in right)
            assert sum(p == problem for p, _ in pairs) == min(most, of_problem)


def test_sft_takes_the_longest_clean_hard_ones() -> None:
    loop = " ".join(["and so on it goes again and again until the end"] * 20)
    verdicts = table(
        verdict("a", "short"),
        verdict("a", "much longer"),
        verdict("b", "easy", difficulty="elementary"),
        verdict("c", "unknown difficulty", difficulty=None),
        verdict("d", loop),
    )
    kept, drops = sft_conversations(verdicts, difficulties=["middle", "college"], max_per_problem=1)
    assert kept["response"].to_pylist() == ["much longer", "unknown difficulty"]
    assert drops == {"over max_per_problem": 1, "other difficulty": 1, "repetitive": 1}
    assert repetition(loop) > 0.9
    # Words 1..12: three runs of ten, all different; repeated once: 15 runs, of which the last 3 occurred.
    once = " ".join(str(i) for i in range(12))
    assert repetition(once) == 0
    assert repetition(f"{once} {once}") == pytest.approx(3 / 15)


def test_near_miss_pairs_part_last() -> None:
    verdicts = table(
        verdict("a", "2+2=4, so 4"),
        verdict("a", "hm, 4"),
        verdict("a", "2+2=4, so 5", "wrong"),
        verdict("a", "hm, what", "unparsable"),
        verdict("a", "no idea", "wrong"),
        verdict("b", "only right"),
        verdict("c", "only wrong", "wrong"),
        verdict("d", "right"),
        verdict("d", "hung", "timeout"),
    )
    pairs, drops = preference_pairs(verdicts, max_per_problem=2, mode="near_miss", seed=0)
    assert list(zip(pairs["chosen"].to_pylist(), pairs["rejected"].to_pylist(), strict=True)) == [
        ("2+2=4, so 4", "2+2=4, so 5"),
        ("hm, 4", "hm, what"),
    ]
    assert drops == {"problem without wrong response": 2, "problem without right response": 1, "ungraded": 1}
    assert agreement("abcd", "abxyz") == 2 / 5
    assert agreement("abc", "abc") == 1
    assert agreement("", "") == 0


@settings(deadline=None)
@given(DRAWN, st.integers(1, 3), st.sampled_from(["near_miss", "random"]), st.integers(0, 5))
def test_pairs_hold_a_right_and_a_wrong_response_of_one_problem(
    drawn: list[tuple[str, str, str]], most: int, mode: Any, seed: int
) -> None:
    rows = [verdict(problem, text, name) for problem, text, name in drawn]
    pairs, _ = preference_pairs(table(*rows), max_per_problem=most, mode=mode, seed=seed)
    assert pairs.equals(preference_pairs(table(*rows), max_per_problem=most, mode=mode, seed=seed)[0])
    found = pairs.to_pylist()
    assert len({pair["id"] for pair in found}) == len(found)
    for problem in "abc":
        right = {r["response"] for r in rows if r["problem_id"] == problem and r["verdict"] == "correct"}
        wrong = {
            r["response"]
            for r in rows
            if r["problem_id"] == problem and r["verdict"] in ("wrong", "unparsable") and r["response"]
        }
        mine = [pair for pair in found if pair["problem_id"] == problem]
        assert len(mine) == min(most, len(right), len(wrong))
        assert {pair["chosen"] for pair in mine} <= right
        assert {pair["rejected"] for pair in mine} <= wrong
        assert len({pair["chosen"] for pair in mine}) == len({pair["rejected"] for pair in mine}) == len(mine)


def test_random_pairs_depend_on_the_seed_and_lengths_can_be_matched() -> None:
    rows = [verdict("a", f"right {i}") for i in range(6)] + [verdict("a", f"wrong {i}", "wrong") for i in range(6)]
    chosen = [
        preference_pairs(table(*rows), max_per_problem=1, mode="random", seed=seed)[0]["chosen"][0].as_py()
        for seed in range(12)
    ]
    assert len(set(chosen)) > 1
    verdicts = table(verdict("a", "x" * 10), verdict("a", "y" * 21, "wrong"), verdict("a", "z" * 20, "wrong"))
    pairs, drops = preference_pairs(verdicts, max_per_problem=5, mode="near_miss", seed=0, max_length_ratio=2.0)
    assert pairs["rejected"].to_pylist() == ["z" * 20]
    assert drops == {"pair of unlike lengths": 1}


def test_prompts_by_pass_rate_and_uniform_length() -> None:
    def group(problem: str, right: int, wrong: int, lengths: list[int]) -> list[dict[str, Any]]:
        names = ["correct"] * right + ["wrong"] * wrong
        return [
            verdict(problem, f"{i}", name, tokens=n) for i, (name, n) in enumerate(zip(names, lengths, strict=True))
        ]

    verdicts = table(
        *group("easy", 4, 0, [10, 10, 10, 10]),
        *group("hopeless", 0, 4, [10, 10, 10, 10]),
        *group("good", 3, 1, [90, 100, 100, 110]),
        *group("hard", 1, 3, [50, 50, 50, 50]),
        *group("uneven", 2, 2, [10, 10, 10, 200]),
        verdict("hard", "hung", "timeout"),
        verdict("hung", "hung", "error"),
    )
    kept, drops = rl_prompts(verdicts, min_pass=0.0, max_pass=1.0, hard_below=0.5, max_length_spread=0.3)
    rows = {row["problem_id"]: row for row in kept.to_pylist()}
    assert set(rows) == {"good", "hard"}
    assert rows["good"]["pass_rate"] == 0.75
    assert rows["good"]["mean_length"] == 100
    assert rows["good"]["length_spread"] == pytest.approx(np.sqrt(200 / 4) / 100)
    assert (rows["good"]["hard"], rows["hard"]["hard"]) == (False, True)
    assert rows["hard"]["pass_rate"] == 0.25
    assert drops == {
        "prompt too easy": 1,
        "prompt too hard": 1,
        "prompt of uneven length": 1,
        "prompt without graded response": 1,
        "ungraded": 2,
    }
    assert rl_prompts(verdicts, min_pass=0.0, max_pass=1.0, hard_below=0.5)[0].num_rows == 3
    assert rl_prompts(verdicts, min_pass=0.25, max_pass=0.75, hard_below=0.5)[0]["problem_id"].to_pylist() == [
        "uneven"
    ]
    with pytest.raises(UserError, match=r"min_pass=0\.5 max_pass=0\.5"):
        rl_prompts(verdicts, min_pass=0.5, max_pass=0.5, hard_below=0.5)


def test_lengths_are_characters_where_tokens_are_unknown() -> None:
    verdicts = table(verdict("a", "1234", tokens=-1), verdict("a", "12", "wrong", tokens=-1))
    (row,) = rl_prompts(verdicts, min_pass=0.0, max_pass=1.0, hard_below=0.5)[0].to_pylist()
    assert row["mean_length"] == 3
    assert row["length_spread"] == pytest.approx(1 / 3)


def test_the_teachers_rollouts_go_through() -> None:
    """The generated problems' own path: what the teacher marked wrong never reaches a conversation."""
    rollouts = teacher_rollouts(generate_problems(0, 200, "train"), 4, 0, 0.4).to_pylist()
    graded = table(
        *(
            {
                **row,
                "verdict": "correct" if f"\\boxed{{{row['answer']}}}" in row["response"] else "wrong",
                "extracted": "",
                "reason": "",
                "grader": "test",
            }
            for row in rollouts
        )
    )
    answers = {row["problem_id"]: row["answer"] for row in rollouts}
    conversations, _ = midtrain_conversations(graded)
    assert conversations.num_rows > 200
    for row in conversations.to_pylist():
        assert row["response"].endswith(f"\\boxed{{{answers[row['problem_id']]}}}.")
    pairs, _ = preference_pairs(graded, max_per_problem=1, mode="near_miss", seed=0)
    assert pairs.num_rows > 100
    for row in pairs.to_pylist():
        box = f"\\boxed{{{answers[row['problem_id']]}}}"
        assert (box in row["chosen"], box in row["rejected"]) == (True, False)
