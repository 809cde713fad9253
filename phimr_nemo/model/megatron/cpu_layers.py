"""Attention and feed-forward of a layer on a CPU: Megatron's modules with their own arithmetic between the products.

Names, shapes and division of the weights are Megatron's, so that checkpoints, adapters and tensor parallelism do not
see the difference. Queries, keys and values stay in the layout of the projection, [s, b, groups, heads, head_dim],
from its output to its gradient: torch's attention kernel reads them as views, document by document, without copies to
batch-first order, without padding, and without an autograd node for each document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimr_nemo.model.megatron.elementwise import rotate, swiglu

KEY_AND_VALUE: Final = 2
"""Heads of a group that are no queries."""

_FORWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class PackedSpans(PackedSeqParams):
    """Megatron's packed-sequence parameters as :class:`CpuSelfAttention` reads them.

    Attributes:
        spans: of each document its first token and the one after its last, made once for all layers.
    """

    spans: tuple[tuple[int, int], ...] = ()


def plan_spans(lengths: Tensor) -> PackedSpans:
    """Where the documents of a packed row are.

    Args:
        lengths: int [documents], positive, in the order of the row (tokens).
    """
    ends = torch.cumsum(lengths, 0).tolist()
    return PackedSpans(qkv_format="thd", spans=tuple(zip([0, *ends[:-1]], ends, strict=True)))


def attend(
    heads: Tensor, tables: Tensor, rotary_dim: int, scale: float, spans: tuple[tuple[int, int], ...] | None = None
) -> Tensor:
    """Exact causal attention with grouped key/value heads and rotary embedding.

    Args:
        heads: [s, b, groups, heads of a group, head_dim] of a group's queries, its key and its value.
        tables: see :func:`phimr_nemo.model.megatron.elementwise.rotary_tables`; [2, s, 1, 1, head_dim].
        rotary_dim: dimensions of a head that are turned.
        scale: of the scores, 1 / sqrt(head_dim) as a rule.
        spans: documents of a packed row (b = 1), none of which sees another; None: every row is one.

    Returns:
        [s, b, query heads * head_dim].
    """
    attended: Tensor = _Attention.apply(heads, tables, rotary_dim, scale, spans or ((0, heads.shape[0]),))
    return attended


def _views(turned: Tensor, span: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A document's queries [b * groups, heads, length, head_dim], key and value [b * groups, 1, length, head_dim]."""
    rows = turned[span[0] : span[1]].flatten(1, 2).permute(1, 2, 0, 3)
    queries = rows.shape[1] - KEY_AND_VALUE
    return rows[:, :queries], rows[:, queries : queries + 1], rows[:, queries + 1 :]


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
            found, log_sums = _FORWARD(*_views(turned, span), 0.0, True, scale=scale)
            _by_token(attended, span).copy_(found)
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
        for span, log_sums in zip(ctx.spans, sums, strict=True):
            found = _BACKWARD(
                _by_token(gradient, span),
                *_views(turned, span),
                _by_token(attended, span),
                log_sums,
                0.0,
                True,
                scale=ctx.scale,
            )
            for place, values in zip(_views(gradients, span), found, strict=True):
                place.copy_(values)
        return rotate(gradients, turned.shape[-2] - 1, tables, ctx.rotary_dim, back=True), None, None, None, None


def _by_token(values: Tensor, span: tuple[int, int]) -> Tensor:
    """[s, b, groups, heads, head_dim] -> of one document [b * groups, heads, length, head_dim]."""
    return values[span[0] : span[1]].flatten(1, 2).permute(1, 2, 0, 3)


class CpuSelfAttention(SelfAttention):
    """Megatron's self-attention over :func:`attend`.

    It is given the tables of :func:`phimr_nemo.model.megatron.elementwise.rotary_tables` in the place of rotary
    angles, and documents as :class:`PackedSpans`.
    """

    def __init__(self, config: TransformerConfig, *values: Any, rotary_dim: int, **options: Any) -> None:
        super().__init__(config, *values, **options)
        self.rotary_dim = rotary_dim
        self.scale = config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002  causal; PhiGPTModel refuses any other mask
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSpans | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [s, b, h]; under sequence parallelism this rank's part of the sequence.
            attention_mask: unused.
            rotary_pos_emb: [2, s, 1, 1, head_dim].
            packed_seq_params: documents of a packed row.

        Returns:
            [s, b, h], and no bias.
        """
        mixed, _bias = self.linear_qkv(hidden_states)
        heads = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        if self.q_layernorm is not None:
            queries, key, value = heads.split([heads.shape[-2] - KEY_AND_VALUE, 1, 1], dim=-2)
            heads = torch.cat((self.q_layernorm(queries), self.k_layernorm(key), value), dim=-2)
        spans = None if packed_seq_params is None else packed_seq_params.spans

        def attended(heads: Tensor) -> Tensor:
            return attend(heads, rotary_pos_emb, self.rotary_dim, self.scale, spans)

        if self.checkpoint_core_attention and self.training:
            output = tensor_parallel.checkpoint(attended, False, heads)
        else:
            output = attended(heads)
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(output)
        return projected


class CpuMLP(MLP):
    """Megatron's feed-forward part over :func:`phimr_nemo.model.megatron.elementwise.swiglu`."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: Tensor, per_token_scale: None = None) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        """[s, b, h] -> the same, and no bias; `per_token_scale` is for experts, of which there are none."""
        gate_and_up, _bias = self.linear_fc1(hidden_states)
        projected: tuple[Tensor, Tensor | None] = self.linear_fc2(swiglu(gate_and_up))
        return projected
