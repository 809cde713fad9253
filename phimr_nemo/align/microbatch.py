"""Rows -> micro-batches with little padding, and their even distribution over optimizer steps and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from phimr_nemo.losses import IGNORED_LABEL


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the wanted token at each place, -100 where none.
        extras: what the loss needs besides, by name.
    """

    tokens: Tensor
    labels: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


def used_lengths(labels: Tensor) -> Tensor:
    """Places of each row up to its last label; what follows cannot change a causal model's log-probabilities.

    Args:
        labels: int64 [n, s], -100 where there is no label.

    Returns:
        int64 [n]; 0 for a row without labels.
    """
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return torch.where(labels != IGNORED_LABEL, places, 0).amax(dim=1)


def chunks_by_length(lengths: Tensor, size: int) -> list[Tensor]:
    """Row numbers, longest first, in chunks of `size` (the last may be smaller).

    Args:
        lengths: [n].
        size: rows a chunk.

    Returns:
        int64 tensors that together hold 0..n-1 once.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    return list(order.split(size))


def trimmed_width(lengths: Tensor, width: int, multiple: int) -> int:
    """Columns to compute: the longest length, at least 1, as a multiple of `multiple`.

    Args:
        lengths: used lengths of the rows.
        width: columns that there are.
        multiple: sequence parallelism wants a multiple of the tensor-parallel size.
    """
    longest = max(int(lengths.max()), 1)
    return min(-(-longest // multiple) * multiple, -(-width // multiple) * multiple)


def cut(rows: Tensor, width: int, fill: int) -> Tensor:
    """The first `width` columns of [n, s]; columns that are missing are filled."""
    if rows.shape[1] >= width:
        return rows[:, :width].contiguous()
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill)


def deal_rows(rows: int, parts: int, ranks: int, seed: int) -> list[list[list[int]]]:
    """Deal rows in random order to optimizer steps and, within each, to data-parallel ranks.

    Args:
        rows: number of rows.
        parts: optimizer steps.
        ranks: data-parallel size.
        seed: of the order.

    Returns:
        [parts][ranks] lists of row numbers: every row once, part sizes differing by at most one, rank sizes
        within a part likewise. Which rows share a part does not depend on `ranks`.
    """
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(rows).tolist()
    return [[order[part::parts][rank::ranks] for rank in range(ranks)] for part in range(parts)]
