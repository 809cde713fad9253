"""Intervals that are written in another way: bounds on a modulus, and intervals without some points."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final

from phimr_nemo.verify.read.brackets import split_top
from phimr_nemo.verify.read.nodes import Leaf, Node, Sequence, Union
from phimr_nemo.verify.read.quantity import parse_number

MODULUS: Final = re.compile(r"\s*\|\s*(?P<name>[a-y])\s*(?:(?P<sign>[-+])\s*(?P<shift>[^|]+))?\|\s*")
"""Of a real variable, perhaps minus a number; capitals are lengths, and z is complex by convention."""


def around(modulus: re.Match[str], operator: str, bound: str) -> Node | None:
    r"""``|x - c| < a`` as (c - a, c + a), ``|x| \geq a`` as two rays, for numbers c and a > 0; else None."""
    radius = parse_number(bound.replace(" ", ""))
    shift = parse_number((modulus["shift"] or "0").replace(" ", ""))
    if radius is None or shift is None or radius.value <= 0:
        return None
    middle = -shift.value if modulus["sign"] == "+" else shift.value
    low, high = (
        Leaf(rf"\frac{{{end.numerator}}}{{{end.denominator}}}")
        for end in (middle - radius.value, middle + radius.value)
    )
    name = modulus["name"]
    if operator in ("<", r"\leq"):
        opening, closing = ("(", ")") if operator == "<" else ("[", "]")
        return Sequence(opening, closing, (low, high), name)
    opening, closing = ("(", ")") if operator == ">" else ("[", "]")
    below = Sequence("(", closing, (Leaf(r"-\infty"), low), name)
    return Union((below, Sequence(opening, ")", (high, Leaf(r"\infty")), name)))


def without_points(opening: str, low: str, high: str, closing: str, points: str) -> str:
    """An interval without finitely many points, as a union of intervals; points that are numbers are put in order."""
    found = [part.strip() for part in split_top(points, frozenset(",")) if part.strip()]
    numbers = [parse_number(part.replace(" ", "")) for part in found]
    if all(numbers):
        found = [
            part
            for _, part in sorted((number.value, part) for number, part in zip(numbers, found, strict=True) if number)
        ]
    ends = [low.strip(), *found, high.strip()]
    parts = [f"({left},{right})" for left, right in pairwise(ends)]
    parts[0], parts[-1] = opening + parts[0][1:], parts[-1][:-1] + closing
    if len(parts) == 1:
        return f"{opening}{ends[0]},{ends[-1]}{closing}"
    return r" \cup ".join(parts)
