"""The model's own small modules: what Transformer Engine gives on a GPU, in plain PyTorch.

``SdpaAttention`` is exact causal attention with grouped key/value heads. Packed rows are computed document by
document, in buckets of similar length, so that no [tokens, tokens] mask exists and no document sees another. Under
context parallelism each rank has a part of the queries and brings all keys and values together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phimr_nemo.losses.device import sent
from phimr_nemo.model.megatron.context_parallel import ContextPlan, plan_context
from phimr_nemo.model.megatron.elementwise import rms_norm

MIN_BUCKET_FILL: Final = 0.75
"""Shortest over longest document of a bucket: bounds padding to 1/3 of the tokens for few enough calls."""

SHORT_DOCUMENT: Final = 32
"""Documents up to this length (tokens) share a bucket: below it a call costs more than its arithmetic."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Megatron's fallback norm refuses sequence parallelism; this one marks its weight, so that Megatron sums
    the weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> the same; statistics in float32, as in transformers."""
        return rms_norm(hidden, self.weight, self.eps)


class RotaryScale(nn.Module):
    """Multiplies the rotated dimensions of a query or key by LongRoPE's attention factor.

    It sits in the place of Megatron's query/key norm, the one hook between the projection and the rotation
    that every attention backend has.
    """

    def __init__(self, rotary_dim: int, factor: float, hidden_size: int, **_: Any) -> None:
        super().__init__()
        # Not a buffer: model.bfloat16() would round the factor itself (1.1902 to 1.1875).
        self.scale = torch.ones(hidden_size)
        self.scale[:rotary_dim] = factor

    def forward(self, heads: Tensor) -> Tensor:
        """[..., head_dim] -> the same."""
        if heads.device != self.scale.device:
            # Once: a copy in every forward pass would make the GPU wait for it.
            self.scale = self.scale.to(heads.device)
        return _Scaled.apply(heads, self.scale)


class _Scaled(torch.autograd.Function):
    """heads x scale in float32, rounded once, without a float32 copy of the heads."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return torch.mul(heads, scale, out=torch.empty_like(heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.mul(gradient, ctx.scale, out=torch.empty_like(gradient)), None


@dataclass(frozen=True)
class DocumentBuckets:
    """Where the tokens of a packed row go when its documents are laid out as a few padded batches.

    Attributes:
        shapes: (documents, padded length) of each bucket.
        gather: int64 [padded tokens of all buckets], the row's token at each place; padding repeats a
            document's last token.
        scatter: int64 [tokens], each token's place in the buckets.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor
    scatter: Tensor

    def on(self, device: torch.device) -> DocumentBuckets:
        """The same with its numbers on a device."""
        return DocumentBuckets(self.shapes, sent(self.gather, device), sent(self.scatter, device))


@dataclass(frozen=True)
class ContextBuckets:
    """The same for one rank of a context group: its own queries against the keys and values of all ranks.

    Attributes:
        queries: layout of this rank's tokens; each document's are padded by repeating its last one.
        keys: layout of all ranks' tokens, which are numbered rank after rank.
        positions: int64 [padded queries of all buckets], each query's position in its document.
    """

    queries: DocumentBuckets
    keys: DocumentBuckets
    positions: Tensor

    def on(self, device: torch.device) -> ContextBuckets:
        """The same with its numbers on a device."""
        return ContextBuckets(self.queries.on(device), self.keys.on(device), sent(self.positions, device))


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed-sequence parameters with the layout for ``SdpaAttention``, made once for all layers.

    Without boundaries (``cu_seqlens_q``), so that Megatron rotates the row in one piece: angles come per token.
    """

    buckets: DocumentBuckets | ContextBuckets | None = field(default=None)


def bucket_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Group documents of similar length.

    Args:
        lengths: positive lengths (tokens).

    Returns:
        Lists of document indices, longest first. In each list the shortest document has at least
        ``MIN_BUCKET_FILL`` of the longest's tokens, or all have at most ``SHORT_DOCUMENT``.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    buckets: list[list[int]] = []
    longest = 0
    for index in order:
        if buckets and (longest <= SHORT_DOCUMENT or lengths[index] >= MIN_BUCKET_FILL * longest):
            buckets[-1].append(index)
        else:
            buckets.append([index])
            longest = lengths[index]
    return buckets


def plan_documents(lengths: Tensor) -> DocumentBuckets:
    """Lay out the documents of a packed row.

    Args:
        lengths: int [documents], positive, in the order of the row.
    """
    return _lay_out(lengths, bucket_documents(lengths.tolist()))


def plan_context_documents(plan: ContextPlan, rank: int) -> ContextBuckets:
    """Lay out the documents of a packed row for one rank of a context group.

    Args:
        plan: how the ranks share the row.
        rank: this one.
    """
    groups = bucket_documents(plan.lengths.tolist())
    queries = _lay_out(plan.lengths // len(plan.tokens), groups)
    row = _lay_out(plan.lengths, groups)
    keys = DocumentBuckets(
        shapes=row.shapes,
        gather=plan.in_order[row.gather],
        scatter=torch.empty_like(row.scatter).index_copy_(0, plan.in_order, row.scatter),
    )
    return ContextBuckets(queries, keys, plan.positions[rank][queries.gather])


def _lay_out(lengths: Tensor, groups: Sequence[Sequence[int]]) -> DocumentBuckets:
    """Lay out the documents of a row in the given groups, each led by its longest document."""
    sizes = lengths.tolist()
    starts = (torch.cumsum(lengths, 0) - lengths).to("cpu", torch.int64)
    shapes: list[tuple[int, int]] = []
    gather: list[Tensor] = []
    scatter = torch.empty(sum(sizes), dtype=torch.int64)
    base = 0
    for members in groups:
        width = sizes[members[0]]
        offsets = torch.arange(width)
        member_lengths = torch.tensor([sizes[index] for index in members])
        clamped = torch.minimum(offsets[None, :], member_lengths[:, None] - 1)
        source = starts[list(members)][:, None] + clamped
        places = base + torch.arange(source.numel()).view_as(source)
        is_token = offsets[None, :] < member_lengths[:, None]
        scatter[source[is_token]] = places[is_token]
        shapes.append((len(members), width))
        gather.append(source.reshape(-1))
        base += source.numel()
    return DocumentBuckets(tuple(shapes), torch.cat(gather).to(lengths.device), scatter.to(lengths.device))


class _ToBuckets(torch.autograd.Function):
    """x[gather]; backward by ``scatter``: causal attention lets no gradient reach the padding."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, buckets: DocumentBuckets) -> Tensor:
        ctx.buckets = buckets
        return tokens.index_select(0, buckets.gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.buckets.scatter), None


class _FromBuckets(torch.autograd.Function):
    """x[scatter]; backward puts gradients back in place and zeros into the padding."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, buckets: DocumentBuckets) -> Tensor:
        ctx.buckets = buckets
        return places.index_select(0, buckets.scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        full = gradient.new_zeros((ctx.buckets.gather.numel(), *gradient.shape[1:]))
        return full.index_copy_(0, ctx.buckets.scatter, gradient), None


class SdpaAttention(MegatronModule):
    """Megatron ``core_attention`` on ``torch.nn.functional.scaled_dot_product_attention``, always causal."""

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, head_dim]; packed: [t, heads, head_dim].
            key, value: the same with the key/value heads.
            packed_seq_params: a ``PackedDocuments`` for packed rows.

        Returns:
            [s, b, heads * head_dim]; packed: [t, heads * head_dim].
        """
        del attention_mask, attn_mask_type, attention_bias  # causal; PhiGPTModel refuses any other mask
        if packed_seq_params is not None:
            if not isinstance(packed_seq_params, PackedDocuments) or packed_seq_params.buckets is None:
                raise TypeError("packed rows reach SdpaAttention through PhiGPTModel, which lays out the documents")
            buckets = packed_seq_params.buckets
            if isinstance(buckets, ContextBuckets):
                return self._packed_in_context(query, key, value, buckets)
            return self._packed(query, key, value, buckets)
        mask = None
        if self.config.context_parallel_size > 1:
            key, value, mask = _whole_context(key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self._causal(query, key, value, mask).permute(2, 0, 1, 3).flatten(2)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, heads, s, head_dim] of each -> [b, heads, s, head_dim]; a mask where queries are not keys in order."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, buckets: DocumentBuckets) -> Tensor:
        parts = [_split_buckets(x, buckets) for x in (query, key, value)]
        outputs = [_tokens_first(self._causal(*bucket)) for bucket in zip(*parts, strict=True)]
        return _FromBuckets.apply(torch.cat(outputs), buckets)

    def _packed_in_context(self, query: Tensor, key: Tensor, value: Tensor, buckets: ContextBuckets) -> Tensor:
        queries = _split_buckets(query, buckets.queries)
        both = _gather_heads(key, value)
        keys, values = (_split_buckets(x, buckets.keys) for x in both.chunk(2, dim=-1))
        positions = buckets.positions.split([documents * width for documents, width in buckets.queries.shapes])
        outputs: list[Tensor] = []
        for index, (documents, width) in enumerate(buckets.keys.shapes):
            mask = _is_visible(positions[index].view(documents, 1, -1), width)
            outputs.append(_tokens_first(self._causal(queries[index], keys[index], values[index], mask)))
        return _FromBuckets.apply(torch.cat(outputs), buckets.queries)


def _split_buckets(tokens: Tensor, buckets: DocumentBuckets) -> list[Tensor]:
    """[t, heads, head_dim] -> of each bucket [documents, heads, width, head_dim]."""
    sizes = [documents * width for documents, width in buckets.shapes]
    parts = _ToBuckets.apply(tokens, buckets).split(sizes)
    return [
        part.view(documents, width, *part.shape[1:]).transpose(1, 2)
        for part, (documents, width) in zip(parts, buckets.shapes, strict=True)
    ]


def _tokens_first(bucket: Tensor) -> Tensor:
    """[documents, heads, width, head_dim] -> [documents * width, heads * head_dim]."""
    return bucket.transpose(1, 2).flatten(2).flatten(0, 1)


def _is_visible(positions: Tensor, keys: int) -> Tensor:
    """[..., queries] positions -> bool [..., queries, keys]: keys up to the query's own position."""
    return torch.arange(keys, device=positions.device) <= positions[..., None]


def _gather_heads(key: Tensor, value: Tensor) -> Tensor:
    """[local, ..., head_dim] each -> [all ranks' tokens, ..., 2 head_dim], rank after rank, in one exchange."""
    group = parallel_state.get_context_parallel_group()
    return gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)


def _whole_context(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's keys and values [s / ranks, b, heads, head_dim] -> all in order, and bool [s / ranks, s]."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    length = key.shape[0] * ranks
    plan = plan_context(torch.tensor([length]), ranks)
    in_order, positions = sent(plan.in_order, key.device), sent(plan.positions[rank], key.device)
    keys, values = _gather_heads(key, value).index_select(0, in_order).chunk(2, dim=-1)
    return keys, values, _is_visible(positions, length)
