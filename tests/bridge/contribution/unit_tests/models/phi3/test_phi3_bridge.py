"""Unit tests of the Phi-3 bridge, in the form of Megatron-Bridge's tests/unit_tests/models."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.phi3.phi3_bridge import FusedGatedMLPMapping, Phi3Bridge, rope_settings
from megatron.bridge.models.phi3.phi3_provider import Phi3ModelProvider
from transformers import Phi3Config


class TestPhi3Bridge:
    """Phi3Bridge: configs of transformers 4 and 5, LongRoPE and plain rotary embeddings."""

    @pytest.fixture
    def phi4_mini_config(self) -> Phi3Config:
        """Phi-4-mini's numbers with another LongRoPE, as transformers 4 writes them."""
        return Phi3Config(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=24,
            num_key_value_heads=8,
            vocab_size=200064,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            rope_theta=10000.0,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            sliding_window=262144,
            pad_token_id=199999,
            bos_token_id=199999,
            eos_token_id=199999,
            torch_dtype="bfloat16",
        )

    @pytest.fixture
    def pretrained(self, phi4_mini_config: Phi3Config) -> Mock:
        """A PreTrainedCausalLM with that config and no weights."""
        mock = Mock(spec=PreTrainedCausalLM)
        mock.config = phi4_mini_config
        return mock

    def test_registration(self) -> None:
        """It is a MegatronModelBridge."""
        assert issubclass(Phi3Bridge, MegatronModelBridge)

    def test_provider_bridge_architecture(self, pretrained: Mock) -> None:
        """The sizes are the config's."""
        provider = Phi3Bridge().provider_bridge(pretrained)
        assert isinstance(provider, Phi3ModelProvider)
        assert provider.num_layers == 32
        assert provider.num_query_groups == 8
        assert provider.kv_channels == 128
        assert provider.ffn_hidden_size == 8192
        assert provider.normalization == "RMSNorm"
        assert provider.share_embeddings_and_output_weights
        assert provider.bf16
        assert provider.params_dtype == torch.bfloat16

    def test_provider_bridge_longrope(self, pretrained: Mock) -> None:
        """Partial rotary embeddings, both sets of factors and the attention factor."""
        provider = Phi3Bridge().provider_bridge(pretrained)
        assert provider.rotary_percent == 0.75
        assert provider.rotary_dim == 96
        assert provider.longrope_short_factor == [1.0] * 48
        assert provider.longrope_long_factor == [2.0] * 48
        assert provider.longrope_original_max_position_embeddings == 4096
        assert provider.longrope_attention_factor == pytest.approx(1.190238071)
        # Longer than the longest sequence: no window.
        assert provider.window_size is None

    def test_provider_bridge_sliding_window(self, pretrained: Mock, phi4_mini_config: Phi3Config) -> None:
        """A window of n tokens is the token itself and n - 1 before it."""
        phi4_mini_config.sliding_window = 2047
        assert Phi3Bridge().provider_bridge(pretrained).window_size == (2046, 0)

    def test_provider_bridge_refuses_other_scaling(self, pretrained: Mock, phi4_mini_config: Phi3Config) -> None:
        """Another rotary scaling is an error, and not dropped."""
        phi4_mini_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.75}
        with pytest.raises(ValueError, match="dynamic"):
            Phi3Bridge().provider_bridge(pretrained)

    def test_megatron_to_hf_config(self, pretrained: Mock, phi4_mini_config: Phi3Config) -> None:
        """The config of a provider describes the same model, also after a run with shorter sequences."""
        provider = Phi3Bridge().provider_bridge(pretrained)
        provider.seq_length = 16384
        back = Phi3Config(**Phi3Bridge.megatron_to_hf_config(provider))
        for name in ("hidden_size", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
            assert getattr(back, name) == getattr(phi4_mini_config, name)
        wanted, found = rope_settings(phi4_mini_config), rope_settings(back)
        assert {key: found[key] for key in wanted} == wanted

    def test_mapping_registry(self) -> None:
        """Fused weights have mappings of their own, and both kinds of layers are known."""
        registry = Phi3Bridge().mapping_registry()
        assert isinstance(registry, MegatronMappingRegistry)
        gate_up = registry.megatron_to_hf_lookup("decoder.layers.3.mlp.linear_fc1.weight")
        assert isinstance(gate_up, FusedGatedMLPMapping)
        assert gate_up.hf_param == "model.layers.3.mlp.gate_up_proj.weight"
        for norm in ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"):
            found: Any = registry.megatron_to_hf_lookup(f"decoder.layers.3.{norm}")
            assert found.hf_param == "model.layers.3.input_layernorm.weight"
