"""The table of the audit's classes, and the pairs that they make."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import audit_constants as constants
import audit_functions as functions
import audit_numbers as numbers
import audit_shapes as shapes
import audit_structures as structures
from audit_truth import same_function, same_number
from audit_write import Case

FRAMES: Final = (
    r"Therefore the answer is $\boxed{%s}$.",
    r"\[ \boxed{%s} \]",
    r"So we get $\boxed{%s}$, which is the final answer.",
)
MAX_DRAWS: Final = 20
"""Cases drawn in a row without a new pair before a class is taken to be exhausted."""
Same = Callable[[str, str], bool]
CLASSES: Final[dict[str, tuple[Callable[[random.Random], Case], Same]]] = {
    "integers": (numbers.integers, same_number),
    "powers and tiny numbers": (numbers.powers, same_number),
    "rationals": (numbers.rationals, same_number),
    "decimals": (numbers.decimals, same_number),
    "surds": (numbers.surds, same_number),
    "logarithms, e and pi": (constants.logs, same_number),
    "trigonometric values": (constants.trigonometric, same_number),
    "complex numbers": (constants.complexes, same_number),
    "factorials and binomials": (constants.counting, same_number),
    "polynomials": (functions.polynomials, same_function),
    "high powers of x": (functions.sparse, same_function),
    "identities": (functions.identities, same_function),
    "floors and parity": (functions.floors, same_function),
    "residues": (functions.residues, shapes.same_residue),
    "equations": (functions.equations, shapes.same_equation),
    "circles": (functions.circles, shapes.same_equation),
    "tuples": (structures.tuples, shapes.same_tuple),
    "sets and lists": (structures.sets, shapes.same_set),
    "intervals": (structures.intervals, shapes.same_intervals),
    "matrices": (structures.matrices, shapes.same_matrix),
    "units": (structures.units, shapes.same_quantity),
    "percents and scale words": (structures.percents, shapes.same_amount),
    "bases": (structures.bases, shapes.same_based),
    "choices": (structures.choices, shapes.same_choice),
    "two candidates": (constants.two_candidates, shapes.same_alone),
}
"""Class -> what makes it, and what reads the truth from the text."""


@dataclass(frozen=True)
class Pair:
    """A gold answer and a response with a truth.

    Attributes:
        kind: its class.
        change: how a right answer is written, or what was changed in a wrong one.
        gold: the gold answer.
        answer: the final answer.
        response: a response that ends in it.
        correct: the truth.
    """

    kind: str
    change: str
    gold: str
    answer: str
    response: str
    correct: bool


class WrongTruth(Exception):
    """A generator says another thing about a pair than the independent reader."""


def make_pairs(kind: str, count: int, seed: int) -> Iterator[Pair]:
    """Distinct pairs of a class, each with its truth read again from the text.

    Args:
        kind: of `CLASSES`.
        count: at most so many; a small class is exhausted before.
        seed: of the drawing.

    Raises:
        WrongTruth: the generator errs.
    """
    generate, same = CLASSES[kind]
    draw = random.Random(f"{kind} {seed}")
    seen: set[tuple[str, str]] = set()
    idle = 0
    while len(seen) < count and idle < MAX_DRAWS:
        before = len(seen)
        case = generate(draw)
        for correct, written in ((True, case.right), (False, case.wrong)):
            for change, text in written:
                if (case.gold, text) in seen or len(seen) >= count:
                    continue
                seen.add((case.gold, text))
                yield checked(Pair(kind, change, case.gold, text, draw.choice(FRAMES) % text, correct), same)
        idle = idle + 1 if len(seen) == before else 0


def checked(pair: Pair, same: Same) -> Pair:
    """The pair, when the independent reader agrees about it.

    Raises:
        WrongTruth: it does not.
    """
    if same(pair.gold, pair.answer) != pair.correct:
        raise WrongTruth(
            f"{pair.kind}, {pair.change}: {pair.answer} is not {'right' if pair.correct else 'wrong'} for {pair.gold}"
        )
    return pair
