"""Context parallelism: which tokens of a sequence each rank of the context group computes.

A sequence is padded to a multiple of 2 n tokens (n ranks) and cut into 2 n equal chunks; rank r computes chunks r and
2 n - 1 - r. Early chunks attend to little and late ones to much, so every such pair has the same causal work. In
packed rows this is done document by document. Megatron-Core's rotation and Transformer Engine's attention use the
same order, and need it.

Everything here is index arithmetic without communication, except :func:`gather_tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

NO_TOKEN: Final = -1
"""In place of a token's number where there is only padding."""

CHUNKS_A_RANK: Final = 2


@dataclass(frozen=True)
class ContextPlan:
    """Where the tokens of a row go; `places` count through rank 0's tokens, then rank 1's, and so on.

    Attributes:
        lengths: int64 [documents], with the padding at each document's end (tokens).
        tokens: int64 [ranks, local], the row's token at each place of each rank, ``NO_TOKEN`` at padding.
        positions: int64 [ranks, local], its position in its document.
        documents: int64 [ranks, local], the number of its document.
        in_order: int64 [padded tokens], the place of each token of the padded row, in the row's order.
        places: int64 [tokens], the same without the padding.
    """

    lengths: Tensor
    tokens: Tensor
    positions: Tensor
    documents: Tensor
    in_order: Tensor
    places: Tensor


def padded_lengths(lengths: Tensor, ranks: int, multiple: int = 1) -> Tensor:
    """Lengths that the ranks can share.

    Args:
        lengths: int [documents], positive (tokens).
        ranks: of the context group.
        multiple: what the number of each rank's tokens is to be a multiple of.

    Returns:
        int64 [documents]: each the next multiple of 2 `ranks`; the last one such that `multiple` divides what each
        rank has.
    """
    chunks = CHUNKS_A_RANK * ranks
    padded = -(-lengths.to(torch.int64) // chunks) * chunks
    padded[-1] += -padded.sum() % (ranks * math.lcm(CHUNKS_A_RANK, multiple))
    return padded


def plan_context(lengths: Tensor, ranks: int, multiple: int = 1) -> ContextPlan:
    """Share the documents of a row (or one sequence) among the ranks of a context group.

    Args:
        lengths, ranks, multiple: as for :func:`padded_lengths`.
    """
    lengths = lengths.to(torch.int64)
    padded = padded_lengths(lengths, ranks, multiple)
    total = int(padded.sum())
    device = lengths.device

    def spread(of_document: Tensor) -> Tensor:
        return torch.repeat_interleave(of_document, padded, output_size=total)

    starts = spread(torch.cumsum(padded, 0) - padded)
    positions = torch.arange(total, device=device) - starts
    chunk_lengths = spread(padded // (CHUNKS_A_RANK * ranks))
    chunks = positions // chunk_lengths
    is_late = chunks >= ranks
    owners = torch.where(is_late, CHUNKS_A_RANK * ranks - 1 - chunks, chunks)
    offsets = starts // ranks + positions % chunk_lengths + torch.where(is_late, chunk_lengths, 0)
    in_order = owners * (total // ranks) + offsets

    is_token = positions < spread(lengths)
    tokens = torch.where(is_token, spread(torch.cumsum(lengths, 0) - lengths) + positions, NO_TOKEN)
    documents = spread(torch.arange(len(lengths), device=device))
    row_order = torch.argsort(in_order)
    return ContextPlan(
        lengths=padded,
        tokens=tokens[row_order].view(ranks, -1),
        positions=positions[row_order].view(ranks, -1),
        documents=documents[row_order].view(ranks, -1),
        in_order=in_order,
        places=in_order[is_token],
    )


def take_tokens(rows: Tensor, tokens: Tensor, fill: int) -> Tensor:
    """The chosen tokens of every row.

    Args:
        rows: [b, t].
        tokens: int64 [local], column numbers or ``NO_TOKEN``.
        fill: the value at ``NO_TOKEN``.

    Returns:
        [b, local].
    """
    return rows[:, tokens.clamp(min=0)].masked_fill(tokens == NO_TOKEN, fill)


def gather_tokens(local: Tensor, places: Tensor, group: Any) -> Tensor:
    """Bring the ranks' tokens together in the given order, on every rank. Collective.

    Backward sums the ranks' gradients and gives each rank its part: what every rank does with the result counts.
    With one and the same loss on all n ranks a gradient is thus n times as large, as if the ranks were n
    data-parallel replicas; Megatron divides by the sum of all their token counts.

    Args:
        local: [local, ...], this rank's tokens.
        places: int64 [tokens], e.g. ``ContextPlan.places``.
        group: the context group.

    Returns:
        [tokens, ...].
    """
    return gather_from_sequence_parallel_region(local, group=group).index_select(0, places)
