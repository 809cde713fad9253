"""The second domain's grader: `grader=recipes.ablations.rewriting_grader:grade`. Needs reasoning-gym."""

from __future__ import annotations

import importlib
from typing import Any, Final

from phimr_nemo.verify import Verdict

FAMILY: Final = "ab"
BOX: Final = "\\boxed{"
RIGHT: Final = 1.0

_score: Final[Any] = importlib.import_module("reasoning_gym").get_score_answer_fn(FAMILY)


def grade(response: str, answer: str) -> Verdict:
    """Ask reasoning-gym's verifier about the last box of a response.

    Args:
        response: of a model.
        answer: what is left of the program.
    """
    _, opened, after = response.rpartition(BOX)
    box, closed, _ = after.partition("}")
    if not opened or not closed:
        return Verdict("unparsable", "", "no box")
    given = " ".join(box.split())
    right = _score(given, {"answer": answer}) == RIGHT
    return Verdict("correct" if right else "wrong", given, "reasoning-gym's verifier")
