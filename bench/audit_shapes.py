r"""The truth about answers that are more than one expression: lists, tuples, sets, intervals, matrices, quantities.

As :mod:`audit_truth`: it reads what the generators write, and raises `CannotRead` on anything else.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from audit_arithmetic import CannotRead
from audit_truth import evaluate, same_items, same_number, value_of

OPENING: Final = "([{"
CLOSING: Final = ")]}"
UNITS: Final[dict[str, tuple[str, Fraction]]] = {
    "mm": ("length", Fraction(1, 1000)),
    "cm": ("length", Fraction(1, 100)),
    "m": ("length", Fraction(1)),
    "meters": ("length", Fraction(1)),
    "km": ("length", Fraction(1000)),
    "kilometers": ("length", Fraction(1000)),
    "mg": ("mass", Fraction(1, 1000)),
    "g": ("mass", Fraction(1)),
    "kg": ("mass", Fraction(1000)),
    "seconds": ("time", Fraction(1)),
    "minutes": ("time", Fraction(60)),
    "hours": ("time", Fraction(3600)),
    "days": ("time", Fraction(86400)),
    "mL": ("volume", Fraction(1, 1000)),
    "L": ("volume", Fraction(1)),
    "cm^2": ("area", Fraction(1, 10_000)),
    "m^2": ("area", Fraction(1)),
    "m/s": ("speed", Fraction(1)),
    "km/h": ("speed", Fraction(5, 18)),
    "m/s^2": ("acceleration", Fraction(1)),
}
"""Unit -> what it measures, and how much of the base unit it is."""
SCALES: Final = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
BASE_WORDS: Final = {"two": 2, "three": 3, "five": 5, "eight": 8}


def plain(text: str) -> str:
    """Without size commands and thin spaces."""
    return re.sub(r"\\left|\\right|\\big|\\,|\\;|\\ ", "", text).strip()


def split(text: str, separator: str = ",") -> list[str]:
    """The parts between separators outside brackets."""
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in OPENING) - (sign in CLOSING)
        if depth == 0 and text.startswith(separator, place):
            parts.append(text[begin:place])
            begin = place + len(separator)
    return [part.strip() for part in (*parts, text[begin:])]


def items(text: str) -> list[str]:
    """The items of a tuple, a set or a bare list; a list may end in "and ..."."""
    text = plain(text)
    for opening, closing in ((r"\{", r"\}"), ("(", ")")):
        if text.startswith(opening) and text.endswith(closing):
            return split(text[len(opening) : -len(closing)])
    return split(text.replace(r"\text{ and }", ","))


def same_tuple(left: str, right: str) -> bool:
    """Entry by entry; ``x=1, y=2`` says the same as ``(1, 2)``."""
    a, b = ([value_of(item) for item in items(text)] for text in (left, right))
    return same_items(a, b, ordered=True)


def same_set(left: str, right: str) -> bool:
    """As sets: a number said twice is one item, and no item is missing."""
    return same_items(_distinct(items(left)), _distinct(items(right)), ordered=False)


def _distinct(texts: list[str]) -> list[str]:
    found: list[str] = []
    for text in texts:
        if not any(same_number(text, other) for other in found):
            found.append(text)
    return found


Interval = tuple[str, str, str, str]


def intervals(text: str) -> list[Interval]:
    """Opening, lower end, upper end, closing of each interval of a union or of inequalities in x."""
    text = plain(text).replace(r"\leq", r"\le").replace(r"\geq", r"\ge")
    found = []
    for part in re.split(r"\\cup|\\text\{ or \}", text):
        part = part.strip()
        if "x" in part:
            found.append(_inequality(part))
        elif match := re.fullmatch(r"([(\[])(.*)([)\]])", part):
            ends = split(match.group(2))
            if len(ends) != 2:
                raise CannotRead(part)
            found.append((match.group(1), *_ends(*ends), match.group(3)))
        else:
            raise CannotRead(part)
    return found


def _ends(low: str, high: str) -> tuple[str, str]:
    return low.replace(" ", ""), high.replace(" ", "").replace("+", "")


def _inequality(text: str) -> Interval:
    sides = re.split(r"(\\le(?![a-z])|\\ge(?![a-z])|<|>)", text)
    if len(sides) == 5:
        low, first, _, second, high = sides
        if not {first, second} <= {"<", r"\le"}:
            raise CannotRead(text)
        return ("(" if first == "<" else "[", *_ends(low, high), ")" if second == "<" else "]")
    left, sign, right = sides
    if left.strip() != "x":
        raise CannotRead(text)
    if sign in ("<", r"\le"):
        return ("(", *_ends(r"-\infty", right), ")" if sign == "<" else "]")
    return ("(" if sign == ">" else "[", *_ends(right, r"\infty"), ")")


def same_intervals(left: str, right: str) -> bool:
    """Bracket by bracket and end by end, in any order; the generators write disjoint intervals that do not touch."""

    def same_end(a: str, b: str) -> bool:
        return a == b if r"\infty" in a + b else same_number(a, b)

    rest = intervals(right)
    for one in intervals(left):
        found = next(
            (
                o
                for o in rest
                if o[0] == one[0] and o[3] == one[3] and same_end(o[1], one[1]) and same_end(o[2], one[2])
            ),
            None,
        )
        if found is None:
            return False
        rest.remove(found)
    return not rest


def matrix(text: str) -> list[list[str]]:
    """Rows of entries."""
    match = re.fullmatch(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", text.strip())
    if match is None:
        raise CannotRead(text)
    return [[entry.strip() for entry in row.split("&")] for row in match.group(2).split(r"\\")]


def same_matrix(left: str, right: str) -> bool:
    """Entry by entry, whatever the brackets."""
    a, b = matrix(left), matrix(right)
    return len(a) == len(b) and all(same_items(x, y, ordered=True) for x, y in zip(a, b, strict=True))


def quantity(text: str) -> tuple[Fraction, str]:
    """The value in base units, and what it measures."""
    match = re.fullmatch(r"(.*?)\s*(?:\\,)?\s*\\(?:text|mathrm)\{\s*([^}]*)\}(\^\{?\d\}?)?", text.strip())
    if match is None:
        raise CannotRead(text)
    unit = match.group(2).strip() + (match.group(3) or "").replace("{", "").replace("}", "")
    if unit not in UNITS:
        raise CannotRead(unit)
    kind, factor = UNITS[unit]
    return evaluate(match.group(1)) * factor, kind


def same_quantity(left: str, right: str) -> bool:
    """The same amount of the same thing."""
    return quantity(left) == quantity(right)


def amount(text: str) -> Fraction:
    """A number with a percent sign or a word of scale."""
    if match := re.fullmatch(r"(.*?)\s*(?:\\%|\\text\{ percent\})", text):
        return Fraction(evaluate(match.group(1))) / 100
    if match := re.fullmatch(r"(.*?)\s*\\text\{ (\w+)\}", text):
        return Fraction(evaluate(match.group(1))) * SCALES[match.group(2)]
    return Fraction(evaluate(text))


def same_amount(left: str, right: str) -> bool:
    """The same number, with its percent sign and scale."""
    return amount(left) == amount(right)


def based(text: str) -> tuple[int, int]:
    """The value of a numeral, and its base."""
    match = re.fullmatch(r"\(?(\w+?)\)?_\{?(?:\\text\{)?(\w+)\}{0,2}", text)
    if match is None:
        raise CannotRead(text)
    base = BASE_WORDS[match.group(2)] if match.group(2) in BASE_WORDS else int(match.group(2))
    return int(match.group(1), base), base


def same_based(left: str, right: str) -> bool:
    """The same value written in the same base."""
    return based(left) == based(right)


def letters(text: str) -> list[str]:
    """The choices that an answer names."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{([^}]*)\}", r"\1", text)
    return re.findall(r"\b[A-J]\b", bare)


def same_choice(left: str, right: str) -> bool:
    """The same letters, none more."""
    return letters(left) == letters(right)


def same_equation(left: str, right: str) -> bool:
    """Two equations in x and y whose difference of sides is the same up to a factor that is not zero."""

    def difference(text: str) -> str:
        a, sign, b = text.partition("=")
        return f"({a})-({b})" if sign else f"y-({a})"

    a, b = difference(left), difference(right)
    points = [{"x": Fraction(3, 7), "y": Fraction(-5, 3)}, {"x": Fraction(-11, 2), "y": Fraction(4, 9)}]
    points += [{"x": Fraction(13, 5), "y": Fraction(17, 11)}, {"x": Fraction(0), "y": Fraction(1, 3)}]
    values = [(evaluate(a, point), evaluate(b, point)) for point in points]
    (p, q), *others = values
    return all(p * v == q * u for u, v in others) and any(u for u, _ in values) == any(v for _, v in values)


def same_residue(left: str, right: str) -> bool:
    r"""``a \pmod{m}``: the same modulus and the same class."""

    def read(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(?:x\s*\\equiv\s*)?(-?\d+)\s*\\p?mod\s*\{?(\d+)\}?", text)
        if match is None:
            raise CannotRead(text)
        return int(match.group(1)) % int(match.group(2)), int(match.group(2))

    return read(left) == read(right)


def same_alone(left: str, right: str) -> bool:
    """Whether an answer names the gold number and no other beside it; two candidates never are the one answer."""
    bare = re.sub(r"^x\s*=\s*", "", right)
    parts = re.split(r"\\text\{ (?:or|and) \}|,|=|\\approx|\\pm|;", bare)
    return len(parts) == 1 and same_number(left, right)
