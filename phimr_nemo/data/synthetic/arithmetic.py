"""Arithmetic as a list of steps: evaluation, written form, and a canonical form that ignores wording.

A step is `(left, operation, right)`; an operand is an integer or `"#i"`, the result of step `i`. The
steps of `(37+48)*3` are `[[37, "+", 48], ["#0", "*", 3]]`. The last step gives the answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Final

Operand = int | str
Step = tuple[Operand, str, Operand]

OPERATIONS: Final[Mapping[str, Callable[[int, int], int]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}
REFERENCE: Final = "#"


def value_of(operand: Operand, results: Sequence[int]) -> int:
    """The integer an operand stands for, given the results of the steps before it."""
    if isinstance(operand, int):
        return operand
    return results[int(operand.removeprefix(REFERENCE))]


def evaluate(steps: Sequence[Step]) -> list[int]:
    """The result of every step, in order."""
    results: list[int] = []
    for left, operation, right in steps:
        results.append(OPERATIONS[operation](value_of(left, results), value_of(right, results)))
    return results


def canonical(steps: Sequence[Step]) -> str:
    """One text for every way to write the same calculation.

    Sums are flattened to sorted signed terms and products to sorted factors, so `37+48-12`,
    `48-12+37` and a word problem about them are the same.
    """
    return _canonical_operand(f"{REFERENCE}{len(steps) - 1}", steps)


def _canonical_operand(operand: Operand, steps: Sequence[Step]) -> str:
    if isinstance(operand, int):
        return str(operand)
    operation = steps[int(operand.removeprefix(REFERENCE))][1]
    if operation == "*":
        return "*".join(sorted(_factors(operand, steps)))
    return "(" + "".join(sorted(_signed_terms(operand, steps, "+"))) + ")"


def _factors(operand: Operand, steps: Sequence[Step]) -> list[str]:
    if isinstance(operand, str):
        left, operation, right = steps[int(operand.removeprefix(REFERENCE))]
        if operation == "*":
            return _factors(left, steps) + _factors(right, steps)
    return [_canonical_operand(operand, steps)]


def _signed_terms(operand: Operand, steps: Sequence[Step], sign: str) -> list[str]:
    if isinstance(operand, str):
        left, operation, right = steps[int(operand.removeprefix(REFERENCE))]
        if operation in "+-":
            flipped = {"+": "-", "-": "+"}[sign]
            right_sign = sign if operation == "+" else flipped
            return _signed_terms(left, steps, sign) + _signed_terms(right, steps, right_sign)
    return [sign + _canonical_operand(operand, steps)]
