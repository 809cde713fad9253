"""Llama 2 and 3, SmolLM2 and others of their make.

Llama 3.1 and later slow down the slow rotations by a factor (`llama3`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from phimr_nemo.model.families.family import (
    ATTENTION_OUT,
    DOWN,
    INPUT_NORM,
    MLP_NORM,
    SEPARATE_GATE_UP,
    SEPARATE_QKV,
    Family,
    full_attention,
    plain_rotary,
)
from phimr_nemo.model.rotary import LLAMA3_KEYS, read_llama3

LAYER_RULES: Final = (INPUT_NORM, SEPARATE_QKV, ATTENTION_OUT, MLP_NORM, SEPARATE_GATE_UP, DOWN)
REQUIRED: Final[Mapping[str, Any]] = MappingProxyType({"hidden_act": "silu", "attention_dropout": 0.0})


def _write_llama3(values: Mapping[str, Any]) -> dict[str, Any]:
    scaling = values["llama3"]
    if scaling is None:
        return plain_rotary(values)
    return {"rope_scaling": {"rope_type": "llama3", **dict(zip(LLAMA3_KEYS, scaling, strict=True))}}


LLAMA: Final = Family(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    layer_rules=LAYER_RULES,
    has=frozenset({"head_size", "llama3"}),
    required=MappingProxyType({**REQUIRED, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}),
    defaults=MappingProxyType(
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
    ),
    read_rotary=read_llama3,
    write_rotary=_write_llama3,
    read_window=full_attention,
)
