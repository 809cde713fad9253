"""No hostile response is graded correct, breaks a worker, or takes the blame off the response.

tests/golden/verify_hostile.jsonl holds them by kind: two candidates in one box in any disguise, tautologies, echoes
of the prompt, numbers (huge, tiny, almost equal, not a number), look-alike characters, commands, forged turns and
thoughts, units.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from phimr_nemo.verify import Grader
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

MIN_RESPONSES = 300
CASES = Path(__file__).resolve().parents[1] / "golden" / "verify_hostile.jsonl"


def hostile() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (response, gold answer) each."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for line in CASES.read_text("utf-8").splitlines():
        row = json.loads(line)
        kinds.setdefault(row["kind"], []).append((row["response"], row["answer"]))
    return kinds


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1) as made:
        yield made


def test_there_are_many_different_ones() -> None:
    assert len({pair for pairs in hostile().values() for pair in pairs}) >= MIN_RESPONSES


@pytest.mark.parametrize("kind", hostile())
def test_no_hostile_response_is_correct(grader: Grader, kind: str) -> None:
    pairs = hostile()[kind]
    verdicts = grader.grade_many(pairs)
    assert not [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict == "correct"]
    blamed = ("error", "gold_unreadable")
    assert not [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict in blamed]
    assert all(len(verdict.extracted) <= MAX_ANSWER_CHARS for verdict in verdicts)


def test_their_gold_answers_are_accepted_when_given_plainly(grader: Grader) -> None:
    """The twin: what is refused above is refused for the response's sake."""
    golds = sorted({gold for pairs in hostile().values() for _, gold in pairs})
    verdicts = grader.grade_many([(rf"so $\boxed{{{gold}}}$.", gold) for gold in golds])
    found = {gold: verdict.verdict for gold, verdict in zip(golds, verdicts, strict=True)}
    assert found == dict.fromkeys(golds, "correct")
