"""The Megatron-Core model of the Phi-3 family: partial rotary embeddings with LongRoPE (arXiv 2402.13753)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

LongRopePolicy = Literal["per_sequence", "long_when_max_length_exceeds_original", "always_short"]
"""Which factors apply: by the length of each (padded or packed) sequence, as in transformers; the long ones for the
whole run when ``seq_length`` exceeds the original length, as in vLLM (``max_model_len``); the short ones always."""


@dataclass
class Phi3ModelProvider(GPTModelProvider):
    """Provider of Phi-3, Phi-3.5 and Phi-4-mini.

    LongRoPE has two sets of divisors of the inverse frequencies, one per rotated pair, and one factor on the rotated
    dimensions of queries and keys in both regimes. It does not depend on ``transformer_layer_spec``: whatever layers
    the model is built of get it.

    Attributes:
        longrope_short_factor, longrope_long_factor: the divisors; None for plain rotary embeddings.
        longrope_original_max_position_embeddings: longest sequence (tokens) of the short regime.
        longrope_max_position_embeddings: longest sequence (tokens) of the model; ``seq_length`` is a run's.
        longrope_attention_factor: on queries' and keys' rotated dimensions.
        longrope_policy: see ``LongRopePolicy``.
    """

    normalization: str = "RMSNorm"
    activation_func: Callable[..., Any] = F.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    position_embedding_type: Literal["learned_absolute", "rope", "yarn"] = "rope"
    share_embeddings_and_output_weights: bool = False

    longrope_short_factor: list[float] | None = None
    longrope_long_factor: list[float] | None = None
    longrope_original_max_position_embeddings: int | None = None
    longrope_max_position_embeddings: int | None = None
    longrope_attention_factor: float = 1.0
    longrope_policy: LongRopePolicy = "per_sequence"

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int((self.kv_channels or self.hidden_size // self.num_attention_heads) * self.rotary_percent)

    def finalize(self) -> None:
        """Check LongRoPE's fields, then what every provider checks.

        Raises:
            ValueError: an unknown policy, only one set of factors, or not one factor per rotated pair.
        """
        if self.longrope_policy not in get_args(LongRopePolicy):
            raise ValueError(f"longrope_policy={self.longrope_policy!r} is none of {get_args(LongRopePolicy)}")
        if (self.longrope_short_factor is None) != (self.longrope_long_factor is None):
            raise ValueError("LongRoPE needs both longrope_short_factor and longrope_long_factor, or neither")
        if self.longrope_short_factor is not None and self.longrope_long_factor is not None:
            if self.longrope_original_max_position_embeddings is None:
                raise ValueError("LongRoPE needs longrope_original_max_position_embeddings")
            counts = {len(self.longrope_short_factor), len(self.longrope_long_factor)}
            if counts != {self.rotary_dim // 2}:
                raise ValueError(f"LongRoPE with {sorted(counts)} factors for {self.rotary_dim // 2} rotated pairs")
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build this rank's part of the model; see ``GPTModelProvider.provide``."""
        model = super().provide(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        if self.longrope_long_factor is None:
            return model
        model.rotary_pos_emb = LongRotaryEmbedding(self, model.rotary_pos_emb.cp_group)
        if self.longrope_attention_factor != 1.0:
            for layer in model.decoder.layers:
                _scale_queries_and_keys(layer.self_attention, self)
        return model


class LongRotaryEmbedding(RotaryEmbedding):
    """Megatron-Core's rotary angles with the frequencies of the sequence's regime."""

    def __init__(self, provider: Phi3ModelProvider, cp_group: torch.distributed.ProcessGroup | None) -> None:
        super().__init__(
            kv_channels=provider.kv_channels,
            rotary_percent=provider.rotary_percent,
            rotary_base=provider.rotary_base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        original = provider.longrope_original_max_position_embeddings
        assert original is not None
        self.original_length = original
        self.policy: LongRopePolicy = provider.longrope_policy
        self.is_long_run = provider.seq_length > original
        # In float32 and in this order of operations transformers gets the same bits. On the CPU whatever device the
        # model is being built on; `get_emb` moves the first, and the other follows it.
        with torch.device("cpu"):
            exponents = torch.arange(0, provider.rotary_dim, 2, dtype=torch.int64).float() / provider.rotary_dim
            powers = provider.rotary_base**exponents
            self.inv_freq = 1.0 / (torch.tensor(provider.longrope_short_factor) * powers)
            self.long_inv_freq = 1.0 / (torch.tensor(provider.longrope_long_factor) * powers)

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens is rotated by the long factors."""
        if self.policy == "per_sequence":
            return length > self.original_length
        return self.policy == "long_when_max_length_exceeds_original" and self.is_long_run

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [max_seq_len, rotary_dim / 2] (radians, float32) of one sequence of `max_seq_len` tokens."""
        frequencies = self.inv_freq
        if self.is_long(max_seq_len):
            frequencies = self.long_inv_freq.to(frequencies.device)
        positions = torch.arange(max_seq_len, device=frequencies.device, dtype=frequencies.dtype) + offset
        return torch.outer(positions, frequencies)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **keywords: Any,
    ) -> int:
        """As in ``RotaryEmbedding``; a packed row has one table of angles for all of its sequences.

        Raises:
            ValueError: sequences of both regimes in one packed row.
        """
        if packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff()
            shortest, longest = int(lengths.min()), int(lengths.max())
            if self.is_long(shortest) != self.is_long(longest):
                raise ValueError(
                    f"sequences of {shortest} and {longest} tokens in one packed row under longrope_policy="
                    f"'per_sequence', where {self.original_length} tokens separate the regimes; use "
                    "longrope_policy='long_when_max_length_exceeds_original'"
                )
        length: int = super().get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params, **keywords
        )
        return length


class RotaryScale(nn.Module):
    """Multiplies the rotated dimensions of queries or keys by LongRoPE's attention factor.

    Rotation is linear, so this equals the factor on cosine and sine. It stands where Megatron-Core puts query and
    key norms: the one hook between projection and rotation that every attention backend has. (Its ``mscale`` is
    refused or ignored by Transformer Engine's fused rotation.)
    """

    def __init__(self, head_dim: int, rotary_dim: int, factor: float) -> None:
        super().__init__()
        # Not a buffer: model.bfloat16() would round the factor itself.
        with torch.device("cpu"):
            self.scale = torch.ones(head_dim)
            self.scale[:rotary_dim] = factor

    def forward(self, heads: Tensor) -> Tensor:
        """[..., head_dim] -> the same."""
        self.scale = self.scale.to(heads.device)
        return (heads * self.scale).to(heads.dtype)


def _scale_queries_and_keys(attention: nn.Module, provider: Phi3ModelProvider) -> None:
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"LongRoPE's attention factor goes where the layer spec puts a {name}; Phi-3 has none")
        scale = RotaryScale(provider.kv_channels, provider.rotary_dim, provider.longrope_attention_factor)
        setattr(attention, name, scale)
