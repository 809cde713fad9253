"""How the audit's generators write numbers, and the case that each of them makes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass
class Case:
    """A gold answer with answers to it.

    Attributes:
        gold: as a data set writes it.
        right, wrong: (how it was written or changed, text).
    """

    gold: str
    right: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)


def frac(value: Fraction, command: str = r"\frac") -> str:
    """A fraction in LaTeX; a whole number without a bar."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}{command}{{{abs(value.numerator)}}}{{{value.denominator}}}"


def signed(value: int, unit: str = "") -> str:
    """With its sign in front; 1 in front of a unit is not written."""
    size = "" if unit and abs(value) == 1 else str(abs(value))
    return ("-" if value < 0 else "+") + size + unit


def term(value: int, unit: str) -> str:
    """As :func:`signed`, without a plus."""
    return signed(value, unit).removeprefix("+")


def grouped(digits: str, separator: str) -> str:
    """Thousands apart."""
    head = len(digits) % 3
    parts = ([digits[:head]] if head else []) + [digits[i : i + 3] for i in range(head, len(digits), 3)]
    return separator.join(parts)


def other_digit(digits: str, draw: random.Random, *, keep_first: bool = False) -> str:
    """One digit changed; never to a leading zero."""
    place = draw.randrange(1 if keep_first and len(digits) > 1 else 0, len(digits))
    choices = [d for d in "0123456789" if d != digits[place] and (place or d != "0" or len(digits) == 1)]
    return digits[:place] + draw.choice(choices) + digits[place + 1 :]
