"""What each rank does in the families' parity tests: tiny models that transformers made, in ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import model_worker as worker
import smollm3
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.convert import export_tensors
from phimr_nemo.model.megatron.gpt import PhiGPTModel

SHAPE: Final[dict[str, Any]] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 95,
}
# Slow and fast rotations, and some between: 8 dimensions turn by 1, 0.18, 0.03 and 0.006 a token.
LLAMA3: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama": ("Llama", {"rope_theta": 1000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": False}),
    "llama, a head_dim of its own": ("Llama", {"head_dim": 12, "tie_word_embeddings": True}),
    "smollm2": ("Llama", {"rope_theta": 100000.0, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 64, "tie_word_embeddings": False}),
    "qwen2, tied": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2, untied": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": False}),
    "qwen3, tied": ("Qwen3", {"head_dim": 12, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3", {"rope_theta": 1000.0, "tie_word_embeddings": True}),
    # On the second of two pipeline stages the other one of two layers is rotated than on the first.
    "smollm3, untied": (
        "SmolLM3",
        {"head_dim": 12, "no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": False},
    ),
}
"""Name -> the beginning of transformers' classes, and what its config has besides `SHAPE`."""


def made(case: str) -> Any:
    """A model of transformers with weights of its own making; biases, which it makes 0, are drawn."""
    family, changes = CASES[case]
    torch.manual_seed(0)
    model = smollm3.made_like(family, **SHAPE, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def references(root: str) -> dict[str, worker.Results]:
    """All cases saved under `root`, and what transformers computes with them."""
    return {case: worker.reference(str(Path(root) / case), made(case)) for case in CASES}


def measure(root: str, layout: ParallelConfig) -> dict[str, worker.Results]:
    """Everything that a layout is compared by, of every case."""
    return {case: _measure(str(Path(root) / case), layout) for case in CASES}


def _measure(directory: str, layout: ParallelConfig) -> worker.Results:
    model = worker.build(directory, layout)
    ids, labels = worker.batch()
    row = torch.cat(worker.documents())[None]
    packed = {"input_ids": row, "packed_seq_params": worker.packed(worker.DOCUMENTS)}
    return {
        "weights": dict(export_tensors([model], model.architecture)),
        "logits": worker.forward(model, {"input_ids": ids}),
        "nll": worker.forward(model, {"input_ids": ids, "labels": labels}),
        "packed": worker.forward(model, packed),
        "gradients": worker.gradients(model, layout),
        "packed_gradients": worker.packed_gradients(worker.build(directory, layout)),
    }


def measure_faults(root: str) -> dict[str, Tensor | None]:
    """Logits with one planted fault each, by "case: fault"."""
    one = ParallelConfig()
    llama, qwen2, qwen3 = (str(Path(root) / case) for case in ("llama", "qwen2, tied", "qwen3, tied"))
    arch, smollm = HFDirectory(Path(llama)).architecture, str(Path(root) / "smollm3, untied")
    unrotated = HFDirectory(Path(smollm)).architecture
    models = {
        "llama: scaling ignored": worker.build(llama, one, arch=dataclasses.replace(arch, llama3=None)),
        "llama: scaling of another length": worker.build(
            llama, one, arch=dataclasses.replace(arch, llama3=(8.0, 1.0, 4.0, 256))
        ),
        "qwen2, tied: biases dropped": _without_biases(worker.build(qwen2, one)),
        "qwen3, tied: norms swapped": _norms_swapped(worker.build(qwen3, one)),
        "qwen3, tied: norms after the rotation's half": _norms_rolled(worker.build(qwen3, one)),
        "smollm3, untied: every layer rotated": worker.build(
            smollm, one, arch=dataclasses.replace(unrotated, no_rope_layers=(1, 1, 1, 1))
        ),
        "smollm3, untied: other layers rotated": worker.build(
            smollm, one, arch=dataclasses.replace(unrotated, no_rope_layers=(1, 0, 1, 0))
        ),
    }
    ids, _ = worker.batch()
    return {name: worker.forward(model, {"input_ids": ids}) for name, model in models.items()}


@torch.no_grad()
def _without_biases(model: PhiGPTModel) -> PhiGPTModel:
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.bias.zero_()
    return model


@torch.no_grad()
def _norms_swapped(model: PhiGPTModel) -> PhiGPTModel:
    for layer in model.decoder.layers:
        attention = layer.self_attention
        attention.q_layernorm, attention.k_layernorm = attention.k_layernorm, attention.q_layernorm
    return model


@torch.no_grad()
def _norms_rolled(model: PhiGPTModel) -> PhiGPTModel:
    for layer in model.decoder.layers:
        for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
            norm.weight.copy_(norm.weight.roll(norm.weight.numel() // 2))
    return model


def measure_unsummed_norms(root: str, layout: ParallelConfig) -> dict[str, Tensor]:
    """Gradients when those of the heads' norms are not summed over the tensor-parallel group."""
    model = worker.build(str(Path(root) / "qwen3, tied"), layout)
    model.config.qk_layernorm = False
    assert parallel_state.get_tensor_model_parallel_world_size() > 1
    return worker.gradients(model, layout)
