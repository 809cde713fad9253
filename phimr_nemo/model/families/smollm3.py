"""SmolLM3: Llama's layers, some of which are not rotated (arXiv 2501.18795)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from phimr_nemo.model.families.family import Family, full_attention, plain_rotary
from phimr_nemo.model.families.llama import LAYER_RULES, REQUIRED
from phimr_nemo.model.fields import shown, unsupported, whole
from phimr_nemo.model.rotary import Rotary, read_plain

UNSTATED_THETA: Final = 2e6
UNSTATED_INTERVAL: Final = 4
"""Every so many layers one is not rotated; like the other one, transformers' for a config.json that says nothing of
it."""
ROTATED: Final = 1
"""What `no_rope_layers` says of a layer with rotary embedding, in spite of its name; 0 of one without."""


def every_fourth(layers: int, interval: int = UNSTATED_INTERVAL) -> tuple[int, ...]:
    """The `no_rope_layers` of so many layers, of which every fourth is not rotated, or another one."""
    return tuple(int((layer + 1) % interval != 0) for layer in range(layers))


def _read_rotary(config: Mapping[str, Any], context: int) -> Rotary:
    rotary = read_plain(config, context, theta=UNSTATED_THETA)
    return dataclasses.replace(rotary, no_rope_layers=_read_layers(config))


def _read_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers, stated = whole(config, "num_hidden_layers"), config.get("no_rope_layers")
    if stated is None:
        interval = whole(config, "no_rope_layer_interval", UNSTATED_INTERVAL)
        if interval < 1:
            raise unsupported(
                f"no_rope_layer_interval = {interval}",
                "every so many layers one is not rotated",
                f"write {UNSTATED_INTERVAL}, or no_rope_layers with an entry per layer",
            )
        return every_fourth(layers, interval)
    is_list = isinstance(stated, list) and all(isinstance(entry, int) for entry in stated)
    if not is_list or not set(stated) <= {0, ROTATED} or len(stated) < layers:
        raise unsupported(
            f"no_rope_layers = {shown(stated)}",
            f"one entry for each of {layers} layers: 1 where it is rotated, 0 where not",
            "take the config.json that the model was published with",
        )
    return tuple(int(entry) for entry in stated[:layers])


def _write_rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**plain_rotary(values), "no_rope_layers": list(values["no_rope_layers"])}


SMOLLM3: Final = Family(
    model_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    layer_rules=LAYER_RULES,
    has=frozenset({"head_size", "no_rope_layers"}),
    required=MappingProxyType({**REQUIRED, "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}),
    defaults=MappingProxyType(
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "tie_word_embeddings": True,
        }
    ),
    read_rotary=_read_rotary,
    write_rotary=_write_rotary,
    read_window=full_attention,
)
