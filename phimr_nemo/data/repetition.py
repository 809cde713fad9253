"""How much of a response repeats itself: a rule-based measure, in linear memory and the time of one sort.

The measure is the one of Gopher's repetition rules (Rae et al. 2021, arXiv 2112.11446, table A1), the share of
characters inside duplicate n-grams, with three changes for long mathematical reasoning. Only later occurrences
count, not the first, so that what a reader would call new is never counted. A gram is 24 tokens long, since a
derivation repeats its formulas and 5 to 10 words often without looping. And a token is a run of letters or one
other sign, so that a loop without a space, or in a language without spaces, is seen as well.

A gram is compared by a rolling hash of its characters (Karp and Rabin 1987). The text is hostile, so grams of equal
hash are compared in full, and one false meeting makes the text go the slow way, by the grams themselves.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]

GRAM_TOKENS: Final = 24
TOKEN_LETTERS: Final = 16
"""Letters come in pieces of bounded length, so that one endless "word" is a loop as well."""
# A loop is at the end of a response: of a longer text the end is judged.
MAX_CHARS: Final = 1_000_000
REPETITIVE_ABOVE: Final = 0.3
"""From here on a response counts as repetitive. Of 5,428 recorded responses to competition questions,
1.2 % of the right ones lie above, and 98 % of the wrong ones longer than 60,000 characters (loops)."""

# Odd, so that it has an inverse modulo 2^64.
_BASE: Final = 0x9E3779B97F4A7C15
_WORD_BITS: Final = 64
# A table has 8 to 16 slots a gram.
_SPARE_BITS: Final = 3
_SIGN, _LETTER, _SPACE = 0, 1, 2
# No character above has white space; the last entry of the table stands for all of them.
_LAST_SPACE: Final = 0x3000


def repetition(text: str) -> float:
    """The share of a text that repeats what stands earlier in it.

    With tokens t_1..t_N (a run of up to 16 letters, or one other sign that is no space), the gram at i is
    (t_i, ..., t_{i+23}). A token is repeated when it lies in a gram that equals a gram starting further left.
    The share is the characters of repeated tokens over the characters of all tokens. A text of k copies of one
    long passage gives (k - 1) / k.

    Args:
        text: a response; of one longer than `MAX_CHARS` its last `MAX_CHARS` characters count.

    Returns:
        A share in [0, 1]; 0 for a text of fewer than two grams.
    """
    signs, bounds = _tokens(text[-MAX_CHARS:])
    grams = len(bounds) - GRAM_TOKENS
    if grams < 2:
        return 0.0
    starts, ends = bounds[:grams], bounds[GRAM_TOKENS:]
    repeated = _repeated(signs, starts, ends)
    # +1 where a repeated gram begins and -1 behind its end: the running sum is the number of grams over a token.
    edges = np.zeros(len(bounds), np.int64)
    edges[repeated] += 1
    edges[repeated + GRAM_TOKENS] -= 1
    covered = np.cumsum(edges)[:-1] > 0
    return float(np.diff(bounds)[covered].sum() / len(signs))


def _tokens(text: str) -> tuple[Codes, Places]:
    """The characters of a text without its spaces, and where its tokens begin and the last one ends.

    Returns:
        Twice the code of each character, plus one where a token begins, [characters]; and [tokens + 1].
    """
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds().take(codes, mode="clip")
    begins = kinds != _LETTER
    begins[1:] |= begins[:-1]
    begins[:1] = True
    dense = np.flatnonzero(kinds != _SPACE)
    starts = np.flatnonzero(begins[dense])
    lengths = np.diff(starts, append=len(dense))
    if (lengths > TOKEN_LETTERS).any():
        pieces = -(-lengths // TOKEN_LETTERS)
        before = np.cumsum(pieces) - pieces
        piece = np.arange(pieces.sum()) - np.repeat(before, pieces)
        starts = np.repeat(starts, pieces) + TOKEN_LETTERS * piece
    signs = codes[dense].astype(np.uint32) * np.uint32(2)
    signs[starts] += np.uint32(1)
    return signs, np.append(starts, len(dense))


@cache
def _kinds() -> npt.NDArray[np.uint8]:
    """What each character is; the last entry is for all that follow."""
    kinds = [
        _SPACE if chr(code).isspace() else _LETTER if chr(code).isascii() and chr(code).isalpha() else _SIGN
        for code in range(_LAST_SPACE + 1)
    ]
    return np.array([*kinds, _SIGN], np.uint8)


def _repeated(signs: Codes, starts: Places, ends: Places) -> Places:
    """The grams that equal one further left, in ascending order."""
    hashes = _hashes(signs, starts, ends)
    places = _crowded(hashes)
    order = places[np.argsort(hashes[places], kind="stable")]
    follows = hashes[order[1:]] == hashes[order[:-1]]
    previous = np.full(len(hashes), -1)
    previous[order[1:][follows]] = order[:-1][follows]
    later = np.flatnonzero(previous >= 0)
    if not _are_equal(signs, starts, ends, later, previous[later]):
        return _repeated_by_grams(signs, starts, ends)
    return later


def _crowded(hashes: Hashes) -> Places:
    """The grams that may share their hash with another: those alone in their slot of a table need no sorting."""
    bits = len(hashes).bit_length() + _SPARE_BITS
    slots = (hashes >> np.uint64(_WORD_BITS - bits)).astype(np.int64)
    places = np.arange(len(hashes), dtype=np.int32)
    table = np.empty(1 << bits, np.int32)
    table[slots] = places
    crowded = np.zeros(1 << bits, np.bool_)
    crowded[slots[table[slots] != places]] = True
    return np.flatnonzero(crowded[slots])


def _hashes(signs: Codes, starts: Places, ends: Places) -> Hashes:
    """A hash of each gram: sum over its characters c_j, j from 0, of c_j * BASE^j, modulo 2^64."""
    power, inverse = _powers(1 << (len(signs) - 1).bit_length())
    sums = np.zeros(len(signs) + 1, np.uint64)
    np.cumsum(signs * power[: len(signs)], out=sums[1:])
    hashes: Hashes = (sums[ends] - sums[starts]) * inverse[starts]
    return hashes


@cache
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """BASE^j and BASE^-j modulo 2^64 for j from 0."""
    tables = []
    for base in (_BASE, pow(_BASE, -1, 1 << _WORD_BITS)):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        tables.append(np.cumprod(factors))
    return tables[0], tables[1]


def _are_equal(signs: Codes, starts: Places, ends: Places, later: Places, earlier: Places) -> bool:
    """Whether the grams of each pair are equal: neighbours at one distance are compared as one stretch of text."""
    breaks = np.flatnonzero((np.diff(later) != 1) | (np.diff(earlier) != 1)) + 1
    heads, tails = np.append(0, breaks), np.append(breaks, len(later)) - 1
    if not len(later):
        return True
    text, width = signs.tobytes(), signs.itemsize
    spans = (starts[later[heads]], ends[later[tails]], starts[earlier[heads]], ends[earlier[tails]])
    return all(
        text[start:end] == text[other_start:other_end]
        for start, end, other_start, other_end in zip(*((width * span).tolist() for span in spans), strict=True)
    )


def _repeated_by_grams(signs: Codes, starts: Places, ends: Places) -> Places:
    """As :func:`_repeated`, by a set of the grams themselves."""
    seen: set[bytes] = set()
    repeated = []
    for place, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        gram = signs[start:end].tobytes()
        if gram in seen:
            repeated.append(place)
        seen.add(gram)
    return np.array(repeated, np.int64)
