r"""The shape of an answer: list, set, tuple or interval, union, matrix, equation, or a single expression.

Parsing is string work with bounded depth on canonical text (:mod:`phimr_nemo.verify.read.normalise`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

MAX_NESTING: Final = 24
MAX_ITEMS: Final = 512


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
    """A tuple, vector or interval: ordered values between an opening and a closing bracket."""

    opening: str
    closing: str
    items: tuple[Node, ...]


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
class Equation:
    """``left = right``; in a chain `left` is the first part and `right` the last exact one.

    `rounded` is a part that follows an approximation sign, if any.
    """

    left: str
    right: str
    rounded: str = ""


Node: TypeAlias = Leaf | Items | SetOf | Sequence | Union | Matrix | Equation


class Malformed(ValueError):
    """Brackets that do not match, or nesting or a number of items beyond the bounds."""


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN: Final = frozenset(["(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"])
_CLOSE: Final = {
    ")": "([", "]": "([", "}": "{", r"\}": (r"\{",), r"\rangle": (r"\langle",), r"\end": (r"\begin",),
    r"\rfloor": (r"\lfloor",), r"\rceil": (r"\lceil",),
}  # fmt: skip
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|smallmatrix|array)\}(.*)\\end\{\1\}", re.DOTALL)
_ARRAY_COLUMNS = re.compile(r"^\s*\{[lcr|\s]*\}")
_NAME = r"(?:\\?[A-Za-z]+'*(?:_\{?[0-9A-Za-z]+\}?)?)"
_MEMBERSHIP = re.compile(rf"^\s*{_NAME}\s*\\in\s+(?=[\[(\\{{])|^\s*{_NAME}\s*\\in(?=[\[(\\{{])")
_RELATION = re.compile(r"\\leq|\\geq|\\neq|\\approx|\\equiv|<|>|=")
_VARIABLE = re.compile(rf"^\s*{_NAME}\s*$")
_REALS = re.compile(r"\\mathbb\{R\}|\\mathbb\s*R|\\Re(?![a-zA-Z])|\\text\{all real numbers\}")
_REALS_WITHOUT = re.compile(
    r"^\(-\\infty,\\infty\)\s*(?:\\setminus|\\backslash|\\text\{\s*except\s*\}|-)\s*\\\{(.*)\\\}$"
)
_FUSED_TUPLES = re.compile(r"\)\s*\(")


def check_balance(text: str) -> None:
    """Raise :class:`Malformed` unless every bracket is closed by one that may close it, within the bound on depth."""
    split_top(text, frozenset())


def split_top(text: str, separators: frozenset[str]) -> list[str]:
    """Split at separators outside all brackets.

    Raises:
        Malformed: unbalanced or too deeply nested brackets.
    """
    stack: list[str] = []
    parts, start = [], 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _OPEN:
            stack.append(token)
            if len(stack) > MAX_NESTING:
                raise Malformed(f"nested deeper than {MAX_NESTING}")
        elif token in _CLOSE:
            if not stack or stack[-1] not in _CLOSE[token]:
                raise Malformed("unbalanced brackets")
            stack.pop()
        elif not stack and token in separators:
            parts.append(text[start : match.start()])
            start = match.end()
    if stack:
        raise Malformed("unbalanced brackets")
    parts.append(text[start:])
    if len(parts) > MAX_ITEMS:
        raise Malformed(f"more than {MAX_ITEMS} items")
    return parts


def parse(text: str, depth: int = 0) -> Node:
    """The structure of a canonical answer.

    Raises:
        Malformed: unbalanced brackets, or an answer beyond the bounds.
    """
    if depth > MAX_NESTING:
        raise Malformed(f"nested deeper than {MAX_NESTING}")
    text = _MEMBERSHIP.sub("", _REALS.sub(r"(-\\infty,\\infty)", text)).strip()
    without = _REALS_WITHOUT.match(text)
    if without:
        text = _reals_without(without.group(1))
    for separators, build in ((frozenset([r"\cup", r"\lor"]), _union), (frozenset(",;"), _items)):
        parts = [part for part in split_top(_words_to_separators(text), separators) if part.strip()]
        if len(parts) > 1:
            return build([parse(part, depth + 1) for part in parts])
    text = _words_to_separators(text).strip(" ,;")
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    matrix = _MATRIX.fullmatch(text)
    if matrix and matrix.group(2).count(r"\begin") == 0:
        return _matrix(matrix.group(1), matrix.group(2), depth)
    related = _related(text, depth)
    if related is not None:
        return related
    if r"\pm" in text or r"\mp" in text:
        plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
        minus = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return Items((Leaf(_no_leading_plus(plus)), Leaf(minus.strip())))
    return Leaf(text)


def _words_to_separators(text: str) -> str:
    """``\\text{or}`` between inequalities is a union, every other "and"/"or" separates the items of a list."""
    if r"\text{" not in text:
        return text
    inequality = re.search(r"<|>|\\leq|\\geq|\\in(?![a-zA-Z])", text)
    text = re.sub(r",?\s*\\text\{or\}", r" \\lor " if inequality else ",", text)
    return re.sub(r",?\s*\\text\{and\}", ",", text)


def _no_leading_plus(text: str) -> str:
    return text.strip().removeprefix("+").strip()


def _union(nodes: list[Node]) -> Node:
    flat = [inner for node in nodes for inner in (node.items if isinstance(node, Union) else (node,))]
    return Union(tuple(flat))


def _items(nodes: list[Node]) -> Node:
    flat = [inner for node in nodes for inner in (node.items if isinstance(node, Items) else (node,))]
    return Items(tuple(flat))


def _reals_without(points: str) -> str:
    """The reals without finitely many points, as a union of open intervals in the order given."""
    ends = [r"-\infty", *(part.strip() for part in split_top(points, frozenset(","))), r"\infty"]
    return r" \cup ".join(f"({left},{right})" for left, right in pairwise(ends))


def _bracketed(text: str, depth: int) -> Node | None:
    """What stands between brackets that enclose the whole text, or None."""
    for opening, closing in (
        (r"\{", r"\}"),
        ("{", "}"),
        (r"\langle", r"\rangle"),
        ("(", ")"),
        ("[", "]"),
        ("(", "]"),
        ("[", ")"),
    ):
        if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
            continue
        inner = text[len(opening) : -len(closing)]
        try:
            parts = split_top(_words_to_separators(inner), frozenset(",;"))
        except Malformed:
            return _fused_tuples(text, depth)
        if opening in (r"\{", "{"):
            if opening == r"\{" and re.search(r"\||\\mid|:", inner):
                return None
            if opening == "{" and len(parts) == 1:
                return parse(inner, depth + 1)
            nodes = _items([parse(part, depth + 1) for part in parts if part.strip()])
            return SetOf(nodes.items) if isinstance(nodes, Items) else SetOf((nodes,))
        if len(parts) == 1:
            return parse(inner, depth + 1) if (opening, closing) in (("(", ")"), ("[", "]")) else None
        if opening == r"\langle":
            opening, closing = "(", ")"
        return Sequence(opening, closing, tuple(parse(part, depth + 1) for part in parts))
    return None


def _fused_tuples(text: str, depth: int) -> Node | None:
    """``(1,2)(3,4)``: tuples written one after the other without a comma."""
    parts = [part for part in split_top(_FUSED_TUPLES.sub("),(", text), frozenset(",")) if part.strip()]
    if len(parts) > 1 and all("," in part and part.startswith("(") and part.endswith(")") for part in parts):
        return _items([parse(part, depth + 1) for part in parts])
    return None


def _matrix(environment: str, body: str, depth: int) -> Matrix:
    body = _ARRAY_COLUMNS.sub("", body)
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", body.replace(r"\hline", "")) if row.strip()]
    if sum(row.count("&") + 1 for row in rows) > MAX_ITEMS:
        raise Malformed(f"more than {MAX_ITEMS} entries")
    entries = tuple(tuple(parse(cell, depth + 1) for cell in row.split("&")) for row in rows)
    return Matrix(entries, bars=environment.startswith("v"))


def _related(text: str, depth: int) -> Node | None:
    """An equation, or an inequality in one variable as the interval it means."""
    parts = split_top(text, frozenset(["=", "<", ">", r"\leq", r"\geq", r"\approx"]))
    if len(parts) < 2 or not parts[-1].strip():
        return None
    operators = _top_operators(text, parts)
    if all(operator in ("=", r"\approx") for operator in operators):
        exact = [part for index, part in enumerate(parts) if index == 0 or operators[index - 1] == "="]
        rounded = next((parts[i + 1] for i, operator in enumerate(operators) if operator == r"\approx"), "")
        if len(exact) == 1:
            value = parts[-1] if _VARIABLE.match(parts[0]) else parts[0]
            return Equation(parts[0].strip(), value.strip(), parts[-1].strip())
        return Equation(parts[0].strip(), exact[-1].strip(), rounded.strip())
    return _interval(parts, operators, depth)


def _top_operators(text: str, parts: list[str]) -> list[str]:
    operators, position = [], 0
    for part in parts[:-1]:
        position += len(part)
        match = _RELATION.match(text, position)
        operators.append(match.group() if match else "")
        position = match.end() if match else position
    return operators


def _interval(parts: list[str], operators: list[str], depth: int) -> Node | None:
    r"""``a < x \leq b`` as (a, b], ``x > a`` as (a, \infty); None when it is no bound on one variable."""
    if any(operator not in ("<", ">", r"\leq", r"\geq") for operator in operators):
        return None
    if len(parts) == 2:
        left, right = parts
        operator = operators[0]
        if not _VARIABLE.match(left):
            left, right = right, left
            operator = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}[operator]
        if not _VARIABLE.match(left) or _VARIABLE.match(right):
            return None
        bound = parse(right, depth + 1)
        if operator in (">", r"\geq"):
            return Sequence("(" if operator == ">" else "[", ")", (bound, Leaf(r"\infty")))
        return Sequence("(", ")" if operator == "<" else "]", (Leaf(r"-\infty"), bound))
    if len(parts) == 3 and _VARIABLE.match(parts[1]):
        low, high = parts[0], parts[2]
        first, second = operators
        if first in (">", r"\geq") and second in (">", r"\geq"):
            low, high, first, second = high, low, second.replace(">", "<"), first.replace(">", "<")
            first, second = first.replace(r"\geq", r"\leq"), second.replace(r"\geq", r"\leq")
        if first in ("<", r"\leq") and second in ("<", r"\leq"):
            ends = (parse(low, depth + 1), parse(high, depth + 1))
            return Sequence("(" if first == "<" else "[", ")" if second == "<" else "]", ends)
    return None
