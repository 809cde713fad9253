"""A grader that a model of random weights satisfies now and then: an even number of characters."""

from __future__ import annotations

from phimr_nemo.verify import Verdict


def even(response: str, answer: str) -> Verdict:
    return Verdict("wrong" if len(response) % 2 else "correct", answer, "by length")
