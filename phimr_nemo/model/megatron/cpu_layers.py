"""Attention and feed-forward of a layer on a CPU: Megatron's modules with their own arithmetic between the products.

Names, shapes and division of the weights are Megatron's, so that checkpoints, adapters and tensor parallelism do not
see the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from phimr_nemo.model.megatron.cpu_attention import KEY_AND_VALUE, attend
from phimr_nemo.model.megatron.elementwise import swiglu


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


class CpuSelfAttention(SelfAttention):
    """Megatron's self-attention over :func:`attend`.

    It is given the tables of :func:`phimr_nemo.model.megatron.elementwise.rotary_tables` in the place of rotary
    angles, and documents as :class:`PackedSpans`.
    """

    def __init__(self, config: TransformerConfig, *values: Any, rotary_dim: int, **options: Any) -> None:
        super().__init__(config, *values, **options)
        is_rotated = not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
        self.rotary_dim = rotary_dim if is_rotated else 0
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
