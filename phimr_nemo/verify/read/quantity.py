"""Numbers, units, percent signs and words: what an answer says besides its mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

from phimr_nemo.verify.read.numerals import CHANGING, NUMBER_WORDS, scale_of
from phimr_nemo.verify.read.units import SINGLE_LETTERS, is_unit, parse_unit, plain_words

MAX_NUMBER_DIGITS: Final = 2000
"""Longer integers are compared digit by digit as text, never converted."""
MAX_POWER_OF_TEN: Final = 2000
QUANTITY_CACHE: Final = 4096
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
        core: the mathematics, a canonical string, with scale words multiplied in.
        unit: the unit or counted thing as written; empty when there is none.
        percent: whether a percent sign followed.
    """

    core: str
    unit: str = ""
    percent: bool = False


CLOCK = re.compile(r"(?:[01]?[0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9])?(?![0-9])")
_CURRENCY = re.compile(
    r"^([-+]?)\s*(?P<sign>(?:US|C|A)?\\?\$|£|€|¥|₹|\\pounds|\\euro|USD|Rs\.?|\\text\{(?:Rs\.?|USD|£|€|¥|US\\?\$)\})\s*(?=[-0-9.\\(])"
)
_CURRENCIES: Final = {
    "£": "sterling", "pounds": "sterling", "€": "euro", "euro": "euro", "¥": "yen", "₹": "rupee", "Rs": "rupee"
}  # fmt: skip
_PERCENT = re.compile(
    r"\s*(?:\\%|%|\\text\{\s*(?:\\?%|per\s?cent|percentage|pct)[^{}]*\}|\b(?:percent|per cent|pct)\b)\s*$"
)
_UNIT_TAIL = re.compile(
    r"(?:\\text\{[^{}]*\}|\^\{?-?[0-9]\}?|[²³]|\\cdot|\\times|/|\*|\s|\\circ|\^\\circ|\(|\)"
    r"|\\frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*\}(?:\^\{?[0-9]\}?)?\})+"
)
_WORD_UNIT = re.compile(
    r"^(?P<core>.*[0-9})])(?P<gap>\s*)"
    r"(?P<unit>[A-Za-z\u4e00-\u9fff][A-Za-z\u4e00-\u9fff ./]*(?:\^\{?[0-9]\}?|[²³])?(?:/[A-Za-z]+)?)$"
)
_DEGREE_TAIL = re.compile(r"\s*\^\\circ\s*(?P<scale>\\text\{[^{}]*\}|[CFK])?\s*$")
_LEADING_WORDS = re.compile(
    r"^\\text\{\s*(?:[^{}]*(?::|\b(?:is|are|equals|=)))\s*\}\s*(?=[^\s])"
    r"|^\\text\{\s*(?:approximately|approx\.?|about|roughly|around|exactly|only|just|therefore|thus|so|hence|answer)"
    r"\s*\}\s*(?=[^\s])",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r"[\s,;]*(?:\\text\{\s*\(|\(\s*(?:\\text\{)?)\s*"
    r"(?:(?:about|approximately|approx\.?|roughly|rounded|simplified|exact(?:ly)?"
    r"|double root|reduced|with multiplicity|multiplicity|in simplest form|nearest"
    r"|to the nearest|exact value|repeated root)\b[^()]*"
    r"|[^()]*\b(?:rejected|extraneous|discarded|invalid|not valid|inadmissible)[^()]*)\)\s*\}?\s*$",
    re.IGNORECASE,
)
_COMPOUND = re.compile(
    r"(?P<value>[0-9]+(?:\.[0-9]+)?)\s*(?:\\text\{\s*(?P<boxed>[A-Za-z.]+)[\s,]*\}|(?P<bare>[A-Za-z]{2,}))[\s,]*"
)
_SYMBOL_WORDS: Final = frozenset({"pi", "e", "i", "x", "y", "z", "n", "k"})
_LONE_LETTER = re.compile(r"^(?P<core>.*[0-9})])\s*(?:\\text\{\s*)?(?P<unit>[A-Za-z])(?:\s*\})?$")


def without_remarks(text: str) -> str:
    """A canonical answer without words around its value that say nothing about it."""
    text = _REMARK.sub("", text)
    return _LEADING_WORDS.sub("", text)


@lru_cache(maxsize=QUANTITY_CACHE)
def split_quantity(text: str) -> Quantity:
    """Separate currency signs, percent signs, degrees, scale words and units from a canonical answer."""
    text = text.strip()
    match = _CURRENCY.search(text)
    if not match:
        return _split(text)
    sign = re.sub(r"[\\{}.]|text", "", match["sign"])
    rest = _split(match[1] + text[match.end() :])
    return Quantity(rest.core, rest.unit or _CURRENCIES.get(sign, "dollar"), rest.percent)


def _split(text: str) -> Quantity:
    if CLOCK.match(text):
        return Quantity(text)
    match = _PERCENT.search(text)
    if match and match.start() > 0:
        return Quantity(text[: match.start()].strip(), percent=True)
    compound = _compound(text)
    if compound is not None:
        return compound
    match = _DEGREE_TAIL.search(text)
    if match and match.start() > 0:
        return Quantity(text[: match.start()].strip(), unit="°" + plain_words(match["scale"] or ""))
    start = text.find(r"\text{")
    while start > 0:
        if _UNIT_TAIL.fullmatch(text, start) and re.search(r"[0-9A-Za-z})]\s*$", text[:start]):
            return _with_tail(text[:start].strip(), text[start:]) or Quantity(text)
        start = text.find(r"\text{", start + 1)
    match = re.search(r"\\frac\{\\text\{", text)
    if match and match.start() > 0 and _UNIT_TAIL.fullmatch(text, match.start()):
        return _with_tail(text[: match.start()].strip(), text[match.start() :]) or Quantity(text)
    match = _WORD_UNIT.match(text)
    if match and parse_number(match["core"].replace(" ", "")) and _is_word_unit(match["unit"], match["gap"]):
        return _with_tail(match["core"].strip(), match["unit"]) or Quantity(text)
    return Quantity(text)


def _with_tail(core: str, tail: str) -> Quantity | None:
    """A number with the words behind it: scale words multiply, a unit stays; None where a word changes the value."""
    found = [word for word in re.split(r"[\s,]+", plain_words(tail)) if word]
    scale = Fraction(1)
    while found and scale_of(found[0]) is not None:
        scale *= scale_of(found.pop(0)) or 1
    if found and scale != 1 and found[0].lower() == "of":
        found.pop(0)
    lowered = [word.lower().strip("().,") for word in found]
    changed = any(word in CHANGING or word in NUMBER_WORDS for word in lowered)
    raised = len(lowered) > 1 and lowered[-1] in ("squared", "cubed") and _can_be_raised(lowered, tail)
    if changed and not raised:
        return None
    if any(re.search(r"[0-9](?<!\^[0-9])(?<!\^-[0-9])", word) for word in found) and not is_unit(" ".join(found)):
        return None
    if r"," in re.sub(r"\\text\{([^{}]*)\}", r"\1", tail) and any(word.isdigit() for word in lowered):
        return None
    return Quantity(core if scale == 1 else scaled(core, scale), unit=" ".join(found))


def _can_be_raised(words: Sequence[str], tail: str) -> bool:
    return is_unit(plain_words(tail)) or words[:-1] in (["unit"], ["units"])


def scaled(core: str, scale: Fraction) -> str:
    """A canonical expression times a rational number."""
    number = parse_number(core.replace(" ", ""))
    if number is not None:
        value = number.value * scale
        return (
            str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        )
    return rf"({core})\cdot \frac{{{scale.numerator}}}{{{scale.denominator}}}"


def _compound(text: str) -> Quantity | None:
    """``2 hr 30 min`` as 5/2 hr: quantities of one dimension, the larger units first."""
    total, before, position, count = Fraction(0), None, 0, 0
    first = ""
    while match := _COMPOUND.match(text, position):
        name = match["boxed"] or match["bare"]
        unit = parse_unit(name)
        if unit is None or (before is not None and (unit.dimension != before.dimension or unit.size >= before.size)):
            return None
        total += Fraction(match["value"]) * unit.size
        first, before, position, count = first or name, unit, match.end(), count + 1
    if count < 2 or position != len(text) or before is None:
        return None
    value = total / (parse_unit(first) or before).size
    return Quantity(rf"\frac{{{value.numerator}}}{{{value.denominator}}}", unit=first)


def lone_letter(text: str) -> tuple[str, str] | None:
    """A number before a single letter that may be a unit: ``12 m`` -> ("12", "m")."""
    match = _LONE_LETTER.match(text)
    if not match or match["unit"] not in SINGLE_LETTERS or parse_number(key_of(match["core"])) is None:
        return None
    return match["core"].strip(), match["unit"]


def key_of(text: str) -> str:
    """A core without spaces."""
    return text.replace(" ", "")


def _is_word_unit(unit: str, gap: str) -> bool:
    """Whether bare letters after a number are a unit: a known one of two letters or more, or a word after a space."""
    unit = unit.strip()
    if re.match(r"[\u4e00-\u9fff]", unit):
        return True
    if len(unit) == 1:
        return False
    if is_unit(unit):
        return True
    first = re.split(r"[ ./^]", unit)[0]
    return len(first) >= 3 and bool(gap) and first not in _SYMBOL_WORDS
