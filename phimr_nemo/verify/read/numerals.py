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
        for and point either neither nor versus square-root nothing off bc"""
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


def _whole(parts: list[str]) -> Fraction | None:
    total = current = 0
    seen = False
    for part in parts:
        if part == "and" and seen:
            continue
        if part in _ONES or part in _TENS:
            current += _ONES.get(part, 0) + _TENS.get(part, 0)
        elif part == "hundred":
            current = (current or 1) * 100
        elif part in _LARGE:
            total += (current or 1) * _LARGE[part]
            current = 0
        else:
            return None
        seen = True
    return Fraction(total + current) if seen else None
