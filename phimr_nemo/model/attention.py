"""The model's own small modules: what Transformer Engine gives on a GPU, in plain PyTorch.

``SdpaAttention`` is exact causal attention with grouped key/value heads. Packed rows are computed document by
document, in buckets of similar length, so that no [tokens, tokens] mask exists and no document sees another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        normalised = F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps)
        return normalised.type_as(hidden) * self.weight


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
        return (heads * self.scale.to(heads.device)).to(heads.dtype)


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


@dataclass
class PackedDocuments(PackedSeqParams):
    """Megatron's packed-sequence parameters with the layout for ``SdpaAttention``, made once for all layers."""

    buckets: DocumentBuckets | None = field(default=None)


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
    sizes = lengths.tolist()
    starts = (torch.cumsum(lengths, 0) - lengths).to("cpu", torch.int64)
    shapes: list[tuple[int, int]] = []
    gather: list[Tensor] = []
    scatter = torch.empty(sum(sizes), dtype=torch.int64)
    base = 0
    for members in bucket_documents(sizes):
        width = sizes[members[0]]
        offsets = torch.arange(width)
        member_lengths = torch.tensor([sizes[index] for index in members])
        clamped = torch.minimum(offsets[None, :], member_lengths[:, None] - 1)
        source = starts[members][:, None] + clamped
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
        if packed_seq_params is None:
            batch_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._causal(*batch_first).permute(2, 0, 1, 3).flatten(2)
        if not isinstance(packed_seq_params, PackedDocuments) or packed_seq_params.buckets is None:
            raise TypeError("packed rows reach SdpaAttention through PhiGPTModel, which lays out the documents")
        return self._packed(query, key, value, packed_seq_params.buckets)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, heads, s, head_dim] of each -> [b, heads, s, head_dim]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, buckets: DocumentBuckets) -> Tensor:
        sizes = [documents * width for documents, width in buckets.shapes]
        parts = [_ToBuckets.apply(x, buckets).split(sizes) for x in (query, key, value)]
        outputs: list[Tensor] = []
        for index, (documents, width) in enumerate(buckets.shapes):
            heads_first = (
                part[index].view(documents, width, *part[index].shape[1:]).transpose(1, 2) for part in parts
            )
            outputs.append(self._causal(*heads_first).transpose(1, 2).reshape(documents * width, -1))
        return _FromBuckets.apply(torch.cat(outputs), buckets)
