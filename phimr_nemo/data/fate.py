"""What becomes of a rollout in curation: kept, or the one reason why not."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

MAX_CANDIDATES: Final = 32
"""Right, and wrong, responses of one question that are compared with each other: the work is their product."""


class Fate(IntEnum):
    """What becomes of a rollout, or of a problem where prompts are chosen."""

    KEPT = 0
    WRONG = 1
    UNPARSABLE = 2
    TIMEOUT = 3
    ERROR = 4
    CUT_OFF = 5
    SPECIAL_TOKEN = 6
    DUPLICATE = 7
    OVER_LIMIT = 8
    OTHER_DIFFICULTY = 9
    REPETITIVE = 10
    NOT_ONE_BOX = 11
    BALANCE = 12
    UNGRADED = 13
    BLANK = 14
    NO_RIGHT = 15
    NO_WRONG = 16
    TOO_MANY = 17
    UNLIKE_LENGTHS = 18
    NO_PARTNER = 19
    TOO_EASY = 20
    TOO_HARD = 21
    FEW_SAMPLES = 22
    UNEVEN = 23
    GOLD_UNREADABLE = 24
    TOO_LONG = 25
    CAPPED = 26
    VOTED_GOLD = 27
    RIGHT = 28
    OTHER_TEACHER = 29
    NO_STRONG = 30
    NO_WEAK = 31

    @property
    def reason(self) -> str:
        """In words, for manifests and reports."""
        return REASONS[self]


REASONS: Final[dict[Fate, str]] = {
    Fate.KEPT: "kept",
    Fate.WRONG: "verdict wrong",
    Fate.UNPARSABLE: "verdict unparsable",
    Fate.TIMEOUT: "verdict timeout",
    Fate.ERROR: "verdict error",
    Fate.GOLD_UNREADABLE: "verdict gold_unreadable",
    Fate.VOTED_GOLD: "gold is a vote (voted_golds=false)",
    Fate.CUT_OFF: "cut off",
    Fate.SPECIAL_TOKEN: "special token in text",
    Fate.DUPLICATE: "duplicate response",
    Fate.OVER_LIMIT: "over max_per_problem",
    Fate.OTHER_DIFFICULTY: "other difficulty",
    Fate.REPETITIVE: "repetitive",
    Fate.NOT_ONE_BOX: "not exactly one boxed answer",
    Fate.BALANCE: "balance",
    Fate.UNGRADED: "ungraded",
    Fate.BLANK: "empty response",
    Fate.NO_RIGHT: "problem without correct response",
    Fate.NO_WRONG: "problem without wrong response",
    Fate.TOO_MANY: f"more than {MAX_CANDIDATES} candidates",
    Fate.UNLIKE_LENGTHS: "no partner of like length",
    Fate.NO_PARTNER: "no partner left",
    Fate.TOO_EASY: "prompt too easy",
    Fate.TOO_HARD: "prompt too hard",
    Fate.FEW_SAMPLES: "prompt with too few graded responses",
    Fate.UNEVEN: "prompt of uneven length",
    Fate.TOO_LONG: "longer than max_tokens",
    Fate.CAPPED: "over a cap",
    Fate.RIGHT: "verdict correct, of the weak teacher",
    Fate.OTHER_TEACHER: "of neither teacher",
    Fate.NO_STRONG: "problem without response of the strong teacher",
    Fate.NO_WEAK: "problem without response of the weak teacher",
}
