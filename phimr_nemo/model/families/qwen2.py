"""Qwen2 and Qwen2.5: Llama's layers with biases of queries, keys and values."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from phimr_nemo.model.families.family import (
    ATTENTION_OUT,
    DOWN,
    INPUT_NORM,
    MLP_NORM,
    QKV_BIAS,
    SEPARATE_GATE_UP,
    SEPARATE_QKV,
    Family,
    full_attention,
    plain_rotary,
)
from phimr_nemo.model.families.llama import REQUIRED
from phimr_nemo.model.rotary import read_plain

QWEN2: Final = Family(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    layer_rules=(INPUT_NORM, SEPARATE_QKV, QKV_BIAS, ATTENTION_OUT, MLP_NORM, SEPARATE_GATE_UP, DOWN),
    has=frozenset(),
    required=MappingProxyType({**REQUIRED, "use_sliding_window": False}),
    defaults=MappingProxyType({"max_position_embeddings": 32768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6}),
    read_rotary=read_plain,
    write_rotary=plain_rotary,
    read_window=full_attention,
)
