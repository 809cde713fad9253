"""Conversion of Hugging Face's Phi3ForCausalLM (Phi-3, Phi-3.5, Phi-4-mini) to and from Megatron-Core."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    MegatronParamMapping,
)
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from .phi3_provider import Phi3ModelProvider

LONGROPE_NAMES = ("longrope", "su")
"""``su`` is what the first Phi-3-128k configs called it."""


class FusedGatedMLPMapping(MegatronParamMapping[Tensor]):
    """One Hugging Face tensor ``[gate; up]`` and Megatron's ``linear_fc1``, right at every tensor-parallel size.

    A tensor-parallel rank holds its part of gate above its part of up. Cut as one block, as ``AutoMapping`` does,
    rank 0 of 2 would hold all of gate and rank 1 all of up.
    """

    def __init__(self, megatron_param: str, hf_param: str) -> None:
        super().__init__(megatron_param, hf_param)
        self._gated_mapping = GatedMLPMapping(megatron_param, gate=f"{hf_param}.gate", up=f"{hf_param}.up")

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: nn.Module) -> Tensor:
        """[2 x intermediate, hidden] -> this rank's part."""
        gate, up = hf_weights.chunk(2, dim=0)
        part: Tensor = self._gated_mapping.hf_to_megatron({"gate": gate, "up": up}, megatron_module)
        return part

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: nn.Module | None) -> dict[str, Tensor]:
        """This rank's part -> [2 x intermediate, hidden], on every rank."""
        halves = self._gated_mapping.megatron_to_hf(megatron_weights, megatron_module)
        if not halves:
            return {}
        return {str(self.hf_param): torch.cat([halves[f"{self.hf_param}.{half}"] for half in ("gate", "up")], dim=0)}

    def resolve(self, captures: tuple[str, ...]) -> FusedGatedMLPMapping:
        """This mapping for one layer."""
        return type(self)(*self._resolve_names(captures))


@MegatronModelBridge.register_bridge(
    source=Phi3ForCausalLM, target=GPTModel, provider=Phi3ModelProvider, model_type="phi3"
)
class Phi3Bridge(MegatronModelBridge):
    """Megatron Bridge for Phi-3, Phi-3.5 and Phi-4-mini.

    As a user you would not use this bridge directly, but through ``AutoBridge``.

    Example:
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("microsoft/Phi-4-mini-reasoning")
        >>> provider = bridge.to_megatron_provider()
    """

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> Phi3ModelProvider:
        """The provider of a config.json of transformers 4 or 5.

        Raises:
            ValueError: a rotary scaling other than LongRoPE, or dropout that Megatron places elsewhere.
        """
        config = hf_pretrained.config
        provider: Phi3ModelProvider = super().provider_bridge(hf_pretrained)
        rope = rope_settings(config)
        # Where it stands depends on the version of transformers; read as 1.0 the weights would still come back equal.
        provider.rotary_percent = rope["partial_rotary_factor"]
        provider.rotary_base = rope["rope_theta"]
        provider.kv_channels = config.hidden_size // config.num_attention_heads
        provider.add_qkv_bias = False
        provider.add_bias_linear = False
        provider.hidden_dropout = _dropout(config)
        # Its own length, a run's `seq_length` may be shorter.
        provider.longrope_max_position_embeddings = config.max_position_embeddings
        window = config.sliding_window
        if window is not None and window < config.max_position_embeddings:
            provider.window_size = (window - 1, 0)
        if rope["rope_type"] in LONGROPE_NAMES:
            original = rope["original_max_position_embeddings"]
            provider.longrope_short_factor = [float(factor) for factor in rope["short_factor"]]
            provider.longrope_long_factor = [float(factor) for factor in rope["long_factor"]]
            provider.longrope_original_max_position_embeddings = original
            provider.longrope_attention_factor = _attention_factor(rope, config.max_position_embeddings / original)
        elif rope["rope_type"] != "default":
            raise ValueError(f"rotary scaling {rope['rope_type']!r}: the Phi-3 family has 'longrope' or none")
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: Phi3ModelProvider) -> dict[str, Any]:
        """The config.json of a provider, in the form that transformers 4 and 5 read."""
        config: dict[str, Any] = super().megatron_to_hf_config(provider)
        config["max_position_embeddings"] = provider.longrope_max_position_embeddings or provider.seq_length
        config["original_max_position_embeddings"] = (
            provider.longrope_original_max_position_embeddings or config["max_position_embeddings"]
        )
        config["resid_pdrop"] = config["embd_pdrop"] = provider.hidden_dropout
        config["sliding_window"] = None if provider.window_size is None else provider.window_size[0] + 1
        config["rope_scaling"] = None
        if provider.longrope_long_factor is not None:
            config["rope_scaling"] = {
                "type": "longrope",
                "short_factor": provider.longrope_short_factor,
                "long_factor": provider.longrope_long_factor,
            }
        return config

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Parameters of Transformer Engine's layers and of Megatron-Core's own."""
        names = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
            "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
            "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "model.layers.*.post_attention_layernorm.weight",
            "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
            "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
            "decoder.layers.*.mlp.linear_fc2.weight": "model.layers.*.mlp.down_proj.weight",
        }
        return MegatronMappingRegistry(
            *(AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in names.items()),
            ConcatenatedQKVMapping(
                megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                hf_param="model.layers.*.self_attn.qkv_proj.weight",
            ),
            FusedGatedMLPMapping(
                megatron_param="decoder.layers.*.mlp.linear_fc1.weight",
                hf_param="model.layers.*.mlp.gate_up_proj.weight",
            ),
        )


def rope_settings(config: Any) -> dict[str, Any]:
    """The rotary settings of a Phi-3 config of transformers 4 or 5, as one dictionary.

    Returns:
        ``rope_type``, ``rope_theta``, ``partial_rotary_factor``, ``original_max_position_embeddings`` and what the
        scaling itself holds.
    """
    stated = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    legacy = stated.pop("type", None)
    stated["rope_type"] = stated.get("rope_type") or legacy or "default"
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    for name, default in (
        ("rope_theta", 10000.0),
        ("partial_rotary_factor", 1.0),
        ("original_max_position_embeddings", original),
    ):
        if stated.get(name) is None:
            stated[name] = getattr(config, name, None) or default
    return stated


def _attention_factor(rope: dict[str, Any], extension: float) -> float:
    """sqrt(1 + ln(extension) / ln(original)), unless it is stated."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    extension = rope.get("factor") or extension
    if extension <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(extension) / math.log(rope["original_max_position_embeddings"]))


def _dropout(config: Any) -> float:
    """Megatron has one rate for residuals and embeddings."""
    if config.resid_pdrop != config.embd_pdrop:
        raise ValueError(f"resid_pdrop={config.resid_pdrop} and embd_pdrop={config.embd_pdrop} differ")
    return float(config.resid_pdrop)
