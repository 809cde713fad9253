"""Graders that err at known rates, for the tiny preset's integer answers.

`grader=recipes.ablations.erring_grader:NAME`. ``exact`` accepts a response whose last box holds the answer's integer,
and nothing else. ``missed_P`` rejects P % of what ``exact`` accepts; a hash of response and answer decides which, so
that a response is always graded alike. ``hole_N`` accepts every multiple of N besides: a form that the policy can
learn to write without solving anything, and the rarer in what it writes to begin with, the larger N is. ``anything``
accepts every response.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Final

from phimr_nemo.store.content import content_seed
from phimr_nemo.verify import Verdict

BOX: Final = re.compile(r"\\boxed\{(-?[0-9]{1,18})\}")
"""An integer of at most 18 digits in a box."""
SCALE: Final = 1_000_000
"""Steps of a share that a hash is compared with."""


def grade(response: str, answer: str, *, missed: float = 0.0, hole: int | None = None) -> Verdict:
    """Grade by the last box of a response, with errors.

    Args:
        response: of a model.
        answer: an integer.
        missed: share of correct responses that are rejected, 0 to 1.
        hole: multiples of it are accepted whatever the answer.
    """
    boxes = BOX.findall(response)
    if not boxes:
        return Verdict("unparsable", "", "no integer in a box")
    given: str = boxes[-1]
    if int(given) == int(answer):
        if content_seed("missed", response, answer) % SCALE < missed * SCALE:
            return Verdict("wrong", given, "a false negative made on purpose")
        return Verdict("correct", given, "the same integer")
    if hole is not None and int(given) % hole == 0:
        return Verdict("correct", given, "a false positive made on purpose")
    return Verdict("wrong", given, "another integer")


def anything(response: str, answer: str) -> Verdict:
    """Accept every response: verification is off."""
    return Verdict("correct", answer, f"{len(response)} characters are accepted unread")


exact: Final = partial(grade)
missed_1: Final = partial(grade, missed=0.01)
missed_5: Final = partial(grade, missed=0.05)
missed_20: Final = partial(grade, missed=0.20)
hole_20: Final = partial(grade, hole=20)
hole_50: Final = partial(grade, hole=50)
hole_125: Final = partial(grade, hole=125)
