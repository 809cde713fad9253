"""Whether two single expressions are equal: text, numbers, percent, units, bases, ratios, words, then math-verify."""

from __future__ import annotations

import math
import re
from typing import Final, Protocol

from phimr_nemo.verify.read.names import words
from phimr_nemo.verify.read.normalise import key
from phimr_nemo.verify.read.quantity import (
    MIN_ROUNDED_DIGITS,
    Number,
    Quantity,
    numbers_equal,
    parse_number,
    split_quantity,
    words_of,
)
from phimr_nemo.verify.read.units import unit_size
from phimr_nemo.verify.verdict import Unparsable

MAX_EXPRESSION_CHARS: Final = 600
"""The longest single expression that math-verify is asked to read."""
MAX_POWER_DIGITS: Final = 5
"""An exponent with more digits than this, written out or as a power of its own, is refused."""
MAX_FACTORIAL_DIGITS: Final = 4
MIN_PERCENT_AS_NUMBER: Final = 1
"""Where only the response has a percent sign, "50%" means 50 for a gold answer of at least this size."""
PERCENT: Final = 100
MAX_SHORT_WORD: Final = 4
NUMBER_WORDS: Final = {
    word: str(value)
    for value, word in enumerate(words("zero one two three four five six seven eight nine ten eleven twelve"))
}


class Symbolic(Protocol):
    """Decides what text cannot: see :class:`phimr_nemo.verify.symbolic.MathVerify`."""

    def equal(self, gold: str, predicted: str, rounding: Number | None, /) -> bool:
        """Whether two expressions are equal."""
        ...

    def same_equation(self, gold: tuple[str, str], predicted: tuple[str, str], /) -> bool:
        """Whether two equations, each a left and a right side, are equivalent."""
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
    left, right = split_quantity(gold), split_quantity(predicted)
    if left.percent != right.percent:
        return _same_percent(left, right)
    if left.unit and right.unit:
        sizes = unit_size(left.unit), unit_size(right.unit)
        if sizes[0] and sizes[1] and sizes[0] != sizes[1]:
            numbers = number_pair(left.core, right.core)
            if sizes[0][0] != sizes[1][0] or numbers is None:
                return False
            return numbers[0].value * sizes[0][1] == numbers[1].value * sizes[1][1]
    return _same_core(left.core, right.core, symbolic)


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


_BASE = re.compile(r"([-+]?[0-9A-F]+(?:\.[0-9A-F]+)?)_\{?(?:\\text\{)?([0-9]{1,2}|two|eight|ten|sixteen)\}?\}?")
_RATIO = re.compile(r"[0-9.]+(?::[0-9.]+)+")
_CLOCK = re.compile(r"(?:[01]?[0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9])?")


def _same_core(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    left, right = key(gold), key(predicted)
    if left == right:
        return True
    numbers = number_pair(gold, predicted)
    if numbers is not None:
        return numbers_equal(*numbers)
    bases = _BASE.fullmatch(left), _BASE.fullmatch(right)
    if bases[0] or bases[1]:
        return _same_base(left, right, *bases)
    if _RATIO.fullmatch(left) or _RATIO.fullmatch(right):
        return _same_ratio(left, right)
    same = _same_words(gold, predicted)
    if same is not None:
        return same
    check_expression("answer", gold)
    check_expression("response", predicted)
    shown = parse_number(left)
    rounding = shown if shown and shown.digits >= MIN_ROUNDED_DIGITS else None
    left, right = for_math_verify(gold, predicted)
    return symbolic.equal(left, right, rounding)


def _same_base(left: str, right: str, gold: re.Match[str] | None, predicted: re.Match[str] | None) -> bool:
    """Numerals with a base: the digits must agree, and the bases where both are given."""
    if gold and predicted:
        return gold.groups() == predicted.groups()
    digits = gold.group(1) if gold else left, predicted.group(1) if predicted else right
    return digits[0] == digits[1]


def _same_ratio(left: str, right: str) -> bool:
    """``2:3`` as a proportion, also against ``2/3``; what may be a time of day only as it stands."""
    if _CLOCK.fullmatch(left) and len(left.split(":")[1]) == 2:
        return left.lstrip("0") == right.lstrip("0")
    sides = [[parse_number(part) for part in text.split(":")] for text in (left, right)]
    values = [[number.value for number in side if number] for side in sides]
    if any(len(value) != len(side) for value, side in zip(values, sides, strict=True)):
        return False
    first, second = values
    if len(first) == 1:
        first = [first[0], first[0] / first[0]] if first[0] else first
    if len(second) == 1:
        second = [second[0], second[0] / second[0]] if second[0] else second
    if len(first) != len(second) or not all(first) or not all(second):
        return first == second
    return all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True))


def _same_words(gold: str, predicted: str) -> bool | None:
    """Compare answers made of words; None where neither is, or where bare letters may be a product."""
    left, right = words_of(gold), words_of(predicted)
    if left is None and right is None:
        return None
    if left is not None and right is not None:
        marked = r"\text{" in gold + predicted or max(len(left), len(right)) > MAX_SHORT_WORD
        return True if left == right else (False if marked else None)
    for word, other in ((left, predicted), (right, gold)):
        if word in NUMBER_WORDS:
            return parse_number(key(other)) == parse_number(NUMBER_WORDS[word])
    only = gold if left is not None else predicted
    return False if r"\text{" in only or len(only) > MAX_SHORT_WORD else None


_COMMAND_OR_SUBSCRIPT = re.compile(r"(\\[A-Za-z]+|_\s*\{[^{}]*\}|_\s*[A-Za-z0-9])")
_SHORT_RUN_WITH_I = re.compile(r"(?<![A-Za-z])([A-Za-z]{0,2})i([A-Za-z]{0,2})(?![A-Za-z])")
_INDEX_I = re.compile(r"_\s*\{\s*i\s*=")
_DERIVATIVE = re.compile(
    r"\\frac\s*\{\s*d\s*(?P<over>\\?[A-Za-z]+)(?:\s*\([A-Za-z]\))?\s*\}\s*\{\s*d\s*[A-Za-z]\s*\}"
    r"|\\dot\s*\{\s*(?P<dotted>\\?[A-Za-z]+)\s*\}"
)
_PRIMES = re.compile(r"(?P<name>\\?[A-Za-z]+)\s*(?:\^\s*\{?\s*(?P<command>(?:\\prime\s*)+)\}?|(?P<quotes>'+))")
_UPPER = re.compile(r"\\(?:Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![A-Za-z])|[A-Z]")
_FREE_SYMBOLS: Final = tuple(rf"\{name} " for name in words("kappa chi xi nu zeta upsilon iota psi eta"))
_ALWAYS_RENAMED: Final = frozenset("EI")
"""math-verify reads I as the imaginary unit and cannot read E with a subscript."""
_CONSTANT_OF_INTEGRATION: Final = "C"


def for_math_verify(*texts: str) -> tuple[str, ...]:
    r"""Write expressions so that math-verify, which folds case and drops primes, keeps different names apart.

    A capital letter that also occurs as a small one becomes a Greek letter that occurs nowhere. The constant of
    integration is exempt: ``C`` and ``c`` are told apart only within one expression. Derivatives by dot, prime or
    quotient become one name. The letter i, except as the index of a sum, becomes the imaginary unit.
    """
    prepared = []
    for text in texts:
        text = _DERIVATIVE.sub(lambda m: f"{m['over'] or m['dotted']}_{{p}} ", text)
        text = _PRIMES.sub(_primed_name, text)
        prepared.append(text)
    together = " ".join(prepared)
    free = iter([name for name in _FREE_SYMBOLS if name.strip() not in together])
    for name in sorted(set(_UPPER.findall(together))):
        small = name.lower()
        folded = [small in _names(text) and name in _names(text) for text in prepared]
        both = any(folded) if name == _CONSTANT_OF_INTEGRATION else small in _names(together)
        if both or name in _ALWAYS_RENAMED:
            replacement = next(free, None)
            if replacement is None:
                raise Unparsable("response", "too many names that differ in case alone")
            prepared = [_rename(text, name, replacement) for text in prepared]
    return tuple(prepared) if _INDEX_I.search(together) else tuple(map(_imaginary_unit, prepared))


def _imaginary_unit(text: str) -> str:
    """The letter i as the capital that math-verify takes for the imaginary unit."""
    segments = _COMMAND_OR_SUBSCRIPT.split(text)
    segments[::2] = [_SHORT_RUN_WITH_I.sub(r"\1 I \2", segment) for segment in segments[::2]]
    return "".join(segments)


def _primed_name(match: re.Match[str]) -> str:
    count = match["command"].count("prime") if match["command"] else len(match["quotes"])
    return f"{match['name']}_{{{'p' * count}}} "


def _names(text: str) -> frozenset[str]:
    """Single letters and commands that occur in an expression, subscripts aside."""
    commands = re.findall(r"\\[A-Za-z]+", text)
    letters = re.sub(r"\\[A-Za-z]+|_\s*\{[^{}]*\}|_\s*[A-Za-z0-9]", " ", text)
    return frozenset([*commands, *letters])


def _rename(text: str, name: str, replacement: str) -> str:
    if name.startswith("\\"):
        return re.sub(re.escape(name) + r"(?![A-Za-z])", lambda _: replacement, text)
    segments = _COMMAND_OR_SUBSCRIPT.split(text)
    segments[::2] = [segment.replace(name, replacement) for segment in segments[::2]]
    return "".join(segments)


_SIDE_BY_SIDE = re.compile(r"[0-9]\s+[0-9]")
_POWER_OF_POWER = re.compile(r"\^\s*\{?\s*\(?\s*([0-9]{1,20})\s*\^\s*\{?\s*([0-9]{1,20})")
_BIG_POWER = re.compile(rf"\^\s*\{{?\s*\(?\s*[-+]?\s*[0-9]{{{MAX_POWER_DIGITS + 1},}}")
_BIG_FACTORIAL = re.compile(
    rf"[0-9]{{{MAX_FACTORIAL_DIGITS + 1},}}\s*[)}}]*\s*!|[\^!][^+\-*/]{{0,40}}[)}}]\s*!|!\s*!"
)
_BIG_BINOMIAL = re.compile(rf"\\binom\s*\{{[^{{}}]*(?:\^|[0-9]{{{MAX_POWER_DIGITS + 1},}})")


def check_expression(side: str, text: str) -> None:
    """Refuse what math-verify must not be given.

    Raises:
        Unparsable: words, a percent or currency sign, or an expression beyond the bounds on its length, exponents
            and factorials.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        raise Unparsable(side, f"an expression of more than {MAX_EXPRESSION_CHARS} characters")
    if r"\text{" in text or "%" in text or "$" in text:
        raise Unparsable(side, "words or signs within an expression")
    if _SIDE_BY_SIDE.search(text):
        raise Unparsable(side, "two numbers side by side")
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}\s", text)) > 1:
        raise Unparsable(side, "prose instead of an expression")
    if _BIG_POWER.search(text) or _BIG_FACTORIAL.search(text) or _BIG_BINOMIAL.search(text):
        raise Unparsable(side, "a power, factorial or binomial beyond the bounds")
    for base, power in _POWER_OF_POWER.findall(text):
        if int(power) * math.log10(max(int(base), 2)) > MAX_POWER_DIGITS:
            raise Unparsable(side, "a power tower beyond the bounds")
