"""Qwen3 (dense): Llama's layers with norms of every head's queries and keys, and heads of a size of their own."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from phimr_nemo.model.families.family import (
    ATTENTION_OUT,
    DOWN,
    INPUT_NORM,
    KEY_NORM,
    MLP_NORM,
    QUERY_NORM,
    SEPARATE_GATE_UP,
    SEPARATE_QKV,
    Family,
    full_attention,
    plain_rotary,
)
from phimr_nemo.model.families.llama import REQUIRED
from phimr_nemo.model.rotary import read_plain

QWEN3: Final = Family(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    layer_rules=(
        *(INPUT_NORM, SEPARATE_QKV, QUERY_NORM, KEY_NORM),
        *(ATTENTION_OUT, MLP_NORM, SEPARATE_GATE_UP, DOWN),
    ),
    has=frozenset({"head_size"}),
    required=MappingProxyType({**REQUIRED, "use_sliding_window": False, "attention_bias": False}),
    defaults=MappingProxyType(
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "head_dim": 128}
    ),
    read_rotary=read_plain,
    write_rotary=plain_rotary,
    read_window=full_attention,
)
