r"""Determinants as people write them, and their values: ``\begin{vmatrix}1&2\\3&4\end{vmatrix}`` is -2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from phimr_nemo.verify.read.quantity import parse_number

MAX_ROWS: Final = 8
MAX_SYMBOLIC_ROWS: Final = 4
MAX_SYMBOLIC_CHARS: Final = 200
"""Of all entries together: a determinant of expressions is written out, each entry up to six times."""
_DETERMINANT = re.compile(
    r"\\begin\{vmatrix\}(?P<bars>(?:(?!\\begin).)*?)\\end\{vmatrix\}"
    r"|\|\s*\\begin\{(?P<inner>matrix|array)\}(?:\s*\{[lcr\s]*\})?(?P<between>(?:(?!\\begin).)*?)"
    r"\\end\{(?P=inner)\}\s*\|"
    r"|\\det(?![a-zA-Z])\s*\(?\s*\\begin\{(?P<kind>[pb]?matrix)\}(?P<of>(?:(?!\\begin).)*?)\\end\{(?P=kind)\}\s*\)?",
    re.DOTALL,
)


def with_values(text: str) -> str:
    """Canonical text with the value of every determinant in its place; one that is not square stays as it is."""
    return _DETERMINANT.sub(_value, text) if "matrix" in text or "array" in text else text


def _value(match: re.Match[str]) -> str:
    if match.group().startswith(r"\det") and match.group().count("(") != match.group().count(")"):
        return match.group()
    body = match["bars"] or match["between"] or match["of"] or ""
    lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", body) if line.strip()]
    rows = [[cell.strip() for cell in line.split("&")] for line in lines]
    if not 0 < len(rows) <= MAX_ROWS or any(len(row) != len(rows) or not all(row) for row in rows):
        return match.group()
    numbers = [[parse_number(cell.replace(" ", "")) for cell in row] for row in rows]
    known = [[cell.value for cell in row if cell is not None] for row in numbers]
    if all(len(row) == len(rows) for row in known):
        value = _number(known)
        text = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        return text if match.span() == (0, len(match.string)) else f"({text})"
    if len(rows) > MAX_SYMBOLIC_ROWS or sum(len(cell) for row in rows for cell in row) > MAX_SYMBOLIC_CHARS:
        return match.group()
    return f"({_expanded(rows)})"


def _number(rows: Sequence[Sequence[Fraction]]) -> Fraction:
    """By expansion along the first row; small matrices only."""
    if len(rows) == 1:
        return rows[0][0]
    return sum(
        (
            (-1) ** place * entry * _number([[*row[:place], *row[place + 1 :]] for row in rows[1:]])
            for place, entry in enumerate(rows[0])
            if entry
        ),
        Fraction(0),
    )


def _expanded(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) == 1:
        return f"({rows[0][0]})"
    minors = [_expanded([[*row[:place], *row[place + 1 :]] for row in rows[1:]]) for place in range(len(rows))]
    terms = [
        rf"{'-' if place % 2 else '+'}({entry})\cdot ({minor})"
        for place, (entry, minor) in enumerate(zip(rows[0], minors, strict=True))
        if entry != "0"
    ]
    return "".join(terms).removeprefix("+") or "0"
