"""No hostile response is graded correct, breaks a worker, or takes the blame off the response."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from verify_hostile import GROUPS

from phimr_nemo.verify import Grader
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

MIN_RESPONSES = 150


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1) as made:
        yield made


def test_there_are_many_different_ones() -> None:
    everything = [pair for pairs in GROUPS.values() for pair in pairs]
    assert len(set(everything)) >= MIN_RESPONSES


@pytest.mark.parametrize("group", GROUPS)
def test_no_hostile_response_is_correct(grader: Grader, group: str) -> None:
    pairs = [(response, gold) for gold, response in GROUPS[group]]
    verdicts = grader.grade_many(pairs)
    gamed = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict == "correct"]
    blamed = [
        (pair, verdict)
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.verdict in ("error", "gold_unreadable")
    ]
    assert not gamed
    assert not blamed
    assert all(len(verdict.extracted) <= MAX_ANSWER_CHARS for verdict in verdicts)


def test_the_gold_answers_of_the_hostile_responses_are_accepted_when_given_plainly(grader: Grader) -> None:
    """The twin: what is refused above is refused for the response's sake."""
    golds = sorted({gold for pairs in GROUPS.values() for gold, _ in pairs})
    verdicts = grader.grade_many([(rf"so $\boxed{{{gold}}}$.", gold) for gold in golds])
    assert {gold: verdict.verdict for gold, verdict in zip(golds, verdicts, strict=True)} == dict.fromkeys(
        golds, "correct"
    )
