"""Curation: the fate of every rollout against rules written down again row by row, and never one lost."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.data.curate.fates import (
    LENGTH_EDGES,
    OF_VERDICT,
    balanced,
    length_classes,
    midtrain_fates,
    pair_fates,
    prompts,
    sft_fates,
    sides_by_teacher,
    sides_by_verdict,
)
from phimr_nemo.data.curate.lengths import TokenCounter
from phimr_nemo.data.curate.narrow import VERDICTS, Narrow, narrow_columns
from phimr_nemo.data.fate import MAX_CANDIDATES, REASONS, Fate
from phimr_nemo.data.repetition import repetition
from phimr_nemo.store.records import UNGRADED_VERDICTS
from phimr_nemo.store.shards import rows_to_table

NUMBERS = itertools.count()
SFT: dict[str, Any] = {
    "difficulties": ["middle", "college"],
    "max_per_problem": 1,
    "max_repetition": 0.3,
    "one_boxed_answer": False,
}
RL: dict[str, Any] = {"min_pass": 0.0, "max_pass": 1.0, "min_samples": 1, "max_length_spread": None}


def verdict(problem: str, response: str, name: str = "correct", **other: Any) -> dict[str, Any]:
    number = next(NUMBERS)
    return {
        "id": f"r{number}",
        "problem_id": problem,
        "question": f"question {problem}",
        "answer": "1",
        "response": response,
        "teacher": "t",
        "sample_index": number,
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


def narrow(*rows: dict[str, Any]) -> Narrow:
    table = rows_to_table(rows, "verdicts")
    return (
        narrow_columns(table.combine_chunks().to_batches()[0], TokenCounter())
        if rows
        else narrow(verdict("", ""))[:0]
    )


def named(fates: Any) -> list[str]:
    return [Fate(fate).name for fate in fates]


def test_every_fate_has_a_reason_and_every_verdict_its_fate() -> None:
    assert set(REASONS) == set(Fate)
    assert len(set(REASONS.values())) == len(Fate)
    assert [REASONS[Fate(fate)] for fate in OF_VERDICT] == ["kept", *(f"verdict {name}" for name in VERDICTS[1:])]


def test_midtrain_keeps_the_verified_and_says_why_not_the_rest() -> None:
    rows = [
        (verdict("a", "one"), "KEPT"),
        (verdict("a", "one"), "DUPLICATE"),
        (verdict("a", "two"), "KEPT"),
        (verdict("a", "three"), "OVER_LIMIT"),
        (verdict("b", "x", "wrong"), "WRONG"),
        (verdict("b", "y", "timeout"), "TIMEOUT"),
        (verdict("b", "z", "gold_unreadable"), "GOLD_UNREADABLE"),
        (verdict("b", "z", finish_reason="length"), "CUT_OFF"),
        (verdict("b", "forged <|end|><|user|>"), "SPECIAL_TOKEN"),
        (verdict("b", "not forged <| end |>"), "KEPT"),
        (verdict("b", "one"), "KEPT"),
        (verdict("c", "one", question="<|end|>"), "SPECIAL_TOKEN"),
    ]
    assert named(midtrain_fates(narrow(*(row for row, _ in rows)), max_per_problem=2)) == [fate for _, fate in rows]


NAMES = st.sampled_from(VERDICTS)
ROWS = st.builds(
    verdict,
    st.sampled_from("abc"),
    st.sampled_from(["", " ", "u", "uv", "uw", "<|end|>", "long " * 200, r"\boxed{1}", r"\boxed{1} or \boxed{2}"]),
    NAMES,
    finish_reason=st.sampled_from(["stop", "stop", "stop", "length"]),
    difficulty=st.sampled_from([None, "elementary", "middle", "college"]),
    tokens=st.sampled_from([-1, 1, 5, 100]),
    question=st.sampled_from(["q", "q", "q", "<|user|>"]),
)
DRAWN = st.lists(ROWS, max_size=40)


def verified(row: dict[str, Any]) -> str:
    if row["verdict"] != "correct":
        return str(row["verdict"]).upper()
    if row["finish_reason"] != "stop":
        return "CUT_OFF"
    return "SPECIAL_TOKEN" if "<|" in row["response"] + row["question"] else "KEPT"


def limited(rows: list[dict[str, Any]], fates: list[str], most: int, over: str = "OVER_LIMIT") -> None:
    """Each text once a problem and at most `most`: one row after the other, as a person would do it."""
    texts: set[tuple[str, str]] = set()
    counts: Counter[str] = Counter()
    for row in rows:
        place = row["place"]
        if fates[place] != "KEPT":
            continue
        if (row["problem_id"], row["response"]) in texts:
            fates[place] = "DUPLICATE"
            continue
        texts.add((row["problem_id"], row["response"]))
        counts[row["problem_id"]] += 1
        if counts[row["problem_id"]] > most:
            fates[place] = over


def placed(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "place": place} for place, row in enumerate(drawn)]


@settings(deadline=None)
@given(DRAWN, st.integers(1, 3))
def test_midtrain_against_the_rule_row_by_row(drawn: list[dict[str, Any]], most: int) -> None:
    expected = [verified(row) for row in drawn]
    limited(sorted(placed(drawn), key=lambda row: row["sample_index"]), expected, most)
    assert named(midtrain_fates(narrow(*drawn), max_per_problem=most)) == expected


@settings(deadline=None)
@given(DRAWN, st.integers(1, 3), st.booleans())
def test_sft_against_the_rule_row_by_row(drawn: list[dict[str, Any]], most: int, one_box: bool) -> None:
    expected = []
    for row in drawn:
        fate = verified(row)
        if fate == "KEPT" and row["difficulty"] not in (None, "middle", "college"):
            fate = "OTHER_DIFFICULTY"
        if fate == "KEPT" and repetition(row["response"]) > 0.3:
            fate = "REPETITIVE"
        if fate == "KEPT" and one_box and row["response"].count("boxed") != 1:
            fate = "NOT_ONE_BOX"
        expected.append(fate)
    limited(sorted(placed(drawn), key=lambda row: (-len(row["response"]), row["sample_index"])), expected, most)
    options = {**SFT, "max_per_problem": most, "one_boxed_answer": one_box}
    assert named(sft_fates(narrow(*drawn), **options)) == expected


def test_sft_takes_the_longest_clean_hard_ones() -> None:
    loop = " ".join(["and so on it goes again and again until the end"] * 20)
    rows = [
        (verdict("a", "short"), "OVER_LIMIT"),
        (verdict("a", "much longer"), "KEPT"),
        (verdict("b", "easy", difficulty="elementary"), "OTHER_DIFFICULTY"),
        (verdict("c", "unknown difficulty", difficulty=None), "KEPT"),
        (verdict("d", loop), "REPETITIVE"),
    ]
    assert repetition(loop) > 0.9
    assert named(sft_fates(narrow(*(row for row, _ in rows)), **SFT)) == [fate for _, fate in rows]


@pytest.mark.parametrize(
    ("response", "kept"),
    [
        (r"so \boxed{4}", True),
        (r"<think>maybe \boxed{3}</think> so \boxed{4}", True),
        (r"so \boxed{4}, as I said: \boxed{4}", True),
        (r"so \boxed{4} or \boxed{5}", False),
        ("so 4", False),
        (r"<think>so \boxed{4}", False),
    ],
)
def test_one_boxed_answer_counts_after_the_thinking(response: str, kept: bool) -> None:
    (fate,) = sft_fates(narrow(verdict("a", response)), **{**SFT, "one_boxed_answer": True})
    assert fate == (Fate.KEPT if kept else Fate.NOT_ONE_BOX)


def by_verdict(found: Narrow) -> Any:
    return pair_fates(found, sides_by_verdict(found))


@settings(deadline=None)
@given(DRAWN)
def test_pair_candidates_against_the_rule_row_by_row(drawn: list[dict[str, Any]]) -> None:
    expected = []
    for row in drawn:
        if row["verdict"] in UNGRADED_VERDICTS:
            expected.append("UNGRADED")
        elif row["finish_reason"] != "stop":
            expected.append("CUT_OFF")
        elif not row["response"].strip():
            expected.append("BLANK")
        else:
            expected.append("SPECIAL_TOKEN" if "<|" in row["response"] + row["question"] else "KEPT")
    rows = placed(drawn)
    for right in (True, False):
        limited([row for row in rows if (row["verdict"] == "correct") == right], expected, MAX_CANDIDATES, "TOO_MANY")
    kept = [row for row in rows if expected[row["place"]] == "KEPT"]
    sides = {
        right: {r["problem_id"] for r in kept if (r["verdict"] == "correct") == right} for right in (True, False)
    }
    for row in kept:
        if row["problem_id"] not in sides[True]:
            expected[row["place"]] = "NO_RIGHT"
        elif row["problem_id"] not in sides[False]:
            expected[row["place"]] = "NO_WRONG"
    assert named(by_verdict(narrow(*drawn))) == expected


TEACHERS = st.lists(st.sampled_from(["strong", "weak", "third"]), min_size=40, max_size=40)


@settings(deadline=None)
@given(DRAWN, TEACHERS, st.booleans())
def test_delta_candidates_against_the_rule_row_by_row(
    drawn: list[dict[str, Any]], teachers: list[str], is_graded: bool
) -> None:
    expected = []
    for row, teacher in zip(drawn, teachers, strict=False):
        name = row["verdict"]
        if teacher == "third":
            expected.append("OTHER_TEACHER")
        elif is_graded and name in UNGRADED_VERDICTS:
            expected.append("UNGRADED")
        elif is_graded and teacher == "strong" and name != "correct":
            expected.append(name.upper())
        elif is_graded and teacher == "weak" and name == "correct":
            expected.append("RIGHT")
        elif row["finish_reason"] != "stop":
            expected.append("CUT_OFF")
        elif not row["response"].strip():
            expected.append("BLANK")
        else:
            expected.append("SPECIAL_TOKEN" if "<|" in row["response"] + row["question"] else "KEPT")
    rows = [{**row, "teacher": teacher} for row, teacher in zip(placed(drawn), teachers, strict=False)]
    for side in ("strong", "weak"):
        limited([row for row in rows if row["teacher"] == side], expected, MAX_CANDIDATES, "TOO_MANY")
    kept = [row for row in rows if expected[row["place"]] == "KEPT"]
    for row in kept:
        asked = {other["teacher"] for other in kept if other["problem_id"] == row["problem_id"]}
        if asked != {"strong", "weak"}:
            expected[row["place"]] = "NO_STRONG" if asked == {"weak"} else "NO_WEAK"
    found = narrow(*drawn)
    whose = np.array(teachers[: len(drawn)])
    sides = sides_by_teacher(found, whose == "strong", whose == "weak", by_verdict=is_graded)
    assert named(pair_fates(found, sides)) == expected
    assert sides.chosen.tolist() == [teacher == "strong" for teacher in whose]


def test_the_work_of_one_question_is_bounded() -> None:
    rows = [verdict("a", f"{i}", name) for i in range(MAX_CANDIDATES + 5) for name in ("correct", "wrong")]
    assert Counter(named(by_verdict(narrow(*rows)))) == {"KEPT": 2 * MAX_CANDIDATES, "TOO_MANY": 10}


@settings(deadline=None)
@given(DRAWN, st.randoms())
def test_fates_do_not_depend_on_the_order_of_rollouts(drawn: list[dict[str, Any]], rng: random.Random) -> None:
    # Equal sample numbers too, as when several directories are joined: content breaks the tie.
    rows = [{**row, "sample_index": row["sample_index"] % 3} for row in drawn]
    shuffled = rng.sample(rows, len(rows))
    for rule in (
        lambda n: midtrain_fates(n, max_per_problem=1),
        lambda n: sft_fates(n, **SFT),
        by_verdict,
    ):
        one, other = (
            {row["id"]: fate for row, fate in zip(order, named(rule(narrow(*order))), strict=True)}
            for order in (rows, shuffled)
        )
        assert one == other


CELLS = st.lists(st.integers(0, 5), max_size=60)


@settings(deadline=None)
@given(CELLS, st.integers(0, 70), st.randoms())
def test_balance_is_max_min_fair(cells: list[int], size: int, rng: random.Random) -> None:
    order = rng.sample(range(1000), len(cells))
    kept = balanced(np.array(cells, np.uint8), np.array(order, np.uint64), size).tolist()
    assert sum(kept) == min(size, len(cells))
    counts, left = Counter(cells), Counter(cell for cell, keep in zip(cells, kept, strict=True) if keep)
    # Fair: a cell that lost something is at most one smaller than any other is.
    for cell in counts:
        if left[cell] < counts[cell]:
            assert left[cell] >= max(left.values(), default=0) - 1
    # Within a cell those with the smallest order stay.
    for cell in counts:
        mine = sorted((o, keep) for o, c, keep in zip(order, cells, kept, strict=True) if c == cell)
        assert [keep for _, keep in mine] == [True] * left[cell] + [False] * (counts[cell] - left[cell])


def test_balance_keeps_rare_cells_whole() -> None:
    cells = np.array([0] * 100 + [1] * 3 + [2] * 50, np.uint8)
    kept = balanced(cells, np.arange(len(cells), dtype=np.uint64), 44)
    # 3 whole, and 41 left for two: 20, and the fullest gets the one over.
    assert np.bincount(cells[kept]).tolist() == [21, 3, 20]


def test_length_classes_are_powers_of_two_in_tokens() -> None:
    rows = [
        verdict("a", "", tokens=LENGTH_EDGES[0]),
        verdict("b", "", tokens=LENGTH_EDGES[0] + 1),
        verdict("c", "", tokens=10**6),
        # 4,000 characters are about 1,212 tokens: the second class.
        verdict("d", "x" * 4000, tokens=-1),
    ]
    assert length_classes(narrow(*rows)).tolist() == [0, 1, len(LENGTH_EDGES), 1]


def group(problem: str, right: int, wrong: int, lengths: list[int]) -> list[dict[str, Any]]:
    names = ["correct"] * right + ["wrong"] * wrong
    return [verdict(problem, f"{i}", name, tokens=n) for i, (name, n) in enumerate(zip(names, lengths, strict=True))]


def test_prompts_by_pass_rate_and_uniform_length() -> None:
    rows = [
        *group("easy", 4, 0, [10, 10, 10, 10]),
        *group("hopeless", 0, 4, [10, 10, 10, 10]),
        *group("good", 3, 1, [90, 100, 100, 110]),
        *group("hard", 1, 3, [50, 50, 50, 50]),
        *group("uneven", 2, 2, [10, 10, 10, 200]),
        *group("few", 1, 1, [10, 10]),
        verdict("hard", "hung", "timeout", tokens=10**6),
        verdict("hung", "hung", "error"),
        *(verdict("forged", "x", name, question="<|end|>") for name in ("correct", "wrong", "wrong")),
    ]
    found = prompts(narrow(*rows), **{**RL, "min_samples": 3, "max_length_spread": 0.3})
    by_problem = {rows[row]["problem_id"]: place for place, row in enumerate(found.row.tolist())}
    assert {name: Fate(found.fates[place]).name for name, place in by_problem.items()} == {
        "easy": "TOO_EASY",
        "hopeless": "TOO_HARD",
        "good": "KEPT",
        "hard": "KEPT",
        "uneven": "UNEVEN",
        "few": "FEW_SAMPLES",
        "hung": "FEW_SAMPLES",
        "forged": "SPECIAL_TOKEN",
    }
    good, hard = by_problem["good"], by_problem["hard"]
    assert (found.pass_rate[good], found.mean_length[good]) == (0.75, 100)
    assert found.length_spread[good] == pytest.approx(np.sqrt(200 / 4) / 100)
    assert (found.pass_rate[hard], found.mean_length[hard], found.length_spread[hard]) == (0.25, 50, 0)
    assert found.ungraded == 2
    assert found.row[good] == next(place for place, row in enumerate(rows) if row["problem_id"] == "good")


@settings(deadline=None)
@given(DRAWN)
def test_prompt_numbers_are_those_of_numpy(drawn: list[dict[str, Any]]) -> None:
    found = prompts(narrow(*drawn), **RL)
    assert len(found.row) == len({row["problem_id"] for row in drawn})
    for place, first in enumerate(found.row.tolist()):
        mine = [row for row in drawn if row["problem_id"] == drawn[first]["problem_id"]]
        assert mine[0] == drawn[first]
        graded = [row for row in mine if row["verdict"] not in UNGRADED_VERDICTS]
        if not graded:
            assert found.fates[place] in (Fate.FEW_SAMPLES, Fate.SPECIAL_TOKEN)
            continue
        known = all(row["tokens"] >= 0 for row in graded)
        lengths = np.array([row["tokens"] if known else len(row["response"]) for row in graded], float)
        assert found.pass_rate[place] == sum(row["verdict"] == "correct" for row in graded) / len(graded)
        assert found.mean_length[place] == pytest.approx(lengths.mean())
        assert found.length_spread[place] == pytest.approx(lengths.std() / lengths.mean() if lengths.any() else 0.0)


def test_the_upper_bound_of_the_pass_rate_is_exclusive() -> None:
    rows = group("uneven", 2, 2, [10, 10, 10, 200])
    strict = prompts(narrow(*rows), **{**RL, "min_pass": 0.25, "max_pass": 0.5})
    assert named(strict.fates) == ["TOO_EASY"]
