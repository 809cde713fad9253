"""What the grader says about one response, and the bounds it works under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phimr_nemo.store.records import VerdictName

MATH_VERIFY_VERSION: Final = "0.9.0"
POLICY_VERSION: Final = "4"
GRADER_VERSION: Final = f"phimr-{POLICY_VERSION}+math-verify-{MATH_VERIFY_VERSION}"

MAX_ANSWER_CHARS: Final = 2048
"""A longer final answer is never looked at: no answer of the supported sources is half as long."""


@dataclass(frozen=True)
class Verdict:
    """The grader's judgement of one response.

    Attributes:
        verdict: "correct"; "wrong"; "unparsable" (no final answer, or one that is no mathematics);
            "timeout" (not decided within the limits); "error" (the gold answer is empty or too long, or the
            grader failed on the pair); "gold_unreadable" (the gold answer is no mathematics). The last three
            say nothing about the response.
        extracted: the final answer found in the response, at most `MAX_ANSWER_CHARS` characters.
        reason: how the verdict came about, for people and for counting.
    """

    verdict: VerdictName
    extracted: str
    reason: str


class Unparsable(Exception):
    """An answer that is no mathematics within the bounds.

    Args:
        side: whose answer it is, "answer" (the gold one) or "response".
        problem: what is wrong with it.
    """

    def __init__(self, side: str, problem: str) -> None:
        super().__init__(side, problem)
        self.side, self.problem = side, problem


class NeedsWorker(Exception):
    """Raised where a decision needs math-verify, which runs only in a worker process."""
