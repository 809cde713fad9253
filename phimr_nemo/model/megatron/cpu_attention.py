"""Exact causal attention on a CPU, over documents of packed rows.

Queries, keys and values stay in the layout of the projection, [s, b, groups, heads, head_dim], from its output to its
gradient: documents are read as views, without copies to batch-first order, without padding, and without an autograd
node for each document.

A short document goes to torch's attention kernel, always in float32: its bfloat16 form makes a product of every small
block by itself and takes up to five times as long in the backward pass. One of some hundred tokens is cut into tiles
of queries, each multiplied with all keys up to it, since products of that size run near the processor's limit: with
S = scale Q K^T, P = softmax(S), O = P V and the gradient dO of O,

    dV = P^T dO     dP = dO V^T     dS = P (dP - rowsum(dO O))     dQ = scale dS K     dK = scale dS^T Q

(arXiv 2205.14135, appendix B.2). Tiles are made again in the backward pass: what is kept is linear in the length. The
longest ones, whose tiles no longer fit a cache, go to the kernel as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimr_nemo.model.megatron.elementwise import rotate

KEY_AND_VALUE: Final = 2
"""Heads of a group that are no queries."""
TILED: Final = range(256, 1537)
"""Tokens of the documents for which tiles are the faster way (measured with 8 x 32, 8 x 64 and 9 x 64 dimensions)."""
TILE: Final = 64
"""Queries of one head that are multiplied at a time: few enough that little above the diagonal is."""

_FORWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    heads: Tensor, tables: Tensor, rotary_dim: int, scale: float, spans: tuple[tuple[int, int], ...] | None = None
) -> Tensor:
    """Exact causal attention with grouped key/value heads and rotary embedding.

    Args:
        heads: [s, b, groups, heads of a group, head_dim] of a group's queries, its key and its value.
        tables: see :func:`phimr_nemo.model.megatron.elementwise.rotary_tables`; [2, s, 1, 1, head_dim].
        rotary_dim: dimensions of a head that are turned; 0 in a layer without rotary embedding.
        scale: of the scores, 1 / sqrt(head_dim) as a rule.
        spans: documents of a packed row (b = 1), none of which sees another; None: every row is one.

    Returns:
        [s, b, query heads * head_dim].
    """
    attended: Tensor = _Attention.apply(heads, tables, rotary_dim, scale, spans or ((0, heads.shape[0]),))
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, tables: Tensor, rotary_dim: int, scale: float, spans: tuple[tuple[int, int], ...]
    ) -> Tensor:
        turned = rotate(heads, heads.shape[-2] - 1, tables, rotary_dim)
        length, batch, groups, of_group, head_dim = heads.shape
        attended = heads.new_empty((length, batch, groups, of_group - KEY_AND_VALUE, head_dim))
        sums: list[Tensor] = []
        for span in spans:
            views, output = _views(turned, span), _by_token(attended, span)
            if _is_tiled(span):
                _tiled_forward(*views, scale, output)
            else:
                found, log_sums = _FORWARD(*_for_kernel(span, views), 0.0, True, scale=scale)
                output.copy_(found)
                sums.append(log_sums)
        ctx.save_for_backward(turned, tables, attended, *sums)
        ctx.rotary_dim, ctx.scale, ctx.spans = rotary_dim, scale, spans
        return attended.view(length, batch, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        turned, tables, attended, *sums = ctx.saved_tensors
        gradient = gradient.reshape(attended.shape)
        gradients = torch.empty_like(turned)
        log_sums = iter(sums)
        for span in ctx.spans:
            views, places = _views(turned, span), _views(gradients, span)
            of_output, output = _by_token(gradient, span), _by_token(attended, span)
            if _is_tiled(span):
                _tiled_backward(of_output, *views, output, ctx.scale, places)
                continue
            known = _for_kernel(span, (of_output, *views, output))
            found = _BACKWARD(*known, next(log_sums), 0.0, True, scale=ctx.scale)
            for place, values in zip(places, found, strict=True):
                place.copy_(values)
        return rotate(gradients, turned.shape[-2] - 1, tables, ctx.rotary_dim, back=True), None, None, None, None


def _is_tiled(span: tuple[int, int]) -> bool:
    return span[1] - span[0] in TILED


def _for_kernel(span: tuple[int, int], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(_wide, values)) if span[1] - span[0] < TILED.start else values


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype == torch.bfloat16 else values


def _views(turned: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A document's queries [b * groups, heads, length, head_dim], key and value [b * groups, 1, length, head_dim]."""
    rows = _by_token(turned, span)
    queries = rows.shape[1] - KEY_AND_VALUE
    return rows[:, :queries], rows[:, queries : queries + 1], rows[:, queries + 1 :]


def _by_token(values: Tensor, span: tuple[int, int]) -> Tensor:
    """[s, b, groups, heads, head_dim] -> of one document [b * groups, heads, length, head_dim]."""
    return values[span[0] : span[1]].flatten(1, 2).permute(1, 2, 0, 3)


def _tiled_forward(queries: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor) -> None:
    """Fill `output`, in the layout of the queries."""
    scaled, keys, values = _wide(queries) * scale, _contiguous(_wide(key)), _contiguous(value)
    for tile, seen in _tiles(queries.shape[2]):
        weights = _weights(scaled[:, :, tile], keys[:, :seen]).to(values.dtype)
        output[:, :, tile] = torch.bmm(weights, values[:, :seen]).view_as(output[:, :, tile])


def _tiled_backward(
    gradient: Tensor,
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    scale: float,
    places: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill `places`, the gradients of queries, key and value, in their layouts; `gradient` is the output's."""
    dtype, scaled = queries.dtype, _wide(queries) * scale
    keys, narrow_keys, values = _contiguous(_wide(key)), _contiguous(key), _contiguous(_wide(value))
    along = (_wide(gradient) * _wide(output)).sum(-1, keepdim=True)
    # Sums over tiles, in float32 at least.
    of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
    for tile, seen in _tiles(queries.shape[2]):
        weights = _weights(scaled[:, :, tile], keys[:, :seen])
        of_output = _rows(gradient[:, :, tile])
        _add_product(of_values[:, :seen], weights.to(dtype).mT, of_output)
        of_scores = torch.bmm(_wide(of_output), values[:, :seen].mT).sub_(_rows(along[:, :, tile])).mul_(weights)
        of_scores = of_scores.to(dtype)
        _add_product(of_keys[:, :seen], of_scores.mT, _rows(scaled[:, :, tile]).to(dtype))
        places[0][:, :, tile] = torch.bmm(of_scores, narrow_keys[:, :seen]).mul_(scale).view_as(places[0][:, :, tile])
    places[1].copy_(of_keys[:, None])
    places[2].copy_(of_values[:, None])


def _tiles(length: int) -> Iterator[tuple[slice, int]]:
    """The tokens of each tile of queries, and how many keys it sees."""
    for start in range(0, length, TILE):
        end = min(start + TILE, length)
        yield slice(start, end), end


def _weights(scaled: Tensor, keys: Tensor) -> Tensor:
    """Causal softmax of the last queries.

    Args:
        scaled: [n, heads, rows, head_dim], queries times the scale; they are those of the last `rows` keys.
        keys: [n, seen, head_dim].

    Returns:
        [n, heads * rows, seen].
    """
    rows, seen = scaled.shape[2], keys.shape[1]
    scores = torch.bmm(_rows(scaled), keys.mT)
    later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores.view(*scaled.shape[:3], seen)[..., seen - rows :].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, dim=-1)


def _rows(values: Tensor) -> Tensor:
    """[n, heads, rows, d] -> [n, heads * rows, d]."""
    return values.flatten(1, 2)


def _contiguous(values: Tensor) -> Tensor:
    """The one head of [n, 1, length, head_dim] -> [n, length, head_dim], without gaps: it is read once a tile."""
    return values[:, 0].contiguous()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))
