"""Rows -> micro-batches with little padding, and their even distribution over optimizer steps and processes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phimr_nemo.losses import IGNORED_LABEL, TeacherStates
from phimr_nemo.training.throughput import Work


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s], the wanted token at each place, -100 where none.
        extras: what the loss needs besides, by name.
        documents: tokens of each document of a packed row [1, s]; they sum to s. Empty for padded rows.
        teacher: on the last pipeline stage, of the same tokens, where the loss is of whole distributions.
    """

    tokens: Tensor
    labels: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    documents: tuple[int, ...] = ()
    teacher: TeacherStates | None = None


def used_lengths(labels: Tensor) -> Tensor:
    """Places of each row up to its last label; what follows cannot change a causal model's log-probabilities.

    Args:
        labels: int64 [n, s], -100 where there is no label.

    Returns:
        int64 [n]; 0 for a row without labels.
    """
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return torch.where(labels != IGNORED_LABEL, places, 0).amax(dim=1)


def work_of(micro: MicroBatch) -> Work:
    """Return what a micro-batch asks for: places, tokens of documents, predicted tokens, causal pairs."""
    labelled = micro.labels != IGNORED_LABEL
    if micro.documents:
        parts = labelled[0].split(list(micro.documents))
        # A packed row may end with a document of padding.
        lengths = [len(part) for part in parts if bool(part.any())]
    else:
        lengths = used_lengths(micro.labels).tolist()
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Work(micro.tokens.numel(), sum(lengths), int(labelled.sum()), pairs)


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


def packed_row(
    tokens: Tensor, labels: Tensor, lengths: Sequence[int], *, multiple: int, pad_id: int
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Sequences laid end to end in one row, each a document of its own; padding at the end is one more.

    Args:
        tokens: int64 [n, s], padded on the right.
        labels: int64 [n, s], -100 where none.
        lengths: places of each sequence that the row takes, 1 to s.
        multiple: the row's length is a multiple of this.
        pad_id: token of the padding.

    Returns:
        Tokens [1, t], labels [1, t], and the documents' lengths, which sum to t.
    """
    padding = -sum(lengths) % multiple
    ids = [tokens[row, :length] for row, length in enumerate(lengths)]
    wanted = [labels[row, :length] for row, length in enumerate(lengths)]
    ids.append(torch.full((padding,), pad_id, dtype=tokens.dtype))
    wanted.append(torch.full((padding,), IGNORED_LABEL, dtype=labels.dtype))
    documents = (*lengths, padding) if padding else tuple(lengths)
    return torch.cat(ids)[None], torch.cat(wanted)[None], documents


def sequence_sums(values: Tensor, micro: MicroBatch) -> Tensor:
    """Sum of a micro-batch's values [b, s] over each of its sequences: rows, or the documents of a packed row.

    Args:
        values: one number a token.
        micro: where they belong.

    Returns:
        [b] or [documents], in order.
    """
    if not micro.documents:
        return values.sum(dim=1)
    # One sum a document, always in the same order: a scattered sum would not repeat itself on a GPU.
    return torch.stack([part.sum() for part in values[0].split(micro.documents)])


def by_sequence(values: Tensor, micro: MicroBatch, count: int) -> Tensor:
    """A micro-batch's values with one row a sequence: as they are, or taken apart where they come packed.

    Args:
        values: [b, s] one number a token; differentiable.
        micro: where they belong.
        count: sequences; what a packed row has behind them is padding.

    Returns:
        [count, longest], 0 behind the end of a packed sequence.
    """
    if not micro.documents:
        return values
    return pad_sequence(list(values[0].split(micro.documents)[:count]), batch_first=True)


def balanced_shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal rows to data-parallel ranks, longest first, each to the rank with the fewest tokens so far.

    Args:
        lengths: tokens of each row, at least one; there are no fewer rows than ranks.
        ranks: data-parallel size.

    Returns:
        [ranks] lists of row numbers, rising, none empty; one rank has all rows as they are.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tokens, rank = loads[0]
        shares[rank].append(row)
        heapq.heapreplace(loads, (tokens + lengths[row], rank))
    return [sorted(share) for share in shares]


def deal_rows(lengths: Sequence[int], parts: int, ranks: int, seed: int) -> list[list[list[int]]]:
    """Deal rows in random order to optimizer steps and, within each, evenly to data-parallel ranks.

    Args:
        lengths: tokens of each row.
        parts: optimizer steps.
        ranks: data-parallel size.
        seed: of the order.

    Returns:
        [parts][ranks] lists of row numbers: every row once, part sizes differing by at most one, rank sizes
        within a part likewise. Which rows share a part does not depend on `ranks`. The ranks of a part have nearly
        the same number of tokens: they differ by no more than the part's longest row.
    """
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(lengths)).tolist()
    return [_dealt_evenly(order[part::parts], lengths, ranks) for part in range(parts)]


def _dealt_evenly(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Longest first, a row to every rank in turn, back and forth; the rows of a rank stay in their order."""
    places = sorted(range(len(rows)), key=lambda place: -lengths[rows[place]])
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, place in enumerate(places):
        lap, position = divmod(turn, ranks)
        shares[position if lap % 2 == 0 else ranks - 1 - position].append(place)
    return [[rows[place] for place in sorted(share)] for share in shares]
