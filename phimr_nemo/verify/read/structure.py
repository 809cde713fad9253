r"""The shape of an answer: list, set, tuple or interval, union, matrix, equation, or a single expression.

Parsing is string work with bounded depth on canonical text (:mod:`phimr_nemo.verify.read.normalise`).
"""

from __future__ import annotations

import re
from typing import Final

from phimr_nemo.verify.read.brackets import MAX_ITEMS, MAX_NESTING, Malformed, split_top
from phimr_nemo.verify.read.intervals import MODULUS, around, without_points
from phimr_nemo.verify.read.nodes import Equation, Items, Leaf, Matrix, Node, Piecewise, Sequence, SetOf, Union
from phimr_nemo.verify.read.quantity import parse_number

_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|smallmatrix|array)\}(.*)\\end\{\1\}", re.DOTALL)
_ARRAY_COLUMNS = re.compile(r"^\s*\{[lcr|\s]*\}")
_NAME = r"(?:\\?[A-Za-z]+'*(?:_\{?[0-9A-Za-z]+\}?)?)"
_MEMBERSHIP = re.compile(rf"^\s*{_NAME}\s*\\in\s+(?=[\[(\\{{])|^\s*{_NAME}\s*\\in(?=[\[(\\{{])")
_BOUND = re.compile(r"\\leq|\\geq|<|>")
_RELATION = re.compile(r"\\leq|\\geq|\\neq|\\approx|\\equiv|<|>|=")
_VARIABLE = re.compile(rf"^\s*(?:{_NAME}(?:\({_NAME}\))?|\|{_NAME}\|)\s*$")
_REALS = re.compile(r"\\mathbb\{R\}|\\mathbb\s*R|\\Re(?![a-zA-Z])|\\text\{all (?:the )?real(?: number)?s\}")
_POSITIVE_REALS = re.compile(r"\\mathbb\s*\{?R\}?\s*(?:\^\s*\{?\s*\+\s*\}?|_\s*\{?\s*(?:\+|>\s*0)\s*\}?)")
_WITHOUT = re.compile(
    r"^([(\[])([^()\[\]]+),([^()\[\]]+)([)\]])\s*(?:\\setminus|\\backslash|\\text\{\s*except\s*\}|-)\s*\\\{(.*)\\\}$"
)
_BUILDER = re.compile(
    rf"^\\?\{{\s*(?:{_NAME}|\({_NAME}(?:\s*,\s*{_NAME})*\))\s*(?:\\in\s*\(-\\infty,\\infty\)\s*)?(?:\||\\mid(?![a-zA-Z])|:)\s*(?P<condition>.*?)\\?\}}$"
)
_CASES = re.compile(r"^\\begin\{cases\}(.*)\\end\{cases\}$", re.DOTALL)
_AND = re.compile(r",?\s*(?:\\text\{and\}|\\land(?![a-zA-Z])|\\wedge(?![a-zA-Z]))\s*")
_UNEQUAL = re.compile(rf"^\s*({_NAME})\s*\\neq\s*(.+)$")
_SCALED_MATRIX = re.compile(
    r"^(?P<factor>[^=<>&]+?)\s*(?:\\cdot\s*|\\times\s*)?(?P<matrix>\\begin\{([pbB]matrix)\}.*\\end\{\3\})$", re.DOTALL
)
_TRANSPOSED = re.compile(r"\s*\^\s*\{?\s*(?:\\text\{\s*T\s*\}|T|\\top|\\prime)\s*\}?\s*$")
_FUSED_TUPLES = re.compile(r"\)\s*\(")


_ASIDE = re.compile(
    r"\([^()]*\)|_\{(?:[^{}]|\{[^{}]*\})*\}|_[0-9A-Za-z]|\^\{-1\}|\^\{?[0-9]\}?|\\text\{[^{}]*\}|\\[A-Za-z]+"
)
_CONSTANTS: Final = frozenset([r"\pi", r"\infty", r"-\infty", r"\emptyset"])
_TUPLE_OF_NAMES = re.compile(rf"^\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\)$")
_FACTOR = re.compile(r"(?:^|[^A-Za-z'}\])\s])\s*\((?![^()]*,)[^()]*[xyz][^()]*\)")
"""``(x-1)`` that nothing is applied to: a part of an equation about x, and of no name."""


def is_label(left: str) -> bool:
    """Whether the left side of an equation is a name for its right side: a variable, ``f(2)``, ``|AB|``, ``a+b``.

    A number or constant is none, nor a side whose digits make the equation one about x and y (``2x``, ``x^2+y^2``).
    """
    if left.strip() in _CONSTANTS:
        return False
    if _VARIABLE.match(left) or is_tuple_of_names(left):
        return True
    if _FACTOR.search(left):
        return False
    bare = left
    for _ in range(3):
        bare = _ASIDE.sub(" ", bare)
    letters = re.findall(r"[A-Za-z]", bare)
    if not letters and not re.search(r"\\[A-Za-z]+|[A-Za-z]", left):
        return False
    if re.search(r"[0-9]", bare):
        return False
    power = re.search(r"\^\{?[0-9]", left)
    return not (power and set("xyz") & set(letters))


def is_tuple_of_names(left: str) -> bool:
    """Whether the left side of an equation is ``(x, y)`` and the like."""
    return _TUPLE_OF_NAMES.match(left.strip()) is not None


def parse(text: str, depth: int = 0) -> Node:
    """The structure of a canonical answer.

    Raises:
        Malformed: unbalanced brackets, or an answer beyond the bounds.
    """
    if depth > MAX_NESTING:
        raise Malformed(f"nested deeper than {MAX_NESTING}")
    text = _REALS.sub(r"(-\\infty,\\infty)", _POSITIVE_REALS.sub(r"(0,\\infty)", text))
    text = _MEMBERSHIP.sub("", text).strip()
    without = _WITHOUT.match(text)
    if without:
        text = without_points(without[1], without[2], without[3], without[4], without[5])
    built = _BUILDER.match(text)
    if built:
        inner = parse(built["condition"], depth + 1)
        if not isinstance(inner, Leaf):
            return SetOf(inner.items) if isinstance(inner, Items) else inner
    special = _both(text, depth) or _unequal(text, depth) or _punctured(text, depth)
    if special is not None:
        return special
    for separators, build in ((frozenset([r"\cup", r"\lor"]), _union), (frozenset(",;"), _items)):
        parts = [part for part in split_top(_words_to_separators(text), separators) if part.strip()]
        if len(parts) > 1:
            return build([parse(part, depth + 1) for part in parts])
    text = _words_to_separators(text).strip(" ,;")
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    block = _block(text, depth)
    if block is not None:
        return block
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
    if all(isinstance(node, SetOf) for node in flat):
        return SetOf(tuple(dict.fromkeys(item for node in flat if isinstance(node, SetOf) for item in node.items)))
    return Union(tuple(flat))


def _items(nodes: list[Node]) -> Node:
    flat = [inner for node in nodes for inner in (node.items if isinstance(node, Items) else (node,))]
    return Items(tuple(flat))


def _both(text: str, depth: int) -> Node | None:
    r"""``x \geq 1 \text{ and } x \leq 2`` as [1, 2]: two bounds on one variable, both of which hold."""
    parts = _AND.split(text)
    listed = len(parts) == 1
    if listed and _BOUND.search(text):
        parts = split_top(text, frozenset(","))
    if len(parts) != 2 or not all(_BOUND.search(part) for part in parts):
        return None
    names = [[side.strip() for side in _RELATION.split(part) if _VARIABLE.match(side)] for part in parts]
    if [len(found) for found in names] != [1, 1] or names[0] != names[1]:
        return None
    low, high = (parse(part, depth + 1) for part in parts)
    if not (isinstance(low, Sequence) and isinstance(high, Sequence)):
        return None
    if low.items[0] == Leaf(r"-\infty"):
        low, high = high, low
    if low.items[1] != Leaf(r"\infty") or high.items[0] != Leaf(r"-\infty"):
        return None
    both = Sequence(low.opening, high.closing, (low.items[0], high.items[1]), low.variable)
    if not listed:
        return both
    # With a comma alone the numbers tell: bounds that exclude each other are two parts, others hold together.
    ends = [parse_number(end.text.replace(" ", "")) if isinstance(end, Leaf) else None for end in both.items]
    if ends[0] is None or ends[1] is None:
        return None
    return both if ends[0].value < ends[1].value else Union((high, low))


def _unequal(text: str, depth: int) -> Node | None:
    r"""``x \neq 2`` (and other values) as the reals without them."""
    if r"\neq" not in text:
        return None
    parts = [part for part in split_top(_AND.sub(",", text), frozenset(",")) if part.strip()]
    found = [_UNEQUAL.match(part) for part in parts]
    name = found[0][1] if found and found[0] else ""
    values = []
    for part, match in zip(parts, found, strict=True):
        if match and match[1] != name:
            return None
        value = match[2] if match else part
        if not name or _RELATION.search(value) or (not match and not parse_number(value.replace(" ", ""))):
            return None
        values += [value.replace(r"\pm", "-"), value.replace(r"\pm", "")] if r"\pm" in value else [value]
    return parse(without_points("(", r"-\infty", r"\infty", ")", ",".join(values)), depth + 1) if values else None


def _punctured(text: str, depth: int) -> Node | None:
    r"""``x > -1, x \neq 0`` as the interval without the point, where that is a number inside it."""
    parts = [part.strip() for part in split_top(_AND.sub(",", text), frozenset(",")) if part.strip()]
    if len(parts) < 2 or r"\neq" in parts[0]:
        return None
    inside = parse(parts[0], depth + 1)
    points = [_UNEQUAL.match(part) for part in parts[1:]]
    if not (isinstance(inside, Sequence) and inside.variable and all(points)):
        return None
    if any(point and point[1] != inside.variable for point in points):
        return None
    ends = [parse_number(end.text.replace(" ", "")) if isinstance(end, Leaf) else None for end in inside.items]
    values = [parse_number(point[2].replace(" ", "")) for point in points if point]
    for value in values:
        above = value and (ends[0] is None or ends[0].value < value.value)
        if not (above and value and (ends[1] is None or value.value < ends[1].value)):
            return None
    low, high = (end.text for end in inside.items if isinstance(end, Leaf))
    listed = ",".join(point[2] for point in points if point)
    return parse(without_points(inside.opening, low, high, inside.closing, listed), depth + 1)


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


def _block(text: str, depth: int) -> Node | None:
    """A matrix, perhaps with a factor or transposed, or cases: a system of equations or a function by pieces."""
    cases = _CASES.match(text)
    if cases and r"\begin" not in cases[1]:
        return _cases(cases[1], depth)
    transposed = _TRANSPOSED.search(text)
    plain = text[: transposed.start()] if transposed else text
    matrix = _MATRIX.fullmatch(plain)
    if matrix and r"\begin" not in matrix[2]:
        made = _matrix(matrix[1], matrix[2], depth)
        return Matrix(tuple(zip(*made.rows, strict=True)), made.bars) if transposed and _is_even(made) else made
    if transposed and plain.startswith("(") and plain.endswith(")"):
        inner = _bracketed(plain, depth)
        return inner if isinstance(inner, Sequence) else None
    scaled = _SCALED_MATRIX.match(plain)
    if scaled and not transposed and scaled["matrix"].count(r"\begin") == 1:
        plain_matrix = parse(scaled["matrix"], depth + 1)
        if isinstance(plain_matrix, Matrix) and all(isinstance(c, Leaf) for row in plain_matrix.rows for c in row):
            factor = {"-": "-1", "+": "1"}.get(scaled["factor"].strip(), scaled["factor"].strip())
            return Matrix(
                tuple(
                    tuple(Leaf(rf"({factor})\cdot ({cell.text})") for cell in row if isinstance(cell, Leaf))
                    for row in plain_matrix.rows
                )
            )
    return None


def _is_even(matrix: Matrix) -> bool:
    return len({len(row) for row in matrix.rows}) == 1


_CONDITION_WORDS = re.compile(r"\\text\{\s*(?:if|when|for|where|otherwise,?)?\s*\}|^\s*(?:if|when|for|where)\b")


def _cases(body: str, depth: int) -> Node:
    rows = [row.strip(" ,.;") for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row.strip()]
    if not any("&" in row for row in rows):
        return _items([parse(row, depth + 1) for row in rows])
    parts = []
    for row in rows:
        value, _, condition = row.partition("&")
        words = _CONDITION_WORDS.sub("", condition.replace("&", " ")).strip(" ,.;")
        parts.append((parse(value.strip(" ,;"), depth + 1), parse(words, depth + 1) if words else Leaf("")))
    if all(re.match(r"\s*(?:=|\\approx)", row.partition("&")[2]) for row in rows):
        # "x &= 1": the sign stands behind the alignment mark; a system, not pieces.
        return _items([parse(row.replace("&", ""), depth + 1) for row in rows])
    return Piecewise(tuple(parts))


def _matrix(environment: str, body: str, depth: int) -> Matrix:
    body = _ARRAY_COLUMNS.sub("", body)
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", body.replace(r"\hline", "")) if row.strip()]
    if sum(row.count("&") + 1 for row in rows) > MAX_ITEMS:
        raise Malformed(f"more than {MAX_ITEMS} entries")
    entries = tuple(tuple(parse(cell, depth + 1) for cell in row.split("&")) for row in rows)
    return Matrix(entries, bars=environment[0] in "vV")


def _related(text: str, depth: int) -> Node | None:
    """An equation, or an inequality in one variable as the interval it means."""
    parts = split_top(text, frozenset(["=", "<", ">", r"\leq", r"\geq", r"\approx"]))
    if len(parts) < 2 or not parts[-1].strip():
        return None
    operators = _top_operators(text, parts)
    if all(operator in ("=", r"\approx") for operator in operators):
        exact = [part.strip() for index, part in enumerate(parts) if index == 0 or operators[index - 1] == "="]
        rounded = next((parts[i + 1] for i, operator in enumerate(operators) if operator == r"\approx"), "").strip()
        if len(exact) == 1:
            value = rounded if is_label(exact[0]) else exact[0]
            return Equation(exact[0], value, parts[-1].strip())
        last = len(operators) - 1 - operators[::-1].index("=")
        between = [part.strip() for part in parts[1 : last + 1]]
        return Equation(exact[0], exact[-1], rounded, tuple(between))
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
        if not (_VARIABLE.match(left) or MODULUS.fullmatch(left)):
            left, right = right, left
            operator = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}[operator]
        modulus = MODULUS.fullmatch(left)
        if modulus:
            return around(modulus, operator, right)
        if not _VARIABLE.match(left) or _VARIABLE.match(right):
            return None
        bound, name = parse(right, depth + 1), left.strip()
        if operator in (">", r"\geq"):
            return Sequence("(" if operator == ">" else "[", ")", (bound, Leaf(r"\infty")), name)
        return Sequence("(", ")" if operator == "<" else "]", (Leaf(r"-\infty"), bound), name)
    if len(parts) == 3 and _VARIABLE.match(parts[1]):
        low, high = parts[0], parts[2]
        first, second = operators
        if first in (">", r"\geq") and second in (">", r"\geq"):
            low, high, first, second = high, low, second.replace(">", "<"), first.replace(">", "<")
            first, second = first.replace(r"\geq", r"\leq"), second.replace(r"\geq", r"\leq")
        if first in ("<", r"\leq") and second in ("<", r"\leq"):
            ends = (parse(low, depth + 1), parse(high, depth + 1))
            closing = ")" if second == "<" else "]"
            return Sequence("(" if first == "<" else "[", closing, ends, parts[1].strip())
    return None
