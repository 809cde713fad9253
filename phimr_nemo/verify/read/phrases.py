"""Answers made of words, and of bare letters."""

from __future__ import annotations

import re
from typing import Final

from phimr_nemo.verify.read.names import words

MAX_SHORT_WORD: Final = 4
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’\-, ]*")
_FILLER = re.compile(r"\b(?:the|a|an|is|are|has|have|there|it|its|does|do|this|that|they)\b")
_SYNONYMS: Final = (
    (re.compile(r"\b(?:does not|doesn't|do not) exist\b|\bundefined\b|\bnonexistent\b"), "dne"),
    (
        re.compile(r"\bno (?:real |such |possible )?(?:solutions?|values?|roots?|answers?)(?: exists?)?\b"),
        "no solution",
    ),
    (re.compile(r"\b(?:empty set|none exist)\b"), "no solution"),
    (re.compile(r"\b(?:infinitely many|infinite)(?: solutions?)?\b"), "infinitely many"),
    (re.compile(r"\ball (?:the )?real(?: numbers?|s)\b"), "all reals"),
)
_EMPTY: Final = frozenset([r"\emptyset"])
_NOUNS: Final = frozenset(
    words("triangle angle number function line circle quadrilateral graph curve sequence series point integer side")
)
"""Nouns that may be left out behind the adjective that answers."""
_PRODUCTS: Final = (frozenset("abc"), frozenset("xyz"), frozenset("pqr"), frozenset("uvw"), frozenset("mnk"))
_LETTERS = re.compile(r"[A-Za-z]{3,}")
_TEXT_ALONE = re.compile(r"(?:\\text\{[^{}]*[^\W0-9_][^{}]*\}\s*)+")
_VOWEL_WITHIN = re.compile("(?<=.)[aeiouy]")
_SHORTEST: Final = frozenset(["no"])


def letters_differ(gold: str, predicted: str) -> bool:
    """Whether two keys are runs of the same letters in another order, which as words or sequences differ."""
    if not (_LETTERS.fullmatch(gold) and _LETTERS.fullmatch(predicted)):
        return False
    if gold == predicted or sorted(gold.lower()) != sorted(predicted.lower()):
        return False
    if gold.lower() == predicted.lower():
        # Names of points or outcomes keep their case, words do not.
        return gold.isupper() != predicted.isupper() and _VOWEL_WITHIN.search(gold.lower()) is None
    return not any(set(gold) <= family and set(predicted) <= family for family in _PRODUCTS)


def same_phrase(gold: str, predicted: str) -> bool | None:
    """Compare answers made of words; None where neither is, or where bare letters may be a product."""
    if letters_differ(gold.replace(" ", ""), predicted.replace(" ", "")):
        return False
    left, right = _words_of(gold), _words_of(predicted)
    if left is None and right is None:
        return None
    if left is not None and right is not None:
        if left == right or _same_but_for_a_noun(left, right) or _same_names(left, right):
            return True
        marked = r"\text{" in gold + predicted or max(len(left), len(right)) > MAX_SHORT_WORD
        return False if marked else None
    words_alone, other = (left, predicted) if left is not None else (right, gold)
    if words_alone == "no solution" and other.strip() in _EMPTY:
        return True
    only = gold if left is not None else predicted
    return False if r"\text{" in only or len(only) > MAX_SHORT_WORD else None


def is_phrase(text: str) -> bool:
    r"""Whether an answer is made of words alone, of any language inside ``\text``."""
    return _words_of(text) is not None or _TEXT_ALONE.fullmatch(text) is not None


def _words_of(text: str) -> str | None:
    r"""The words that an answer consists of, lower case; None when it is not made of words alone."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip(" .,;:!")
    if not _WORDS.fullmatch(plain):
        return None
    marked = r"\text{" in text
    if (
        not marked
        and plain.lower() not in _SHORTEST
        and (len(plain) < 3 or (" " not in plain and not plain.isalpha()))
    ):
        return None
    lowered = plain.lower().replace("’", "'")
    for pattern, word in _SYNONYMS:
        lowered = pattern.sub(word, lowered)
    lowered = re.sub(r"[\s\-]+", " ", _FILLER.sub(" ", lowered)).strip(" ,")
    first = lowered.split(",")[0].split(" ")[0]
    if first in ("yes", "no", "true", "false") and re.fullmatch(rf"{first}[ ,]*", lowered):
        return first
    return lowered or plain.lower()


def _same_but_for_a_noun(left: str, right: str) -> bool:
    short, long = sorted((left.split(" "), right.split(" ")), key=len)
    return len(long) == len(short) + 1 and long[:-1] == short and long[-1] in _NOUNS


def _same_names(left: str, right: str) -> bool:
    """Names in another order: "Alice and Bob" and "Bob and Alice"."""
    parts = [
        sorted(part for part in re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", text) if part) for text in (left, right)
    ]
    return len(parts[0]) > 1 and parts[0] == parts[1]
