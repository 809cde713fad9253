"""Inequalities that bound no single variable, and expressions whose parameter stands for all integers."""

from __future__ import annotations

import re
from typing import Final

from phimr_nemo.verify.read.expression import Relation, Symbolic, check_plain, same_expression
from phimr_nemo.verify.read.normalise import key
from phimr_nemo.verify.read.quantity import Number

_INTEGERS = re.compile(
    r"\s*[,;(]?\s*(?:\\text\{\s*,?\s*(?:where|for|with|and)?\s*\}\s*)?\(?\s*"
    r"(?:[a-zA-Z]\s*\\in\s*(?:\\mathbb\s*\{?\s*Z\s*\}?|Z)"
    r"|\\text\{\s*\(?(?:where |for )?(?:any |some )?(?:[a-zA-Z] )?(?:is )?"
    r"(?:an |any )?integers?(?: [a-zA-Z])?\)?\s*\}"
    r"|[a-zA-Z]\s*\\text\{\s*(?:is )?(?:an |any )?integer\s*\})\s*\)?\s*$"
)


def without_integers(text: str) -> tuple[str, bool]:
    r"""An answer without ``k \in \mathbb{Z}`` behind it, and whether that was there."""
    match = _INTEGERS.search(text)
    return (text[: match.start()].strip(), True) if match and match.start() > 0 else (text, False)


class Family:
    """Decisions about expressions whose parameter stands for all integers."""

    def __init__(self, symbolic: Symbolic) -> None:
        self._symbolic = symbolic

    def equal(self, gold: str, predicted: str, rounding: Number | None, *, family: bool = True) -> bool:
        """Whether two families are the same."""
        return self._symbolic.equal(gold, predicted, rounding, family=family)

    def same_relation(self, gold: Relation, predicted: Relation) -> bool:
        """Whether two relations are the same; a parameter changes nothing."""
        return self._symbolic.same_relation(gold, predicted)


ORDER = re.compile(r"<|>|\\leq|\\geq")
_FLIPPED: Final = {">": "<", r"\geq": r"\leq"}


def same_inequality(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    """Inequalities that are no bounds on one variable: the same up to a positive factor, read in either direction."""
    first, second = _ascending(gold), _ascending(predicted)
    if first is None or second is None or first[1] != second[1]:
        return key(gold) == key(predicted)
    if len(first[0]) > 2:
        return all(same_expression(a, b, symbolic) for a, b in zip(first[0], second[0], strict=True))
    for side, texts in (("answer", first[0]), ("response", second[0])):
        for text in texts:
            check_plain(side, text)
    pair = [(texts[0], sign, texts[1]) for texts, (sign,) in (first, second)]
    return symbolic.same_relation(pair[0], pair[1])


def _ascending(text: str) -> tuple[list[str], list[str]] | None:
    """The sides of a chain of inequalities from the smallest to the largest, with the signs between them."""
    sides, signs = [part.strip() for part in ORDER.split(text)], ORDER.findall(text)
    if not all(sides) or len(signs) != len(sides) - 1 or not signs:
        return None
    downward = [sign in _FLIPPED for sign in signs]
    if all(downward):
        return sides[::-1], [_FLIPPED[sign] for sign in signs][::-1]
    return None if any(downward) else (sides, signs)
