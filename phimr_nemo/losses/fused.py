"""What is done to a chunk's logits element by element, in one pass on a GPU over logits that stay in their format.

In plain PyTorch (:mod:`phimr_nemo.losses.logprobs`, the reference, and what a CPU runs) every step of it reads and
writes the whole chunk in float32. Here a pass reads each logit once, in its own format, and computes in float32; the
gradient is written over the logits that it is of.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK: Final = 4096
"""Logits that a program has in hand: 8 KB of bfloat16."""

LOWEST: Final = tl.constexpr(-1e30)
"""Below every logit, and finite: 0 times it is 0."""


def statistics(
    logits: Tensor,
    columns: Tensor,
    owned: Tensor,
    temperature: float,
    maximum: Tensor,
    sums: Tensor,
    *,
    block: int = BLOCK,
) -> None:
    """Fill ``maximum`` [chunk] and ``sums`` [2 or 3, chunk] from logits [chunk, words], as the reference does.

    Args:
        logits: before the temperature.
        columns: int64 [chunk], each label's column.
        owned: bool [chunk], whether it is one of this rank's.
        temperature: divides the logits.
        maximum: float32, of each row.
        sums: float32: of the exponentials, the label's logit, and with a third row of exponential * shifted logit.
        block: logits a program takes at a time, a power of 2.
    """
    rows, vocabulary = logits.shape
    _statistics[(rows,)](
        logits,
        columns,
        owned,
        maximum,
        sums,
        logits.stride(0),
        sums.stride(0),
        vocabulary,
        temperature,
        WITH_ENTROPY=sums.shape[0] > 2,
        BLOCK=block,
    )


def gradient(
    logits: Tensor,
    columns: Tensor,
    owned: Tensor,
    temperature: float,
    log_sum_exp: Tensor,
    scale: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    *,
    block: int = BLOCK,
) -> Tensor:
    """scale * ([v = y] - p_v), with `of_entropy` also factor * -p_v (log p_v + entropy).

    Args:
        logits, columns, owned, temperature, block: as for :func:`statistics`.
        log_sum_exp: float32 [chunk], of the logits divided by the temperature.
        scale: float32 [chunk].
        of_entropy: a factor and the entropy of each row.
        dtype: of the gradient.

    Returns:
        [chunk, words], written over the logits where they have that format.
    """
    rows, vocabulary = logits.shape
    found = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    factor, entropy = (scale, scale) if of_entropy is None else of_entropy
    _gradient[(rows, triton.cdiv(vocabulary, block))](
        logits,
        found,
        columns,
        owned,
        log_sum_exp,
        scale,
        factor,
        entropy,
        logits.stride(0),
        found.stride(0),
        vocabulary,
        temperature,
        WITH_ENTROPY=of_entropy is not None,
        BLOCK=block,
    )
    return found


@triton.jit
def _statistics(
    logits: tl.tensor,
    columns: tl.tensor,
    owned: tl.tensor,
    maximum: tl.tensor,
    sums: tl.tensor,
    row_stride: tl.tensor,
    sum_stride: tl.tensor,
    vocabulary: tl.tensor,
    temperature: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * row_stride
    largest = LOWEST
    total = 0.0
    weighted = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(start_of_row + at, mask=inside, other=LOWEST).to(tl.float32) / temperature
        new = tl.maximum(largest, tl.max(tl.where(inside, z, LOWEST), 0))
        shifted = tl.where(inside, z - new, 0.0)
        exponentials = tl.where(inside, tl.exp(shifted), 0.0)
        decay = tl.exp(largest - new)
        if WITH_ENTROPY:
            weighted = decay * (weighted + (largest - new) * total) + tl.sum(exponentials * shifted, 0)
        total = decay * total + tl.sum(exponentials, 0)
        largest = new
    tl.store(maximum + row, largest)
    tl.store(sums + row, total)
    mine = tl.load(owned + row)
    label = tl.load(start_of_row + tl.load(columns + row)).to(tl.float32) / temperature
    tl.store(sums + sum_stride + row, tl.where(mine, label, 0.0))
    if WITH_ENTROPY:
        tl.store(sums + 2 * sum_stride + row, weighted)


@triton.jit
def _gradient(
    logits: tl.tensor,
    gradients: tl.tensor,
    columns: tl.tensor,
    owned: tl.tensor,
    log_sum_exp: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    entropy: tl.tensor,
    row_stride: tl.tensor,
    gradient_stride: tl.tensor,
    vocabulary: tl.tensor,
    temperature: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    z = tl.load(logits + row * row_stride + at, mask=inside, other=0.0).to(tl.float32) / temperature
    log_p = z - tl.load(log_sum_exp + row)
    p = tl.exp(log_p)
    weight = tl.load(scale + row)
    label = tl.where(tl.load(owned + row), tl.load(columns + row), -1)
    found = tl.where(at == label, weight, 0.0) - p * weight
    if WITH_ENTROPY:
        found -= p * tl.load(factor + row) * (log_p + tl.load(entropy + row))
    tl.store(gradients + row * gradient_stride + at, found.to(gradients.dtype.element_ty), mask=inside)
