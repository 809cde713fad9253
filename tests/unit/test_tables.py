"""Tables of scores: every number against its own arithmetic, in markdown that stays one table."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
from results import plain_result

from phimr_nemo.evaluate.evaluate import Lengths, Result
from phimr_nemo.report.tables import Table, difference_table, length_table, markdown, paired_difference, score_table

QUESTIONS = [f"q{number}" for number in range(40)]


def result(accuracies: dict[str, float], **changes: object) -> Result:
    mean = sum(accuracies.values()) / len(accuracies)
    plain = plain_result(
        mean,
        questions=len(accuracies),
        samples=4,
        stderr=0.03,
        truncated=0.25,
        stopped=0.75,
        unparsable=0.125,
        mean_tokens=1234.4,
        per_question=accuracies,
    )
    usual: dict[str, Any] = {"pass_at_k": {1: mean, 2: mean, 4: min(1.0, mean + 0.1)}, "majority": mean + 0.05}
    return dataclasses.replace(plain, **{**usual, **changes})


def accuracies(seed: int, shift: float = 0.0) -> dict[str, float]:
    rng = random.Random(seed)
    return {question: min(1.0, rng.choice([0.0, 0.25, 0.5, 0.75]) + shift) for question in QUESTIONS}


def cells(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.header, table.rows[row], strict=True))


def test_a_score_stands_with_its_errors_and_counts() -> None:
    first, second = result(accuracies(1)), result(accuracies(2), stderr=0.04)
    got = cells(score_table("AIME24", {"SFT": {3: first, 1: second}}), 0)
    mean = (first.pass1 + second.pass1) / 2
    assert float(got["pass@1 (%)"]) == pytest.approx(100 * mean, abs=0.05)
    assert got["SE (clustered by question)"] == f"{100 * math.sqrt((0.03**2 + 0.04**2) / 2):.1f}"
    assert got["SE (across seeds)"] == f"{100 * abs(first.pass1 - second.pass1) / 2:.1f}"
    assert float(got["maj@k (%)"]) == pytest.approx(100 * (mean + 0.05), abs=0.05)
    assert float(got["pass@k (%)"]) == pytest.approx(100 * (mean + 0.1), abs=0.05)
    assert (got["truncated (%)"], got["unparsable (%)"], got["mean tokens"]) == ("25.0", "12.5", "1,234")
    assert (got["questions"], got["samples"], got["seeds"]) == ("40", "4", "1, 3")
    alone = cells(score_table("AIME24", {"SFT": {0: first}}), 0)
    assert (alone["SE (clustered by question)"], alone["SE (across seeds)"]) == ("3.0", "-")


def test_models_are_compared_question_by_question() -> None:
    """All gain 0.25 on every question: paired, the difference has no error, however far apart questions are."""
    before, after = accuracies(1), accuracies(1, shift=0.25)
    table = difference_table("AIME24", {"SFT": {0: result(before)}, "DPO": {0: result(after)}})
    assert table is not None
    got = cells(table, 0)
    assert (got["models"], got["points"], got["SE (clustered by question)"]) == ("DPO - SFT", "+25.0", "0.0")
    assert got["95% interval"] == "+25.0 to +25.0"
    assert (got["questions"], got["seeds"]) == ("40", "0")


def test_the_interval_is_that_of_the_paired_differences() -> None:
    """Against the normal approximation with the standard error of the differences; and a planted unpaired one."""
    rng = np.random.default_rng(0)
    before = {question: float(value) for question, value in zip(QUESTIONS, rng.uniform(0, 1, 40), strict=True)}
    after = {question: value + float(rng.normal(0.1, 0.05)) for question, value in before.items()}
    # The order of the keys must not matter.
    found = paired_difference([(before, dict(reversed(after.items())))])
    differences = np.array([after[question] - before[question] for question in QUESTIONS])
    error = differences.std() / math.sqrt(40)
    assert found.mean == pytest.approx(differences.mean())
    assert found.stderr == pytest.approx(error, rel=0.05)
    assert (found.low, found.high) == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.1 * error
    )
    unpaired = paired_difference([(before, dict(zip(before, reversed(after.values()), strict=True)))])
    assert unpaired.mean == pytest.approx(found.mean)
    assert unpaired.stderr > 3 * found.stderr


def test_only_the_same_questions_of_one_seed_are_compared() -> None:
    other = {f"other {question}": value for question, value in accuracies(1).items()}
    models = {"SFT": {0: result(accuracies(1)), 1: result(accuracies(2))}, "DPO": {0: result(other)}}
    assert difference_table("AIME24", models) is None
    models["DPO"][1] = result(accuracies(2, shift=0.25))
    table = difference_table("AIME24", models)
    assert table is not None
    assert cells(table, 0)["seeds"] == "1"
    assert difference_table("AIME24", {"SFT": {0: result(accuracies(1))}}) is None


def test_lengths_over_seeds() -> None:
    def lengths(longest: float, correct: float) -> Lengths:
        return Lengths(
            known=160, quantiles={0.5: 10, 0.9: 20, 0.99: 30, 1.0: longest}, correct=correct, wrong=9, bins=()
        )

    known = {
        0: result(accuracies(1), lengths=lengths(40, 5)),
        1: result(accuracies(1), lengths=lengths(60, math.nan)),
    }
    table = length_table("AIME24", {"SFT": known, "old": {0: result(accuracies(1))}})
    assert table is not None
    assert table.rows == (("SFT", "10", "20", "30", "60", "5", "9", "320"),)
    assert length_table("AIME24", {"old": {0: result(accuracies(1))}}) is None


def test_markdown_keeps_its_columns_whatever_is_in_them() -> None:
    lines = markdown(Table("t", ("a", "b"), (("x | y", "1.5"), ("z", "-")))).splitlines()
    assert [line.count("|") for line in lines] == [3] * 4
    assert lines[1] == "| --- | ---: |"
