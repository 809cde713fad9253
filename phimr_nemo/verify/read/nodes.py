"""What an answer may be: a single expression, a list, set, tuple, interval, union, matrix, cases, or an equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Leaf:
    """One expression, number, word or letter."""

    text: str


@dataclass(frozen=True)
class Items:
    """Values in no particular order: a bare list, or both values of a plus-minus."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class SetOf:
    """A set in braces."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Sequence:
    """A tuple, vector or interval: ordered values between an opening and a closing bracket.

    `variable` is what an interval bounds, where it was written as an inequality.
    """

    opening: str
    closing: str
    items: tuple[Node, ...]
    variable: str = ""


@dataclass(frozen=True)
class Union:
    """A union of sets or intervals."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries; `bars` marks a determinant."""

    rows: tuple[tuple[Node, ...], ...]
    bars: bool = False


@dataclass(frozen=True)
class Piecewise:
    """Values with their conditions."""

    rows: tuple[tuple[Node, Node], ...]


@dataclass(frozen=True)
class Equation:
    """``left = right``; in a chain `left` is the first part, `right` the last exact one, `between` the others.

    `rounded` is a part that follows an approximation sign, if any.
    """

    left: str
    right: str
    rounded: str = ""
    between: tuple[str, ...] = ()


Node: TypeAlias = Leaf | Items | SetOf | Sequence | Union | Matrix | Piecewise | Equation
