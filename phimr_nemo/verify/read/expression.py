"""Whether two single expressions are equal: text, numbers, percent, units, bases, ratios, words, then algebra."""

from __future__ import annotations

import re
from collections.abc import Sequence as Many
from fractions import Fraction
from typing import Final, Protocol

from phimr_nemo.verify.read.names import words
from phimr_nemo.verify.read.normalise import key
from phimr_nemo.verify.read.numerals import number_of_words
from phimr_nemo.verify.read.phrases import letters_differ, same_phrase
from phimr_nemo.verify.read.quantity import (
    CLOCK,
    MIN_ROUNDED_DIGITS,
    Number,
    Quantity,
    lone_letter,
    numbers_equal,
    parse_number,
    split_quantity,
    without_remarks,
)
from phimr_nemo.verify.read.units import Unit, parse_unit, shape, stems
from phimr_nemo.verify.verdict import Unparsable

MIN_PERCENT_AS_NUMBER: Final = 1
"""Where only the response has a percent sign, "50%" means 50 for a gold answer of at least this size."""
PERCENT: Final = 100
MAX_EXPRESSION_CHARS: Final = 2048


Relation = tuple[str, str, str]
"""A left side, one of the signs ``=``, ``<`` and ``\\leq``, and a right side."""


class Symbolic(Protocol):
    """Decides what text cannot: see :class:`phimr_nemo.verify.symbolic.Algebra`."""

    def equal(self, gold: str, predicted: str, rounding: Number | None, /, *, family: bool = False) -> bool:
        """Whether two expressions are equal."""
        ...

    def same_relation(self, gold: Relation, predicted: Relation, /) -> bool:
        """Whether two equations or inequalities are equivalent."""
        ...


def number_pair(gold: str, predicted: str) -> tuple[Number, Number] | None:
    """Both answers as exact numbers, or None when one is no plain number."""
    first = parse_number(key(gold))
    second = parse_number(key(predicted)) if first else None
    return (first, second) if first and second else None


def same_expression(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    """Whether two canonical expressions mean the same.

    Raises:
        Unparsable: one of them is no mathematics within the bounds.
    """
    if key(gold) == key(predicted):
        return True
    gold, predicted = without_remarks(gold), without_remarks(predicted)
    if key(gold) == key(predicted):
        return True
    left, right = split_quantity(gold), split_quantity(predicted)
    if not right.unit and not right.percent:
        right = _with_letter_unit(left, right)
    if left.percent != right.percent:
        return not left.unit and not right.unit and _same_percent(left, right)
    if left.unit and right.unit and {left.unit, right.unit} != {"sterling", "pounds"}:
        units = parse_unit(left.unit), parse_unit(right.unit)
        if units[0] and units[1]:
            if units[0].dimension != units[1].dimension:
                return False
            if units[0].size != units[1].size:
                return _converted(left.core, units[0], right.core, units[1], symbolic)
        elif not _same_counted(left.unit, right.unit):
            return False
    return _same_core(left.core, right.core, symbolic)


def _with_letter_unit(gold: Quantity, predicted: Quantity) -> Quantity:
    """``12 m`` where the gold answer is a bare number, or has a unit itself: then the letter is one."""
    letter = lone_letter(predicted.core)
    if letter is None or not (gold.unit or parse_number(key(gold.core))):
        return predicted
    return Quantity(letter[0], unit=letter[1])


def _converted(gold: str, from_unit: Unit, predicted: str, to_unit: Unit, symbolic: Symbolic) -> bool:
    numbers = number_pair(gold, predicted)
    factor = to_unit.size / from_unit.size
    if numbers is not None:
        second = numbers[1]
        return numbers_equal(numbers[0], Number(second.value * factor, second.digits, second.last_place * factor))
    return _same_core(gold, rf"({predicted})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}", symbolic)


def _same_counted(gold: str, predicted: str) -> bool:
    """Whether two things counted may be the same: one names no other thing than the other, nor another power."""
    left, right = stems(gold), stems(predicted)
    return shape(gold) == shape(predicted) and (left <= right or right <= left)


def _same_percent(gold: Quantity, predicted: Quantity) -> bool:
    """One side has a percent sign: p% equals p/100, and equals p where the question may have asked for percent."""
    numbers = number_pair(gold.core, predicted.core)
    if numbers is None:
        return False
    first, second = numbers
    if gold.percent:
        return numbers_equal(first, second) or numbers_equal(_hundredth(first), second)
    as_written = abs(first.value) >= MIN_PERCENT_AS_NUMBER and numbers_equal(first, second)
    return as_written or numbers_equal(first, _hundredth(second))


def _hundredth(number: Number) -> Number:
    return Number(number.value / PERCENT, number.digits, number.last_place / PERCENT)


_BASE_NAMES: Final = {
    name: str(value)
    for value, name in enumerate(
        words("two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"), start=2
    )
}
_BASE = re.compile(
    r"\(?([-+]?[0-9A-F]+(?:\.[0-9A-F]+)?)\)?(?:_\{?\(?|(?:\\text\{|)base(?:-|\}|))([0-9]{1,2}|[a-z]{3,8})\)?\}?\}?"
)
_RATIO = re.compile(r"[0-9.]+(?::[0-9.]+)+")
_SPOKEN_RATIO = re.compile(r"([0-9.]+)(?:\\text\{to\}|to)([0-9.]+)")
"""``3 to 2``: a ratio where the other side is one."""


def _same_core(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    left, right = key(gold), key(predicted)
    if left == right:
        return True
    numbers = number_pair(gold, predicted)
    if numbers is not None:
        return numbers_equal(*numbers)
    bases = _base(left), _base(right)
    if bases[0] or bases[1]:
        return _same_base(left, right, *bases)
    if _RATIO.fullmatch(left) or _RATIO.fullmatch(right):
        return _same_ratio(_SPOKEN_RATIO.sub(r"\1:\2", left), _SPOKEN_RATIO.sub(r"\1:\2", right))
    if CLOCK.match(left) or CLOCK.match(right):
        return re.sub(r"[{}.]|\\text", "", left).lower() == re.sub(r"[{}.]|\\text", "", right).lower()
    if ":" in left or ":" in right:
        return _same_proportion(gold, predicted, symbolic)
    if letters_differ(left, right):
        return False
    same = _same_words(gold, predicted)
    if same is not None:
        return same
    check_plain("answer", gold)
    check_plain("response", predicted)
    shown = parse_number(left)
    rounding = shown if shown and shown.digits >= MIN_ROUNDED_DIGITS else None
    return symbolic.equal(gold, predicted, rounding)


def _base(text: str) -> tuple[str, str] | None:
    """The digits and the base of a numeral with a base."""
    match = _BASE.fullmatch(text)
    base = _BASE_NAMES.get(match[2], match[2]) if match else ""
    return (match[1], base) if match and base.isdigit() else None


def _same_base(left: str, right: str, gold: tuple[str, str] | None, predicted: tuple[str, str] | None) -> bool:
    """Numerals with a base: the digits must agree, and the bases where both are given."""
    if gold and predicted:
        return gold == predicted
    digits = gold[0] if gold else left, predicted[0] if predicted else right
    return digits[0] == digits[1] and bool(gold)


def _same_ratio(left: str, right: str) -> bool:
    """``2:3`` as a proportion, also against ``2/3``; what may be a time of day only as it stands."""
    if CLOCK.fullmatch(left) and len(left.split(":")[1]) == 2:
        return left.lstrip("0") == right.lstrip("0")
    sides = [[parse_number(part) for part in text.split(":")] for text in (left, right)]
    values = [[number.value for number in side if number] for side in sides]
    if any(len(value) != len(side) for value, side in zip(values, sides, strict=True)):
        return False
    first, second = values
    if len(first) == 1:
        first = [first[0], Fraction(1)] if first[0] else first
    if len(second) == 1:
        second = [second[0], Fraction(1)] if second[0] else second
    if len(first) != len(second) or not all(first) or not all(second):
        return first == second
    return all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True))


def _same_proportion(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    r"""Ratios of expressions, ``\sqrt{2}:1`` against ``2:\sqrt{2}``."""
    first, second = gold.split(":"), predicted.split(":")
    first = [*first, "1"] if len(first) == 1 else first
    second = [*second, "1"] if len(second) == 1 else second
    if len(first) != len(second) or not all(part.strip() for part in (*first, *second)):
        return False
    check_plain("answer", gold)
    check_plain("response", predicted)
    for side, parts in (("response", second), ("answer", first)):
        _check_readable(side, parts, symbolic)
    return all(
        _same_core(rf"({a})\cdot ({second[0]})", rf"({b})\cdot ({first[0]})", symbolic)
        for a, b in zip(first[1:], second[1:], strict=True)
    )


def _check_readable(side: str, parts: Many[str], symbolic: Symbolic) -> None:
    """Name the side that cannot be read, before expressions are made of both."""
    for part in parts:
        try:
            symbolic.equal(part, "0", None)
        except Unparsable as error:
            raise Unparsable(side, error.problem) from error


def _same_words(gold: str, predicted: str) -> bool | None:
    """Compare answers made of words; None where neither is, or where bare letters may be a product."""
    same = same_phrase(gold, predicted)
    if same is not True:
        for text, other in ((gold, predicted), (predicted, gold)):
            value = number_of_words(re.sub(r"\\text\{([^{}]*)\}", r"\1", text))
            number = parse_number(key(other))
            if value is not None and number is not None:
                return value == number.value
    return same


_SIDE_BY_SIDE = re.compile(r"[0-9]\s+[0-9]")


def check_plain(side: str, text: str) -> None:
    """Refuse what is no expression.

    Raises:
        Unparsable: words, a percent or currency sign, two numbers side by side, or too many characters.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        raise Unparsable(side, f"an expression of more than {MAX_EXPRESSION_CHARS} characters")
    if r"\text{" in text or "%" in text or "$" in text:
        raise Unparsable(side, "words or signs within an expression")
    if _SIDE_BY_SIDE.search(text):
        raise Unparsable(side, "two numbers side by side")
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}\s", text)) > 1:
        raise Unparsable(side, "prose instead of an expression")
