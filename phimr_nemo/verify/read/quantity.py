"""Numbers, units, percent signs and words: what an answer says besides its mathematics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from phimr_nemo.verify.read.units import is_unit

MAX_NUMBER_DIGITS: Final = 2000
"""Longer integers are compared digit by digit as text, never converted."""
MAX_POWER_OF_TEN: Final = 2000
MIN_ROUNDED_DIGITS: Final = 6
"""A gold decimal with this many significant digits is read as a rounding; a shorter one as exact."""

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_DECIMAL = re.compile(rf"(?P<sign>[-+]?)(?P<digits>{_UNSIGNED})")
_SCIENTIFIC = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<digits>{_UNSIGNED})(?:\\times|\\cdot|x))?10\^(?:\{{(?P<power>[-+]?[0-9]{{1,6}})\}}|(?P<one>[0-9]))"
)
_RATIO = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<top>[-+]?(?:{_UNSIGNED}))\}}\{{(?P<bottom>[-+]?(?:{_UNSIGNED}))\}}"
    rf"|(?P<over>(?:{_UNSIGNED}))/(?P<under>(?:{_UNSIGNED})))"
)
_MIXED = re.compile(r"(?P<sign>[-+]?)(?P<whole>[0-9]+)\\frac\{(?P<top>[0-9]+)\}\{(?P<bottom>[0-9]+)\}")


@dataclass(frozen=True)
class Number:
    """An exact number as written.

    Attributes:
        value: its exact value.
        digits: significant digits shown when it is written as a decimal, 0 otherwise.
        last_place: the value of one unit in the last place shown, 0 unless it is a decimal.
    """

    value: Fraction
    digits: int = 0
    last_place: Fraction = Fraction(0)


def parse_number(text: str) -> Number | None:
    r"""The number that a key is as a whole: integer, decimal, fraction, mixed number or ``a\times10^{n}``."""
    while text.startswith("(") and text.endswith(")") and ")" not in text[1:-1]:
        text = text[1:-1]
    if not text or len(text) > MAX_NUMBER_DIGITS:
        return None
    if match := _DECIMAL.fullmatch(text):
        return _decimal(match["sign"], match["digits"], 0)
    if match := _MIXED.fullmatch(text):
        if int(match["bottom"]) == 0:
            return None
        value = int(match["whole"]) + Fraction(int(match["top"]), int(match["bottom"]))
        return Number(-value if match["sign"] == "-" else value)
    if match := _RATIO.fullmatch(text):
        top = _signed(match["top"] or match["over"])
        bottom = _signed(match["bottom"] or match["under"])
        if bottom == 0:
            return None
        return Number(-top / bottom if match["sign"] == "-" else top / bottom)
    if match := _SCIENTIFIC.fullmatch(text):
        power = int(match["power"] or match["one"])
        if abs(power) <= MAX_POWER_OF_TEN:
            return _decimal(match["sign"], match["digits"] or "1", power)
    return None


def _decimal(sign: str, digits: str, power: int) -> Number:
    digits = digits.replace(",", "")
    fraction = digits.partition(".")[2]
    value = Fraction(digits if digits[-1] != "." else digits[:-1]) * Fraction(10) ** power
    shown = len(digits.replace(".", "").lstrip("0")) if fraction else 0
    place = Fraction(10) ** (power - len(fraction)) if fraction else Fraction(0)
    return Number(-value if sign == "-" else value, shown, place)


def _signed(text: str) -> Fraction:
    number = _decimal("-" if text.startswith("-") else "", text.lstrip("+-"), 0)
    return number.value


def numbers_equal(gold: Number, predicted: Number) -> bool:
    """Exact equality, or a prediction that rounds to a gold decimal of `MIN_ROUNDED_DIGITS` digits or more."""
    if gold.value == predicted.value:
        return True
    more_precise = predicted.last_place < gold.last_place
    return gold.digits >= MIN_ROUNDED_DIGITS and more_precise and rounds_to(gold, predicted.value)


def rounds_to(gold: Number, value: Fraction) -> bool:
    """Whether `value` rounds to the gold decimal at the places that it shows."""
    return abs(gold.value - value) * 2 <= gold.last_place


@dataclass(frozen=True)
class Quantity:
    """An answer taken apart.

    Attributes:
        core: the mathematics, a canonical string.
        unit: the unit or counted thing as written; empty when there is none.
        percent: whether a percent sign followed.
    """

    core: str
    unit: str = ""
    percent: bool = False


_CURRENCY = re.compile(
    r"^([-+]?)\s*(?:\\\$|\$|£|€|¥|₹|\\pounds|\\euro|US\\?\$|USD|Rs\.?|\\text\{(?:Rs\.?|USD)\})\s*(?=[-0-9.\\(])"
)
_PERCENT = re.compile(
    r"\s*(?:\\%|%|\\text\{\s*(?:\\?%|per\s?cent|percentage|pct)[^{}]*\}|\b(?:percent|per cent|pct)\b)\s*$"
)
_UNIT_TAIL = re.compile(
    r"(?:\\text\{[^{}]*\}|\^\{?-?[0-9]\}?|[²³]|\\cdot|\\times|/|\*|\s|\\circ|\^\\circ|\(|\)|\\frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*\}(?:\^\{?[0-9]\}?)?\})+"
)
_WORD_UNIT = re.compile(
    r"^(?P<core>.*[0-9})])\s*(?P<unit>[A-Za-z][A-Za-z ./]*(?:\^\{?[0-9]\}?|[²³])?(?:/[A-Za-z]+)?)$"
)
_DEGREE_TAIL = re.compile(r"\s*\^\\circ\s*(?:\\text\{[^{}]*\}|[CFK])?\s*$")
_QUALIFIED = re.compile(r"\\text\{[^{}]*\b(?:or|more|less|fewer|least|most|than|not|between|to|if|when|where|for)\b")
_SYMBOL_WORDS: Final = frozenset({"pi", "e", "i", "x", "y", "z", "n", "k"})


def split_quantity(text: str) -> Quantity:
    """Separate currency signs, percent signs, degrees and units from a canonical answer."""
    text = _CURRENCY.sub(r"\1", text.strip())
    match = _PERCENT.search(text)
    if match and match.start() > 0:
        return Quantity(text[: match.start()].strip(), percent=True)
    match = _DEGREE_TAIL.search(text)
    if match and match.start() > 0:
        return Quantity(text[: match.start()].strip(), unit="degree")
    start = -1 if _QUALIFIED.search(text) else text.find(r"\text{")
    while start > 0:
        if _UNIT_TAIL.fullmatch(text, start) and re.search(r"[0-9A-Za-z})]\s*$", text[:start]):
            return Quantity(text[:start].strip(), unit=text[start:])
        start = text.find(r"\text{", start + 1)
    match = re.search(r"\\frac\{\\text\{", text)
    if match and match.start() > 0 and _UNIT_TAIL.fullmatch(text, match.start()):
        return Quantity(text[: match.start()].strip(), unit=text[match.start() :])
    match = _WORD_UNIT.match(text)
    if match and parse_number(match["core"].replace(" ", "")) and _is_word_unit(match["unit"], text):
        return Quantity(match["core"].strip(), unit=match["unit"])
    return Quantity(text)


def _is_word_unit(unit: str, text: str) -> bool:
    """Whether bare letters after a number are a unit: a known one of two letters or more, or a word after a space."""
    unit = unit.strip()
    if len(unit) == 1:
        return False
    if is_unit(unit):
        return True
    first = re.split(r"[ ./^]", unit)[0]
    return len(first) >= 3 and text[: -len(unit)].endswith(" ") and first not in _SYMBOL_WORDS


_WORDS = re.compile(r"[A-Za-z][A-Za-z'’\- ]*")
_FILLER = re.compile(r"\b(?:the|a|an|is|are|has|have|there|it|its)\b")


def words_of(text: str) -> str | None:
    r"""The words that an answer consists of, lower case; None when it is not made of words alone."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip(" .,;:!")
    if not _WORDS.fullmatch(plain):
        return None
    marked = r"\text{" in text
    if not marked and (len(plain) < 3 or (" " not in plain and not plain.isalpha())):
        return None
    lowered = _FILLER.sub(" ", plain.lower().replace("’", "'"))
    return re.sub(r"[\s\-]+", " ", lowered).strip() or plain.lower()
