"""Units of measurement: which words are units, of what dimension, and how large they are."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Final

from phimr_nemo.verify.read.names import words

_HOUR: Final = 3600
_INCH: Final = Fraction(254, 10_000)
_FOOT: Final = 12 * _INCH
_MILE: Final = 5280 * _FOOT
_POUND: Final = Fraction(45_359_237, 100_000)
_LITRE: Final = Fraction(1, 1000)
_GALLON: Final = 231 * _INCH**3
_ATMOSPHERE: Final = 101_325
_CALORIE: Final = Fraction(4184, 1000)
_PREFIXES: Final = {
    "n": -9,
    "μ": -6,
    "u": -6,
    "m": -3,
    "c": -2,
    "d": -1,
    "k": 3,
    "M": 6,
    "G": 9,
    "T": 12,
    "p": -12,
    "f": -15,
    "nano": -9,
    "micro": -6,
    "milli": -3,
    "centi": -2,
    "deci": -1,
    "kilo": 3,
    "mega": 6,
    "giga": 9,
    "tera": 12,
}

# Dimensions are products of powers: "length^2 time^-1". The gram and not the kilogram is the base of mass.
_SCALED: Final[dict[str, tuple[str, Fraction]]] = {
    "m meter metre": ("length", Fraction(1)),
    "g gram gm": ("mass", Fraction(1)),
    "s sec second": ("time", Fraction(1)),
    "L l liter litre": ("length^3", _LITRE),
    "A amp ampere": ("current", Fraction(1)),
    "mol mole": ("amount", Fraction(1)),
    "Hz hertz": ("time^-1", Fraction(1)),
    "N newton": ("mass length time^-2", Fraction(1000)),
    "Pa pascal": ("mass length^-1 time^-2", Fraction(1000)),
    "J joule": ("mass length^2 time^-2", Fraction(1000)),
    "W watt": ("mass length^2 time^-3", Fraction(1000)),
    "V volt": ("mass length^2 time^-3 current^-1", Fraction(1000)),
    "C coulomb": ("current time", Fraction(1)),
    "F farad": ("current^2 time^4 mass^-1 length^-2", Fraction(1, 1000)),
    "Ω ohm": ("mass length^2 time^-3 current^-2", Fraction(1000)),
    "T tesla": ("mass time^-2 current^-1", Fraction(1000)),
    "eV electronvolt": ("electronvolt", Fraction(1)),
    "cal calorie": ("mass length^2 time^-2", 1000 * _CALORIE),
    "bit": ("information", Fraction(1)),
    "B byte": ("information", Fraction(8)),
    "bar": ("mass length^-1 time^-2", Fraction(10**8)),
    "pc parsec": ("parsec", Fraction(1)),
    "K kelvin": ("temperature", Fraction(1)),
    "Wh watthour": ("mass length^2 time^-2", Fraction(1000 * _HOUR)),
}
_PLAIN: Final[dict[str, tuple[str, Fraction]]] = {
    "in inch inche": ("length", _INCH),
    "ft foot feet": ("length", _FOOT),
    "yd yard": ("length", 3 * _FOOT),
    "mi mile": ("length", _MILE),
    "AU au": ("astronomicalunit", Fraction(1)),
    "ly lightyear": ("lightyear", Fraction(1)),
    "t ton tonne": ("mass", Fraction(10**6)),
    "lb pound lbs": ("mass", _POUND),
    "oz ounce": ("mass", _POUND / 16),
    "min minute mins": ("time", Fraction(60)),
    "h hr hour hrs": ("time", Fraction(_HOUR)),
    "day": ("time", Fraction(24 * _HOUR)),
    "week wk": ("time", Fraction(7 * 24 * _HOUR)),
    "fortnight": ("time", Fraction(14 * 24 * _HOUR)),
    "month": ("month", Fraction(1)),
    "year yr yrs": ("month", Fraction(12)),
    "decade": ("month", Fraction(120)),
    "century centurie": ("month", Fraction(1200)),
    "acre": ("length^2", 4840 * (3 * _FOOT) ** 2),
    "hectare ha": ("length^2", Fraction(10**4)),
    "gal gallon": ("length^3", _GALLON),
    "qt quart": ("length^3", _GALLON / 4),
    "pt pint": ("length^3", _GALLON / 8),
    "cup": ("length^3", _GALLON / 16),
    "tablespoon tbsp": ("length^3", _GALLON / 256),
    "teaspoon tsp": ("length^3", _GALLON / 768),
    "floz": ("length^3", _GALLON / 128),
    "kmh kmph kph": ("length time^-1", Fraction(1000, _HOUR)),
    "mph": ("length time^-1", _MILE / _HOUR),
    "knot": ("length time^-1", Fraction(1852, _HOUR)),
    "atm atmosphere": ("mass length^-1 time^-2", Fraction(1000 * _ATMOSPHERE)),
    "mmHg torr": ("mmHg", Fraction(1)),
    "erg": ("mass length^2 time^-2", Fraction(1, 10**4)),
    "dyn dyne": ("mass length time^-2", Fraction(1, 100)),
    "rpm": ("revolution", Fraction(1)),
    "amu": ("amu", Fraction(1)),
    "Å angstrom": ("length", Fraction(1, 10**10)),
    "rad radian": ("radian", Fraction(1)),
    "degree deg °": ("degree", Fraction(1)),
    "arcminute arcmin": ("degree", Fraction(1, 60)),
    "arcsecond arcsec": ("degree", Fraction(1, 3600)),
    "°C celsius ℃": ("celsius", Fraction(1)),
    "°F fahrenheit ℉": ("fahrenheit", Fraction(1)),
    "dollar usd USD buck": ("dollar", Fraction(1)),
    "cent ¢": ("dollar", Fraction(1, 100)),
    "euro eur EUR €": ("euro", Fraction(1)),
    "£ GBP gbp sterling": ("sterling", Fraction(1)),
    "penny pence": ("sterling", Fraction(1, 100)),
    "rupee ₹ Rs Rs. INR": ("rupee", Fraction(1)),
    "yen ¥": ("yen", Fraction(1)),
    "yuan RMB": ("yuan", Fraction(1)),
    "percent %": ("percent", Fraction(1)),
    # Chinese measures and counters.
    "米": ("length", Fraction(1)), "厘米": ("length", Fraction(1, 100)), "毫米": ("length", Fraction(1, 1000)),
    "分米": ("length", Fraction(1, 10)), "千米 公里": ("length", Fraction(1000)),
    "平方米": ("length^2", Fraction(1)), "平方厘米": ("length^2", Fraction(1, 10**4)),
    "平方千米": ("length^2", Fraction(10**6)), "平方分米": ("length^2", Fraction(1, 100)),
    "立方米": ("length^3", Fraction(1)), "立方厘米 毫升": ("length^3", Fraction(1, 10**6)),
    "升 立方分米": ("length^3", _LITRE), "克": ("mass", Fraction(1)), "千克 公斤": ("mass", Fraction(1000)),
    "吨": ("mass", Fraction(10**6)), "秒": ("time", Fraction(1)), "分钟": ("time", Fraction(60)),
    "小时": ("time", Fraction(_HOUR)), "天 日": ("time", Fraction(24 * _HOUR)),
    "周 星期": ("time", Fraction(7 * 24 * _HOUR)), "月 个月": ("month", Fraction(1)), "年": ("month", Fraction(12)),
    "元 块": ("yuan", Fraction(1)), "角": ("yuan", Fraction(1, 10)), "度": ("degree", Fraction(1)),
    "米/秒": ("length time^-1", Fraction(1)), "千米/小时 千米/时": ("length time^-1", Fraction(1000, _HOUR)),
}  # fmt: skip
SINGLE_LETTERS: Final = frozenset("mgshLNJWVK")
"""Letters that are a unit behind a number where the other answer is a bare number or has a unit."""
_GENERIC: Final = frozenset(
    words("unit units square sq cubic cu of the a an in each total approximately about exactly sides length roughly")
)
_GLUE: Final = frozenset(words("of the a an"))


@dataclass(frozen=True)
class Unit:
    """A unit of measurement.

    Attributes:
        dimension: base dimensions with their powers.
        size: one of it in the base units.
    """

    dimension: frozenset[tuple[str, int]]
    size: Fraction


def _dimension(text: str, power: int = 1) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in text.split():
        name, _, own = part.partition("^")
        found[name] += power * int(own or 1)
    return found


def _table() -> dict[str, tuple[Counter[str], Fraction]]:
    table: dict[str, tuple[Counter[str], Fraction]] = {}
    for names, (dimension, size) in _SCALED.items():
        for name in words(names):
            for prefix, power in _PREFIXES.items():
                # A prefix in letters belongs to a unit in letters, one in words to a unit in words.
                if (len(prefix) > 1) == (len(name) > 3):
                    table.setdefault(prefix + name, (_dimension(dimension), size * Fraction(10) ** power))
    for names, (dimension, size) in (*_SCALED.items(), *_PLAIN.items()):
        for name in words(names):
            table[name] = (_dimension(dimension), size)
    return table


_TABLE: Final = _table()
_WORD = re.compile(r"[A-Za-zμΩÅ°¢€£₹¥℃℉%\u4e00-\u9fff]+\.?|\^?-?[0-9]+|[/·()²³]")


def plain_words(unit: str) -> str:
    r"""A unit as it stands in an answer without LaTeX: ``\text{ m}/\text{s}^{2}`` -> ``m/s^2``."""
    text = re.sub(r"\\frac\{([^{}]*(?:\{[^{}]*\})?[^{}]*)\}\{([^{}]*(?:\{[^{}]*\})?[^{}]*)\}", r"\1/\2", unit)
    text = text.replace(r"^\circ", " ° ").replace(r"\circ", "°").replace(r"\cdot", "·").replace(r"\times", "·")
    text = re.sub(r"\\(?:text|mathrm)", " ", text).replace("{", "").replace("}", "").replace("\\", " ")
    text = text.replace("²", "^2").replace("³", "^3").replace("~", " ").replace("*", "·").replace("µ", "μ")
    return re.sub(r"°\s*(?=[CF]\b)", "°", re.sub(r"\s+", " ", text)).strip(" .")


@lru_cache(maxsize=1024)
def parse_unit(unit: str) -> Unit | None:
    """The unit that a text is; None where a word of it is none."""
    text = plain_words(unit)
    text = re.sub(r"\bper\b", "/", text).replace("每", "/")
    text = re.sub(r"(?:\bdegrees?|°)\s*(?:C\b|[Cc]elsius\b)", "°C", text)
    text = re.sub(r"(?:\bdegrees?|°)\s*(?:F\b|[Ff]ahrenheit\b)", "°F", text)
    text = re.sub(r"\b(light)[ -](year)", r"\1\2", text).replace("fl oz", "floz").replace("fluid ounce", "floz")
    tokens = _WORD.findall(text)
    if not tokens or re.sub(r"\s", "", text) != "".join(tokens):
        return None
    dimension: Counter[str] = Counter()
    size = Fraction(1)
    sign, pending = 1, 1
    last: tuple[Counter[str], Fraction] | None = None
    for token in tokens:
        if token in ("/", "·", "(", ")"):
            sign = -1 if token == "/" else sign
            continue
        lower = token.lower().rstrip(".")
        power = _power_word(lower)
        if power and lower in ("square", "sq", "cubic", "cu"):
            pending = power
            continue
        if power or token.startswith("^") or token.lstrip("-").isdigit():
            if last is None:
                return None
            extra = (power or int(token.lstrip("^"))) - 1
            dimension.update({name: sign * extra * own for name, own in last[0].items()})
            size *= last[1] ** (sign * extra)
            continue
        if lower in _GLUE:
            continue
        entry = _entry(token)
        if entry is None:
            return None
        last = entry
        dimension.update({name: sign * pending * own for name, own in entry[0].items()})
        size *= entry[1] ** (sign * pending)
        pending = 1
    if last is None:
        return None
    return Unit(frozenset((name, power) for name, power in dimension.items() if power), size)


def _power_word(word: str) -> int:
    return {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}.get(word, 0)


def _entry(token: str) -> tuple[Counter[str], Fraction] | None:
    for word in (token, token.rstrip("."), token.lower().rstrip(".")):
        for spelling in (word, word[:-1] if word.endswith("s") and len(word) > 2 else word):
            # A single letter, or a prefix before one, keeps its case; words do not.
            if spelling in _TABLE and (len(spelling) > 3 or spelling in token or spelling == token.rstrip(".")):
                return _TABLE[spelling]
            if spelling in _TABLE and len(spelling) in (2, 3) and spelling.isalpha():
                return _TABLE[spelling]
    return None


def is_unit(text: str) -> bool:
    """Whether a text is a unit or a product and quotient of units."""
    return parse_unit(text) is not None


def stems(unit: str) -> frozenset[str]:
    """The words of something counted, without endings and words that say nothing: "of the apples" -> apple."""
    found = re.findall(r"[^\W\d_]+(?:\.[^\W\d_]+)*", plain_words(unit).lower())
    return frozenset(re.sub(r"(?<=\w\w)(?:es|s)$", "", word) for word in found if word not in _GENERIC)


_POWER_MARK = re.compile(r"\^(-?[0-9]+)|\b(?:square|sq|squared|cubic|cu|cubed)\b", re.IGNORECASE)
_RATE = re.compile(r"/|\bper\b|每")


def shape(unit: str) -> tuple[tuple[int, ...], bool]:
    """The powers in a unit, whatever it is a unit of, and whether it is one per another.

    "square units" are (2,), False. A known unit that is a power of a length has that power: an acre is square, too.
    """
    known = parse_unit(unit)
    if known is not None and [name for name, _ in known.dimension] == ["length"]:
        return tuple(power for _, power in known.dimension if power != 1), False
    text = plain_words(unit)
    found = (int(mark[1]) if mark[1] else _power_word(mark.group().lower()) for mark in _POWER_MARK.finditer(text))
    return tuple(sorted(power for power in found if power != 1)), _RATE.search(text) is not None
