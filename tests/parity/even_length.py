"""A grader that an untrained model can please, in the grader's own processes."""

from __future__ import annotations

from phimr_nemo.verify import Verdict


def grade(response: str, answer: str) -> Verdict:
    """Right when the response has an even number of characters."""
    return Verdict("wrong" if len(response) % 2 else "correct", response[:10], "its length")
