"""SmolLM3 for transformers 4.51, which has none: its Llama without rotary embeddings in the layers that have none.

`tests/parity/test_family_parity.py` compares with the one of transformers 5 as well.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class SmolLM3Config(LlamaConfig):
    """A Llama's, and which layers are rotated."""

    model_type = "smollm3"

    def __init__(self, no_rope_layers: list[int] | None = None, **values: Any) -> None:
        super().__init__(**values)
        every_fourth = [int((layer + 1) % 4 != 0) for layer in range(self.num_hidden_layers)]
        self.no_rope_layers = every_fourth if no_rope_layers is None else no_rope_layers


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """A Llama whose layers turn by no angle where `no_rope_layers` is 0."""

    config_class = SmolLM3Config

    def __init__(self, config: SmolLM3Config) -> None:
        super().__init__(config)
        for layer, is_rotated in zip(self.model.layers, config.no_rope_layers, strict=True):
            if not is_rotated:
                layer.self_attn.register_forward_pre_hook(_by_no_angle, with_kwargs=True)


def _by_no_angle(_: Any, values: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cosines, sines = named["position_embeddings"]
    return values, {**named, "position_embeddings": (torch.ones_like(cosines), torch.zeros_like(sines))}


def made_like(family: str, **values: Any) -> Any:
    """A model of transformers with weights of its own making.

    Args:
        family: the beginning of its classes' names.
        values: of its config.
    """
    if family == "SmolLM3":
        return SmolLM3ForCausalLM(SmolLM3Config(**values))
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values))


AutoConfig.register(SmolLM3Config.model_type, SmolLM3Config)
AutoModelForCausalLM.register(SmolLM3Config, SmolLM3ForCausalLM)
