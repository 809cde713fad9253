"""Phi-3, Phi-3.5-mini, Phi-4-mini, Phi-4-mini-reasoning: stacked matrices, partial rotation, LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from phimr_nemo.model.families.family import (
    ATTENTION_OUT,
    DOWN,
    GATE_UP,
    INPUT_NORM,
    MLP_NORM,
    QKV,
    Family,
    sliding_window,
)
from phimr_nemo.model.rotary import DEFAULT_CONTEXT, read_longrope


def _write_rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` has exactly the three keys that transformers 4's validation demands."""
    scaling = None
    if values["short_factor"] is not None and values["long_factor"] is not None:
        scaling = {
            "type": "longrope",
            "short_factor": list(values["short_factor"]),
            "long_factor": list(values["long_factor"]),
        }
    return {"rope_scaling": scaling}


PHI3: Final = Family(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    layer_rules=(INPUT_NORM, QKV, ATTENTION_OUT, MLP_NORM, GATE_UP, DOWN),
    has=frozenset({"partial_rotary_factor", "short_factor", "long_factor", "sliding_window"}),
    required=MappingProxyType(
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    ),
    defaults=MappingProxyType(
        {
            "max_position_embeddings": DEFAULT_CONTEXT,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        }
    ),
    read_rotary=read_longrope,
    write_rotary=_write_rotary,
    read_window=sliding_window,
)
