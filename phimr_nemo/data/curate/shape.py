"""How many responses there are of each difficulty and length: small tables that reports are drawn from."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.lengths import CHARACTERS_PER_TOKEN
from phimr_nemo.store.records import DIFFICULTIES

SHAPE_FILE: Final = "shape.json"
BINS_PER_DOUBLING: Final = 2
LENGTH_BINS: Final = 36
"""Of lengths in tokens: bin b begins at 2^(b/2), the last one has no end."""
TIERS: Final = (*DIFFICULTIES, "unknown")
CHUNK_ROWS: Final = 1 << 16

Counts = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def length_bins(tokens: npt.NDArray[np.integer], characters: npt.NDArray[np.integer]) -> Bytes:
    """The length class of each response; estimated from its characters where its tokens are unknown (negative)."""
    known = np.where(tokens >= 0, tokens, characters / CHARACTERS_PER_TOKEN)
    places = np.floor(BINS_PER_DOUBLING * np.log2(np.maximum(known, 1)))
    return np.clip(places, 0, LENGTH_BINS - 1).astype(np.uint8)


def bin_start(place: int) -> float:
    """The tokens at which a length class begins."""
    return float(2 ** (place / BINS_PER_DOUBLING))


def shape(difficulty: Bytes, bins: Bytes) -> Counts:
    """Responses by difficulty (the last row: unknown) and length class, [tiers, bins]."""
    cells = difficulty.astype(np.int64) * LENGTH_BINS + bins
    return np.bincount(cells, minlength=len(TIERS) * LENGTH_BINS).reshape(len(TIERS), LENGTH_BINS)


def shape_where(mask_of: Bytes, value: int, difficulty: Bytes, bins: Bytes) -> Counts:
    """:func:`shape` of the rows with `mask_of == value`, in memory that does not grow with the rows."""
    total = np.zeros((len(TIERS), LENGTH_BINS), np.int64)
    for start in range(0, len(mask_of), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        chosen = mask_of[part] == value
        total += shape(difficulty[part][chosen], bins[part][chosen])
    return total
