"""Fused attention: causal or not, rows or packed documents, with log-sums of exponentials for the backward.

Every sequence is computed alone in float32 and rounded once; the backward takes outputs and sums as they were kept,
so that it also serves a step of context parallelism, whose sums are of all steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .names import DType, NVTE_Bias_Type, NVTE_Fused_Attn_Backend, NVTE_Mask_Type, NVTE_QKV_Layout

LARGEST_HEAD = 256
FOLDED = 8
"""A head's dimensions come in multiples of this."""


def get_fused_attn_backend(
    training: bool,
    q_dtype: DType,
    kv_dtype: DType,
    layout: NVTE_QKV_Layout,
    bias: NVTE_Bias_Type,
    mask: NVTE_Mask_Type,
    dropout: float,
    heads: int,
    kv_heads: int,
    longest_q: int,
    longest_kv: int,
    qk_dim: int,
    v_dim: int,
    left: int,
    right: int,
) -> NVTE_Fused_Attn_Backend:
    """cuDNN's flash kernel where it has one: 16 bits, heads that fold, no bias, no window."""
    del training, layout, mask, longest_q, longest_kv
    fits = (
        q_dtype == kv_dtype
        and q_dtype in (DType.kFloat16, DType.kBFloat16)
        and all(dim % FOLDED == 0 and dim <= LARGEST_HEAD for dim in (qk_dim, v_dim))
        and heads % kv_heads == 0
        and bias is NVTE_Bias_Type.NVTE_NO_BIAS
        and dropout == 0.0
        and left == -1
        and right in (-1, 0)
    )
    backends = NVTE_Fused_Attn_Backend
    return backends.NVTE_F16_arbitrary_seqlen if fits else backends.NVTE_No_Backend


def _kind(layout: NVTE_QKV_Layout) -> str:
    """Of all of queries, keys and values: "sbhd", "bshd" or "thd"."""
    kinds = {"S": "sbhd", "B": "bshd", "T": "thd"}
    found = {kinds.get(part[0]) for part in layout.name.removeprefix("NVTE_").split("_")}
    if len(found) != 1 or None in found:
        raise NotImplementedError(f"attention over {layout.name}")
    return str(found.pop())


def _sequences(x: Tensor, kind: str, boundaries: Tensor, offsets: Tensor | None, padded: bool) -> Iterator[Tensor]:
    """Views [n, heads, d] of the sequences in queries, keys, values or their gradients."""
    lengths = (boundaries[1:] - boundaries[:-1]).tolist()
    starts = (boundaries if offsets is None else offsets).tolist()
    for index, length in enumerate(lengths):
        if kind == "thd":
            yield x[starts[index] : starts[index] + length]
        else:
            row = x[:, index] if kind == "sbhd" else x[index]
            yield row[:length] if padded else row


def _check(
    kind: str, longest: int, boundaries: Tensor, offsets: Tensor | None, x: Tensor, window: tuple[int, int]
) -> None:
    for table in (boundaries, offsets):
        if table is not None and table.dtype != torch.int32:
            raise TypeError(f"boundaries in {table.dtype}")
    if int((boundaries[1:] - boundaries[:-1]).max()) > longest:
        raise ValueError(f"sequences {boundaries.tolist()} longer than {longest}")
    if kind == "thd" and int((boundaries if offsets is None else offsets)[-1]) > x.shape[0]:
        raise ValueError(f"boundaries {boundaries.tolist()} for {x.shape[0]} tokens")
    if kind != "thd" and longest != x.shape[0 if kind == "sbhd" else 1]:
        raise ValueError(f"rows {tuple(x.shape)} ({kind}) said to have {longest} tokens")
    if x.stride(-1) != 1:
        raise ValueError("a head's dimensions do not lie side by side")
    if window[0] != -1 or window[1] not in (-1, 0):
        raise NotImplementedError(f"a window {window}")


def _scores(query: Tensor, key: Tensor, scale: float, mask: NVTE_Mask_Type) -> Tensor:
    """float32 [heads, queries, keys]; -inf where masked."""
    grouped = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), grouped) * scale
    if "CAUSAL" not in mask.name:
        return scores
    queries, keys = scores.shape[-2:]
    shift = keys - queries if "BOTTOM_RIGHT" in mask.name else 0
    hidden = torch.arange(keys) > torch.arange(queries)[:, None] + shift
    return scores.masked_fill(hidden, -torch.inf)


def fused_attn_fwd(
    longest_q: int,
    longest_kv: int,
    training: bool,
    scale: float,
    dropout: float,
    zero_fill: bool,
    layout: NVTE_QKV_Layout,
    bias: NVTE_Bias_Type,
    mask: NVTE_Mask_Type,
    window: tuple[int, int],
    boundaries_q: Tensor,
    boundaries_kv: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fake_dtype: torch.dtype,
    offsets_q: Tensor | None,
    offsets_kv: Tensor | None,
    page_table_k: Tensor | None,
    page_table_v: Tensor | None,
    s_quantizer: Any,
    o_quantizer: Any,
    attention_bias: Tensor | None,
    generator: Any,
    random_numbers: int,
) -> list[Tensor]:
    """Attend.

    Args:
        boundaries_q, boundaries_kv: int32 [sequences + 1], lengths of the sequences, summed up.
        offsets_q, offsets_kv: where the sequences begin, if not one at the other's end.

    Returns:
        Output like the query; float32 log-sums [b, heads, s, 1], packed [t, heads, 1]; the dropout's state.
    """
    del training, zero_fill, fake_dtype, generator, random_numbers
    refused = (page_table_k, page_table_v, s_quantizer, o_quantizer, attention_bias)
    if any(one is not None for one in refused) or dropout or bias is not NVTE_Bias_Type.NVTE_NO_BIAS:
        raise NotImplementedError("attention with dropout, bias, pages or FP8")
    kind = _kind(layout)
    _check(kind, longest_q, boundaries_q, offsets_q, query, window)
    _check(kind, longest_kv, boundaries_kv, offsets_kv, key, window)
    out = torch.zeros(query.shape, dtype=query.dtype)
    heads = query.shape[-2]
    packed = kind == "thd"
    sums = torch.zeros((query.shape[0], heads) if packed else (boundaries_q.numel() - 1, heads, longest_q))
    padded = "PADDING" in mask.name
    views = (
        _sequences(query, kind, boundaries_q, offsets_q, padded),
        _sequences(key, kind, boundaries_kv, offsets_kv, padded),
        _sequences(value, kind, boundaries_kv, offsets_kv, padded),
        _sequences(out, kind, boundaries_q, offsets_q, padded),
        _sequences(sums, kind, boundaries_q, offsets_q, padded) if packed else (one.t() for one in sums),
    )
    with torch.no_grad():
        for q, k, v, o, s in zip(*views, strict=True):
            scores = _scores(q, k, scale, mask)
            total = scores.logsumexp(-1)
            weights = (scores - total[..., None]).exp()
            grouped = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
            o.copy_(torch.einsum("hqk,khd->qhd", weights, grouped))
            s[: q.shape[0]] = total.t()
    return [out, sums[..., None], torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q: int,
    longest_kv: int,
    scale: float,
    dropout: float,
    zero_fill: bool,
    layout: NVTE_QKV_Layout,
    bias: NVTE_Bias_Type,
    mask: NVTE_Mask_Type,
    window: tuple[int, int],
    deterministic: bool,
    boundaries_q: Tensor,
    boundaries_kv: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gradient: Tensor,
    fake_dtype: torch.dtype,
    gradient_dtype: DType,
    kept: list[Tensor],
    offsets_q: Tensor | None,
    offsets_kv: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
) -> list[Tensor | None]:
    """Gradients of query, key, value, and none of a bias; `kept` is what the forward returned after its output."""
    del zero_fill, deterministic, fake_dtype, gradient_dtype
    if any(one is not None for one in (s_quantizer, dp_quantizer, dqkv_quantizer)) or dropout:
        raise NotImplementedError("attention with dropout or FP8")
    if bias is not NVTE_Bias_Type.NVTE_NO_BIAS:
        raise NotImplementedError("attention with a bias")
    kind = _kind(layout)
    _check(kind, longest_q, boundaries_q, offsets_q, query, window)
    _check(kind, longest_kv, boundaries_kv, offsets_kv, key, window)
    sums = kept[0].squeeze(-1)
    padded = "PADDING" in mask.name
    gradients = _like(layout, (query, key, value))
    of_queries = [query, out.reshape(query.shape), gradient.reshape(query.shape), gradients[0]]
    of_keys = [key, value, *gradients[1:]]
    views = (
        *(_sequences(x, kind, boundaries_q, offsets_q, padded) for x in of_queries),
        *(_sequences(x, kind, boundaries_kv, offsets_kv, padded) for x in of_keys),
        _sequences(sums, kind, boundaries_q, offsets_q, padded) if kind == "thd" else (one.t() for one in sums),
    )
    for q, o, do, dq, k, v, dk, dv, s in zip(*views, strict=True):
        weights = (_scores(q, k, scale, mask) - s[: q.shape[0]].t()[..., None]).exp()
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.float().repeat_interleave(groups, 1) for x in (k, v))
        outer = do.float()
        share = (outer * o.float()).sum(-1).t()[..., None]
        slopes = weights * (torch.einsum("qhd,khd->hqk", outer, values) - share) * scale
        dq.copy_(torch.einsum("hqk,khd->qhd", slopes, keys))
        dk.copy_(_fold(torch.einsum("hqk,qhd->khd", slopes, q.float()), groups))
        dv.copy_(_fold(torch.einsum("hqk,qhd->khd", weights, outer), groups))
    return [*gradients, None]


def _like(layout: NVTE_QKV_Layout, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Zeros in the shapes of query, key and value, in one memory where these are parts of one tensor: what they
    belong to is put together again from there."""
    parts = layout.name.removeprefix("NVTE_").split("_")
    joined = len(tensors) + 1 - len(parts)
    apart = [torch.zeros(x.shape, dtype=x.dtype) for x in tensors[: len(parts) - 1]]
    last = tensors[-1]
    # The place of the numeral in, say, SBH2D.
    dim = -2 if parts[-1].endswith(f"H{joined}D") else -3
    together = torch.zeros((*last.shape, joined), dtype=last.dtype).movedim(-1, dim).contiguous()
    return [*apart, *together.unbind(dim)]


def _fold(x: Tensor, groups: int) -> Tensor:
    """[n, heads, d] -> [n, heads / groups, d], summed over the heads that share a key."""
    return x.unflatten(1, (-1, groups)).sum(2)
