"""What decides about a candidate, in some fifty bytes and a MinHash signature: the columns of every global decision.

They are taken piece by piece, by any number of processes, and are all that the reduce sorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.prepare.dedup import ROWS_PER_BAND, SIGNATURE_ITEM_BYTES, Candidates, band_names

if TYPE_CHECKING:
    import pyarrow as pa


def narrow_schema(permutations: int) -> pa.Schema:
    """The columns of a piece; without near duplicates (`permutations` 0) no bands and no signature.

    row: see :class:`.dedup.Candidates`. question, bare, numbers, answer: 64-bit digests. rank: preference. unsure:
    no answer of its own, or a voted one. domain, difficulty: a label's place from 1, or 0. band_*: keys under which
    near duplicates meet.
    """
    import pyarrow as pa

    digests = [(name, pa.uint64()) for name in ("question", "bare", "numbers", "answer")]
    bands = [(name, pa.uint64()) for name in band_names(permutations // ROWS_PER_BAND)]
    signature = [("signature", pa.binary(permutations * SIGNATURE_ITEM_BYTES))] if permutations else []
    small = [("rank", pa.uint8()), ("unsure", pa.bool_()), ("domain", pa.uint8()), ("difficulty", pa.uint8())]
    return pa.schema([("row", pa.int64()), *digests, *small, *bands, *signature])


def label_code(label: str | None, labels: Sequence[str]) -> int:
    """A label in a byte; 0 for none."""
    return labels.index(label) + 1 if label is not None else 0


@dataclass(frozen=True)
class Facts:
    """What is held in memory of all candidates.

    Attributes:
        rank: [n] preference, the greater the better.
        unsure: [n] whether it has no answer of its own, or a voted one.
        labels: [n, 2] codes of domain and difficulty.
    """

    rank: npt.NDArray[np.uint8]
    unsure: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.uint8]


_FACTS: Final = ("rank", "unsure", "domain", "difficulty")


def read_facts(candidates: Candidates) -> Facts:
    """Read every file of narrow columns once."""
    import pyarrow.parquet as pq

    found: list[list[npt.NDArray[Any]]] = []
    for path in candidates.files:
        table = pq.read_table(path, columns=list(_FACTS))
        found.append([table.column(name).to_numpy() for name in _FACTS])
    rank, unsure, domain, difficulty = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Facts(rank, unsure, np.stack([domain, difficulty], axis=1))
