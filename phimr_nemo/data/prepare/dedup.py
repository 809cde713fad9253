"""One question, once: exact and near duplicates over all sources, and which row of them is kept.

Exact duplicates have the same :func:`comparison_tokens` once what only stands around a question is taken off
(:mod:`phimr_nemo.data.sources.wrapping`; what is learned from a source counts only where the answers agree). Near
duplicates hold the same numbers, have the same answer after normalisation, and a Jaccard similarity of their token
3-grams of at least a threshold, estimated by MinHash (datasketch; Broder 1997). Numbers and answer must agree because
in mathematics one other number, or "center" for "radius", makes another question.

Of duplicates the best row is kept: one with an answer of its source, then one with a worked solution,
then one with more own labels, then the earliest. Every dropped row is similar to the row it is dropped for, not only
to another dropped one. Decisions need a few hundred bytes a question, most of them on disk.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from phimr_nemo.config import NearDuplicatesConfig

if TYPE_CHECKING:
    import numpy.typing as npt

SHINGLE_TOKENS: Final = 3
# 25 bands of 5 find a pair of similarity 0.8 with probability 1 - (1 - 0.8^5)^25 > 0.9999, one of 0.5 with 0.55.
ROWS_PER_BAND: Final = 5
MINHASH_SEED: Final = 1
# In a run of equal bands each question is held against so many better ones.
MAX_COMPARED: Final = 16
PAIRS_AT_ONCE: Final = 4096
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(29)

KEPT: Final = 0
EXACT: Final = 1
EXACT_OTHER_ANSWER: Final = 2
NEAR: Final = 3


class Signer:
    """MinHash signatures of questions.

    Args:
        permutations: the length of a signature.
    """

    def __init__(self, permutations: int) -> None:
        from datasketch import MinHash

        self._empty = MinHash(num_perm=permutations, seed=MINHASH_SEED, hashfunc=zlib.crc32)

    def sign(self, tokens: list[str]) -> npt.NDArray[np.uint32]:
        """The signature of a question's token 3-grams; of all its tokens together if there are fewer."""
        count = max(1, len(tokens) - SHINGLE_TOKENS + 1)
        shingles = {" ".join(tokens[start : start + SHINGLE_TOKENS]).encode() for start in range(count)}
        signature = self._empty.copy()
        signature.update_batch(sorted(shingles))
        return signature.hashvalues.astype(np.uint32)


@dataclass(frozen=True)
class Facts:
    """What decides about duplicates: one entry a question, in the order of sources and rows.

    Attributes:
        question: [n] 64-bit digest of the compared question.
        bare: [n] digest of the question without what its source puts around all questions, too.
        numbers: [n] digest of its numbers.
        answer: [n] digest of its compared answer.
        rank: [n] preference, the greater the better.
        signatures: [permutations, n] MinHash signatures, or None without near duplicates.
    """

    question: npt.NDArray[np.uint64]
    bare: npt.NDArray[np.uint64]
    numbers: npt.NDArray[np.uint64]
    answer: npt.NDArray[np.uint64]
    rank: npt.NDArray[np.int32]
    signatures: npt.NDArray[np.uint32] | None


@dataclass(frozen=True)
class Duplicates:
    """The decision, one entry a question.

    Attributes:
        kept: [n] the index of the row that stands for this one; its own where it is kept.
        reason: [n] KEPT, EXACT, EXACT_OTHER_ANSWER or NEAR.
        similarity: [n] estimated Jaccard similarity to the kept row; 1 for exact duplicates.
    """

    kept: npt.NDArray[np.int64]
    reason: npt.NDArray[np.uint8]
    similarity: npt.NDArray[np.float32]


def find_duplicates(facts: Facts, near: NearDuplicatesConfig | None) -> Duplicates:
    """Decide which questions are kept. Deterministic: the same facts give the same decision."""
    count = len(facts.question)
    found = Duplicates(
        kept=np.arange(count, dtype=np.int64),
        reason=np.full(count, KEPT, dtype=np.uint8),
        similarity=np.ones(count, dtype=np.float32),
    )
    # Position in the order of preference: best rank first, then earliest.
    preference = np.lexsort((np.arange(count), -facts.rank))
    place = np.empty(count, dtype=np.int64)
    place[preference] = np.arange(count)
    by_question = np.lexsort((place, facts.question))
    for run in _runs(facts.question[by_question]):
        best = by_question[run.start]
        for index in by_question[run.start + 1 : run.stop]:
            found.kept[index] = best
            found.reason[index] = EXACT if facts.answer[index] == facts.answer[best] else EXACT_OTHER_ANSWER
    _mark_wrapped(facts, found, place)
    if near is not None and facts.signatures is not None:
        _mark_near(facts, found, place, near)
    # A duplicate of a question that turned out a duplicate of another stands for what that one stands for.
    while (found.kept != found.kept[found.kept]).any():
        found.kept[:] = found.kept[found.kept]
    return found


def _mark_wrapped(facts: Facts, found: Duplicates, place: npt.NDArray[np.int64]) -> None:
    """Kept questions that are equal without their sources' wrappers and have the same answer.

    A learned wrapper may be a part of the question ("Find the area of this square:"), so the answer must agree.
    """
    rows = np.flatnonzero(found.reason == KEPT)
    key = _mix(facts.bare[rows], facts.answer[rows])
    order = np.lexsort((place[rows], key))
    for run in _runs(key[order]):
        best, *others = rows[order[run]].tolist()
        for index in others:
            if facts.bare[index] == facts.bare[best] and facts.answer[index] == facts.answer[best]:
                found.kept[index], found.reason[index] = best, EXACT


def _runs(keys: npt.NDArray[np.uint64]) -> Iterator[slice]:
    """The stretches of at least two equal keys in a sorted array."""
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.empty(0, np.int64)
    stops = np.append(starts[1:], len(keys))
    for start, stop in zip(starts[stops - starts > 1], stops[stops - starts > 1], strict=True):
        yield slice(int(start), int(stop))


def _mark_near(facts: Facts, found: Duplicates, place: npt.NDArray[np.int64], near: NearDuplicatesConfig) -> None:
    better: dict[int, list[tuple[int, float]]] = defaultdict(list)
    pairs = sorted(_candidate_pairs(facts, found, place, near))
    signatures = facts.signatures
    assert signatures is not None
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        worse_of, better_of = np.array(pairs[start : start + PAIRS_AT_ONCE], dtype=np.int64).T
        similarity = (signatures[:, worse_of] == signatures[:, better_of]).mean(axis=0)
        same = (facts.numbers[worse_of] == facts.numbers[better_of]) & (
            facts.answer[worse_of] == facts.answer[better_of]
        )
        for index in np.flatnonzero(same & (similarity >= near.threshold)):
            better[int(worse_of[index])].append((int(better_of[index]), float(similarity[index])))
    for worse in sorted(better, key=lambda index: place[index]):
        kept = [(share, -place[index], index) for index, share in better[worse] if found.reason[index] == KEPT]
        if kept:
            share, _, index = max(kept)
            found.kept[worse], found.reason[worse], found.similarity[worse] = index, NEAR, share


def _candidate_pairs(
    facts: Facts, found: Duplicates, place: npt.NDArray[np.int64], near: NearDuplicatesConfig
) -> set[tuple[int, int]]:
    """Pairs (worse, better) of kept questions with the same numbers and answer that agree in at least one band."""
    assert facts.signatures is not None
    rows = np.flatnonzero(found.reason == KEPT)
    same = _mix(facts.numbers[rows], facts.answer[rows])
    pairs: set[tuple[int, int]] = set()
    for first in range(0, near.permutations, ROWS_PER_BAND):
        key = same.copy()
        for row in range(first, first + ROWS_PER_BAND):
            key = _mix(key, facts.signatures[row, rows].astype(np.uint64))
        order = np.lexsort((place[rows], key))
        for run in _runs(key[order]):
            members = rows[order[run]].tolist()
            for position, worse in enumerate(members[1:], 1):
                pairs.update((worse, one) for one in members[max(0, position - MAX_COMPARED) : position])
                pairs.add((worse, members[0]))
    return pairs


def _mix(key: npt.NDArray[np.uint64], value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Both in one 64-bit hash (multiplication and shift; what collides is compared in full afterwards)."""
    mixed = key * _MULTIPLIER
    mixed = ((mixed ^ (mixed >> _SHIFT)) ^ value) * _MULTIPLIER
    return mixed ^ (mixed >> _SHIFT)
