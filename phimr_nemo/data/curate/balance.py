"""Caps and balance: which rows of a set stay when there are more of a kind than wanted. By content, so that the order
of shards decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phimr_nemo.config.data import BalanceKey, Cap
from phimr_nemo.data.curate.fates import Fates, Indices, balanced, length_classes
from phimr_nemo.data.curate.narrow import UNKNOWN_DIFFICULTY, Narrow, label_hash
from phimr_nemo.data.fate import Fate
from phimr_nemo.data.outofcore import first_of_runs
from phimr_nemo.store.records import DIFFICULTIES

Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Kinds:
    """What caps and balance look at; every array is [candidates].

    Attributes:
        order: distinct numbers that do not depend on the shards: hashes.
        domain, source: hashes of the labels.
        difficulty: its place among the difficulties.
        length: its length class.
    """

    order: npt.NDArray[np.uint64]
    domain: npt.NDArray[np.uint64]
    source: npt.NDArray[np.uint64]
    difficulty: npt.NDArray[np.uint8]
    length: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, narrow: Narrow) -> Kinds:
        """Of rollouts."""
        names = ("rollout", "domain", "source", "difficulty")
        order, domain, source, difficulty = (np.array(narrow[name]) for name in names)
        return cls(order, domain, source, difficulty, length_classes(narrow))

    @classmethod
    def joined(cls, parts: Sequence[Kinds]) -> Kinds:
        """Of parts that follow each other."""
        names = ("order", "domain", "source", "difficulty", "length")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def chosen_fates(kinds: Kinds, *, caps: Sequence[Cap], balance: Sequence[BalanceKey], size: int | None) -> Fates:
    """KEPT, CAPPED or BALANCE for every candidate.

    Caps are applied one after another, then what is left is balanced (see :func:`.fates.balanced`) over the cells of
    all labels in `balance`.

    Args:
        kinds: the candidates.
        caps: rows of a label at most; those of the smallest order stay.
        balance: the labels of the cells.
        size: rows to keep; None = all.

    Returns:
        [candidates].
    """
    fates = np.zeros(len(kinds.order), np.uint8)
    for cap in caps:
        fates[_over(cap, kinds, np.flatnonzero(fates == Fate.KEPT))] = Fate.CAPPED
    if size is not None:
        left = np.flatnonzero(fates == Fate.KEPT)
        cells = np.zeros(len(left), np.int64)
        for key in balance:
            values, codes = np.unique(getattr(kinds, key)[left], return_inverse=True)
            cells = cells * len(values) + codes
        _, cells = np.unique(cells, return_inverse=True)
        fates[left[~balanced(cells, kinds.order[left], size)]] = Fate.BALANCE
    return fates


def _over(cap: Cap, kinds: Kinds, left: Indices) -> Indices:
    """The candidates that a cap drops."""
    labels = getattr(kinds, cap.by)
    if cap.value is not None:
        left = left[labels[left] == _code(cap)]
    by_label = left[np.lexsort((kinds.order[left], labels[left]))]
    ranks = np.arange(len(by_label)) - first_of_runs(labels[by_label])
    return np.asarray(by_label[ranks >= cap.rows])


def _code(cap: Cap) -> int:
    if cap.by != "difficulty":
        return label_hash(cap.value)
    return DIFFICULTIES.index(cap.value) if cap.value in DIFFICULTIES else UNKNOWN_DIFFICULTY + 1
