"""Numbers written in words: "thirteen", "two hundred and five", "two thirds", "5 million"."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from phimr_nemo.verify.read.names import words

_ONES: Final = {
    word: value
    for value, word in enumerate(
        words(
            """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
            seventeen eighteen nineteen"""
        )
    )
}
_TENS: Final = {
    word: 10 * value
    for value, word in enumerate(words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)
}
_LARGE: Final = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS: Final = {
    "half": 2, "halve": 2, "halves": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000,
}  # fmt: skip
SCALES: Final[dict[str, Fraction]] = {
    "hundred": Fraction(100),
    "dozen": Fraction(12),
    "gross": Fraction(144),
    "lakh": Fraction(10**5),
    "crore": Fraction(10**7),
    **{word: Fraction(value) for word, value in _LARGE.items()},
    **{word: Fraction(1, value) for word, value in _PARTS.items()},
    "万": Fraction(10**4),
    "亿": Fraction(10**8),
    "千万": Fraction(10**7),
    "百万": Fraction(10**6),
}
"""Words that multiply the number before them."""
CHANGING: Final = frozenset(
    words(
        """squared cubed factorial minus plus times divided over mod modulo remainder base below above under negative
        double triple twice not except without power root or more less fewer least most than between to if when where
        for and point either neither nor versus square-root nothing off bc score"""
    )
)
"""Words that change what the number before them says: they are no unit."""
NUMBER_WORDS: Final = frozenset([*_ONES, *_TENS])


def scale_of(word: str) -> Fraction | None:
    """What a word multiplies the number before it by; None for another word."""
    word = word.lower().strip(".,")
    return SCALES.get(word) or SCALES.get(word.removesuffix("s"))


def number_of_words(text: str) -> Fraction | None:
    """The number that English words say, or None."""
    parts = [part for part in re.split(r"[\s\-]+", text.lower().strip()) if part]
    negative = bool(parts) and parts[0] in ("minus", "negative")
    parts = parts[1:] if negative else parts
    if not parts or len(parts) > 12:
        return None
    denominator = _PARTS.get(parts[-1]) or _PARTS.get(parts[-1].removesuffix("s"))
    if denominator and len(parts) == 2:
        top = 1 if parts[0] in ("a", "an") else _ONES.get(parts[0])
        value = None if top is None else Fraction(top, denominator)
    else:
        value = _whole(parts)
    return None if value is None else (-value if negative else value)


_UNITS: Final = "|".join(list(_ONES)[1:10])
_TEENS: Final = "|".join(list(_ONES)[10:])
_SMALL: Final = rf"(?:(?:{'|'.join(_TENS)})(?: (?:{_UNITS}))?|{_TEENS}|{_UNITS})"
_GROUP: Final = rf"(?:(?:{_SMALL} )?hundred(?: (?:and )?{_SMALL})?|{_SMALL})"
_WHOLE: Final = re.compile(
    "".join(rf"(?:(?:(?P<{large}>{_GROUP}) )?(?P<of_{large}>{large})(?:\s|$))?" for large in reversed(_LARGE))
    + rf"(?:(?<=.)and )?(?P<rest>{_GROUP})?"
)


def _whole(parts: list[str]) -> Fraction | None:
    """Words in the order of English, "two hundred and five thousand six"; two numbers side by side are none."""
    if parts == ["zero"]:
        return Fraction(0)
    match = _WHOLE.fullmatch(" ".join(parts))
    if match is None or not parts or parts[-1] == "and":
        return None
    groups = [(size, match[large]) for large, size in _LARGE.items() if match[f"of_{large}"]]
    return Fraction(sum(size * _group(said or "one") for size, said in [*groups, (1, match["rest"] or "zero")]))


def _group(said: str) -> int:
    """A number below a thousand, or some hundreds."""
    hundreds, separator, rest = said.rpartition("hundred")
    total = sum(_ONES.get(word, 0) + _TENS.get(word, 0) for word in rest.split())
    return total + (100 * (_group(hundreds.strip()) or 1) if separator else 0)
