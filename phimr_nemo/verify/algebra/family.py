r"""Families with an integer parameter, such as the solutions ``\frac{\pi}{4}+k\pi`` of an equation."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

from phimr_nemo.verify.algebra.equal import decimal_value, equal, substituted
from phimr_nemo.verify.algebra.term import Term, Undecided, has, number, renamed, symbols

PARAMETERS: Final = frozenset("knmljtN")
PERIOD_BITS: Final = 200


def same_family(gold: Term, predicted: Term, *, marked: bool) -> bool:
    r"""Whether two expressions run through the same values while their parameters run through the integers.

    Args:
        gold: an expression ``a + b k``.
        predicted: another one; its parameter may have another name.
        marked: whether the parameter is said to be an integer (``k \in \mathbb{Z}``); else they must be equal but for
            its name, and the step a multiple of pi.

    Raises:
        Undecided: as :func:`equal`.
    """
    ours, theirs = (_parameter(term) for term in (gold, predicted))
    if not ours or not theirs:
        return False
    if not marked:
        if ours == theirs or not (_is_periodic(gold, ours) and _is_periodic(predicted, theirs)):
            return False
        return equal(gold, renamed(predicted, {theirs: ours}))
    first, second = _line(gold, ours), _line(predicted, theirs)
    if first is None or second is None:
        return False
    try:
        same_step = equal(first[1], second[1]) or equal(first[1], Term("neg", (second[1],)))
    except Undecided:
        return False
    if not same_step:
        return False
    shift = Term("div", (Term("add", (first[0], Term("neg", (second[0],)))), first[1]))
    value = decimal_value(shift, PERIOD_BITS)
    if value is None:
        return False
    whole = round(value)
    try:
        return abs(value - whole) < Fraction(1, 1 << (PERIOD_BITS // 2)) and equal(shift, number(whole))
    except Undecided:
        return False


def _parameter(term: Term) -> str:
    """The one variable of an expression, if it may stand for an integer."""
    names = symbols(term)
    name = next(iter(names)) if len(names) == 1 else ""
    return name if name in PARAMETERS else ""


def _is_periodic(term: Term, name: str) -> bool:
    line = _line(term, name)
    return line is not None and has(line[1], "pi")


def _line(term: Term, name: str) -> tuple[Term, Term] | None:
    """``(a, b)`` of an expression ``a + b name``; None for any other, and for a step of zero."""
    start, one, two = (substituted(term, {name: Fraction(value)}) for value in (0, 1, 2))
    step = Term("add", (one, Term("neg", (start,))))
    try:
        if not equal(step, Term("add", (two, Term("neg", (one,))))) or equal(step, number(0)):
            return None
    except Undecided:
        return None
    return start, step
