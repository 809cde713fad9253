"""The fused rotation of queries and keys: whole rows, packed documents, and a context rank's part of either."""

from __future__ import annotations

import torch
from torch import Tensor

from .names import NVTE_QKV_Format


def _packed_positions(boundaries: Tensor, tokens: int, ranks: int, rank: int) -> Tensor:
    """Each token's position in its document. A context rank has the `rank`-th of 2 x `ranks` equal parts of every
    document, and the same one from the end."""
    if boundaries.dtype != torch.int32:
        raise TypeError(f"boundaries in {boundaries.dtype}")
    positions = []
    for length in (boundaries[1:] - boundaries[:-1]).tolist():
        if length % ranks or (ranks > 1 and length % (2 * ranks)):
            raise ValueError(f"a document of {length} tokens over {ranks} context ranks")
        positions.append(_own_part(torch.arange(length), ranks, rank))
    joined = torch.cat(positions)
    if joined.numel() != tokens:
        raise ValueError(f"boundaries of {joined.numel()} tokens for {tokens}")
    return joined


def _own_part(positions: Tensor, ranks: int, rank: int) -> Tensor:
    if ranks == 1:
        return positions
    parts = positions.chunk(2 * ranks)
    return torch.cat((parts[rank], parts[2 * ranks - 1 - rank]))


def _angles(
    x: Tensor, angles: Tensor, kind: NVTE_QKV_Format, boundaries: Tensor | None, ranks: int, rank: int
) -> Tensor:
    """float32, to be broadcast over x's heads."""
    if angles.dtype != torch.float32 or angles.dim() != 4 or angles.shape[1:3] != (1, 1):
        raise ValueError(f"angles {tuple(angles.shape)} in {angles.dtype}")
    if kind is NVTE_QKV_Format.NVTE_THD:
        if boundaries is None or x.dim() != 3:
            raise ValueError("packed documents without boundaries")
        positions = _packed_positions(boundaries, x.shape[0], ranks, rank)
        if int(positions.max()) >= angles.shape[0]:
            raise ValueError(f"position {int(positions.max())} of {angles.shape[0]}")
        return angles.flatten(1)[positions][:, None]
    if x.dim() != 4:
        raise ValueError(f"rows {tuple(x.shape)}")
    length = x.shape[0 if kind is NVTE_QKV_Format.NVTE_SBHD else 1]
    table = angles[_own_part(torch.arange(length * ranks), ranks, rank)]
    return table if kind is NVTE_QKV_Format.NVTE_SBHD else table.transpose(0, 1)


def _rotate(x: Tensor, angles: Tensor, direction: float) -> Tensor:
    rotated, kept = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    turned = rotated * angles.cos() + torch.cat((-second, first), -1) * (angles.sin() * direction)
    return torch.cat((turned.to(x.dtype), kept), -1).contiguous()


def fused_rope_forward(
    x: Tensor,
    angles: Tensor,
    start_positions: Tensor | None,
    kind: NVTE_QKV_Format,
    interleaved: bool,
    boundaries: Tensor | None,
    ranks: int,
    rank: int,
) -> Tensor:
    """Rotate the first dimensions of every head by the angles of its position.

    Args:
        x: [s, b, heads, d], [b, s, heads, d], or packed [t, heads, d].
        angles: float32 [positions, 1, 1, rotated], the same in both halves.
        boundaries: int32 [documents + 1], of whole documents, not of a rank's part.
    """
    if start_positions is not None or interleaved:
        raise NotImplementedError("rotation with start positions or interleaved halves")
    return _rotate(x, _angles(x, angles, kind, boundaries, ranks, rank), 1.0)


def fused_rope_backward(
    gradient: Tensor,
    angles: Tensor,
    kind: NVTE_QKV_Format,
    interleaved: bool,
    boundaries: Tensor | None,
    ranks: int,
    rank: int,
) -> Tensor:
    """Rotate the gradient back."""
    if interleaved:
        raise NotImplementedError("rotation with interleaved halves")
    return _rotate(gradient, _angles(gradient, angles, kind, boundaries, ranks, rank), -1.0)
