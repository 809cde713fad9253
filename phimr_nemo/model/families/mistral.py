"""Mistral: Llama's layers, with a span of attention; sequences up to its length see everything."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from phimr_nemo.model.families.family import Family, plain_rotary, sliding_window
from phimr_nemo.model.families.llama import LAYER_RULES, REQUIRED
from phimr_nemo.model.rotary import read_plain

UNSTATED_WINDOW: Final = 4096
"""transformers' for a config.json that says nothing of it."""


def _window(config: Mapping[str, Any]) -> int | None:
    return sliding_window({"sliding_window": UNSTATED_WINDOW, **config})


MISTRAL: Final = Family(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    layer_rules=LAYER_RULES,
    has=frozenset({"head_size", "sliding_window"}),
    required=REQUIRED,
    defaults=MappingProxyType(
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    ),
    read_rotary=read_plain,
    write_rotary=plain_rotary,
    read_window=_window,
)
