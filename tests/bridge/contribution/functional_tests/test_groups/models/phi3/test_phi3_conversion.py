"""Conversion of a toy Phi-3 model with logits, in one process, on a GPU or without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from transformers import Phi3Config, Phi3ForCausalLM

HF_PHI3_TOY_MODEL_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    },
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class TestPhi3Conversion:
    """Logits prove a conversion; weights that come back equal do not."""

    @pytest.fixture(scope="class")
    def phi3_toy_model(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Phi3ForCausalLM]:
        """A toy model with random weights, and its directory."""
        torch.manual_seed(0)
        model = Phi3ForCausalLM(Phi3Config(**HF_PHI3_TOY_MODEL_CONFIG)).eval()
        directory = tmp_path_factory.mktemp("phi3_toy_model") / "phi3_toy"
        model.save_pretrained(directory)
        return directory, model

    @pytest.fixture(scope="class")
    def groups(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """Process groups of one process."""
        store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    # Both sides of the boundary between LongRoPE's regimes.
    @pytest.mark.parametrize("length", [32, 64, 65, 200])
    def test_phi3_logits_and_round_trip(
        self, length: int, phi3_toy_model: tuple[Path, Phi3ForCausalLM], groups: None
    ) -> None:
        """HF -> Megatron gives the same logits, Megatron -> HF the same tensors."""
        directory, reference = phi3_toy_model
        bridge = AutoBridge.from_hf_pretrained(directory)
        provider = bridge.to_megatron_provider(load_weights=False)
        provider.use_cpu_initialization = True
        provider.transformer_layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        provider.params_dtype, provider.bf16 = torch.float32, False
        for fusion in ("masked_softmax_fusion", "bias_activation_fusion", "gradient_accumulation_fusion"):
            setattr(provider, fusion, False)
        provider.finalize()
        provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        model = provider.provide().eval()
        bridge.load_hf_weights([model])

        tokens = torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
        with torch.no_grad():
            found = model(tokens, torch.arange(length).expand(2, -1), mask)
            wanted = reference(tokens).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

        exported = dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))
        for name, tensor in reference.state_dict().items():
            if name in exported:
                assert torch.equal(exported[name], tensor), name
