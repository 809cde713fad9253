"""The families: what is read from each one's config.json and written again, and which models are refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import smollm3  # noqa: F401  transformers 4.51 has no SmolLM3
import torch
from architectures import small
from warm_phimr import phimr

from phimr_nemo.config import BaseConfig, ParallelConfig, load_config
from phimr_nemo.config.tiny import FamilyName
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.families import FAMILIES
from phimr_nemo.model.layout import check_length
from phimr_nemo.model.longrope import inverse_frequencies
from phimr_nemo.model.table import tensor_shapes
from phimr_nemo.plan.request import find_model
from phimr_nemo.plan.weights import stage_parameters

# As published, without what does not matter: meta-llama/Llama-3.2-1B, HuggingFaceTB/SmolLM2-135M,
# mistralai/Mistral-7B-v0.1, Qwen/Qwen2.5-0.5B, Qwen/Qwen3-0.6B-Base, HuggingFaceTB/SmolLM3-3B-Base.
LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
PUBLISHED = {
    "llama-3.2-1b": (LLAMA_32_1B, 1_235_814_400),
    "smollm2-135m": (SMOLLM2_135M, 134_515_008),
    "mistral-7b": (MISTRAL_7B, 7_241_732_096),
    "qwen2.5-0.5b": (QWEN25_05B, 494_032_768),
    "qwen3-0.6b": (QWEN3_06B, 596_049_920),
    "smollm3-3b": (SMOLLM3_3B, 3_075_098_624),
}
"""Config and parameters, as the models' safetensors headers say."""


def test_a_tiny_base_can_be_of_every_family() -> None:
    assert set(get_args(FamilyName)) == set(FAMILIES)


@pytest.mark.parametrize("change", ["partial_rotary_factor=1.0", "long_factor_growth=0.0"])
def test_a_tiny_base_is_refused_what_its_family_does_not_have(change: str) -> None:
    with pytest.raises(UserError, match="Phi's"):
        load_config(BaseConfig, Path("conf/base/tiny.yaml"), ["family=qwen3", change])


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_config_has_the_published_number_of_parameters(config: dict[str, Any], parameters: int) -> None:
    arch = Architecture.from_hf_config(config)
    assert arch.num_parameters == parameters
    assert sum(math.prod(shape) for shape in tensor_shapes(arch).values()) == parameters


@pytest.mark.parametrize("config", [config for config, _ in PUBLISHED.values()], ids=PUBLISHED)
def test_transformers_reads_what_is_written_as_it_reads_the_published_config(config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = Architecture.from_hf_config(config)
    written = arch.to_hf_config()
    assert Architecture.from_hf_config(written) == arch
    models = []
    for values in (config, written):
        # A copy: transformers changes the dictionaries that it is given.
        with torch.device("meta"):
            models.append(AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(values))))
    published, ours = models
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1] == tensor_shapes(arch)
    assert type(published) is type(ours)
    same = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "hidden_act", "rope_scaling", "no_rope_layers")
    for name in same:
        assert getattr(ours.config, name, None) == getattr(published.config, name, None), name
    rotary = type(ours.model.rotary_emb)(ours.config, device=torch.device("cpu"))
    assert torch.equal(inverse_frequencies(arch, 1, "always_short"), rotary.inv_freq)


@pytest.mark.parametrize("config", [config for config, _ in PUBLISHED.values()], ids=PUBLISHED)
def test_both_generations_of_transformers_mean_the_same(config: dict[str, Any]) -> None:
    """transformers 5 writes one rope_parameters dictionary, and the kind of every layer's attention."""
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    new = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    if config["model_type"].startswith(("qwen", "smollm3")):
        new["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    assert Architecture.from_hf_config(new) == Architecture.from_hf_config(config)


def test_a_config_is_read_in_full() -> None:
    llama, qwen3 = Architecture.from_hf_config(LLAMA_32_1B), Architecture.from_hf_config(QWEN3_06B)
    assert (llama.family, llama.llama3) == ("llama", (32.0, 1.0, 4.0, 8192))
    assert (llama.eos_token_id, llama.pad_token_id, llama.head_size) == (128001, 128001, None)
    assert (qwen3.family, qwen3.head_size, qwen3.head_dim) == ("qwen3", 128, 128)
    assert Architecture.from_hf_config(MISTRAL_7B).sliding_window == 4096
    assert Architecture.from_hf_config(QWEN25_05B).sliding_window is None
    rotated = Architecture.from_hf_config(SMOLLM3_3B).rotated_layers
    assert [layer for layer, is_rotated in enumerate(rotated) if not is_rotated] == list(range(3, 36, 4))
    assert qwen3.rotated_layers == (True,) * 28


def test_what_a_config_does_not_state_is_transformers_default() -> None:
    qwen3 = {name: value for name, value in QWEN3_06B.items() if name not in ("head_dim", "rms_norm_eps")}
    assert Architecture.from_hf_config(qwen3) == Architecture.from_hf_config(QWEN3_06B)
    unsaid = {name: value for name, value in MISTRAL_7B.items() if name not in ("sliding_window", "head_dim")}
    assert Architecture.from_hf_config(unsaid).sliding_window == 4096
    assert Architecture.from_hf_config(SMOLLM2_135M | {"head_dim": None}).head_size is None


def test_what_smollm3_does_not_state_is_transformers_default() -> None:
    published = Architecture.from_hf_config(SMOLLM3_3B)
    unsaid = {
        name: value for name, value in SMOLLM3_3B.items() if name not in ("no_rope_layers", "tie_word_embeddings")
    }
    assert Architecture.from_hf_config(unsaid) == published
    assert Architecture.from_hf_config(unsaid | {"no_rope_layers": None}) == published
    assert Architecture.from_hf_config(SMOLLM3_3B | {"no_rope_layers": [1, 1, 1, 0] * 12}) == published
    third = Architecture.from_hf_config(unsaid | {"no_rope_layer_interval": 3})
    assert third.no_rope_layers == (1, 1, 0) * 12
    assert Architecture.from_hf_config(third.to_hf_config()) == third
    for place in (None, {"rope_type": "default"}):
        bare = {name: value for name, value in unsaid.items() if name not in ("rope_theta", "rope_scaling")}
        assert Architecture.from_hf_config(bare | {"rope_parameters": place}).rope_theta == 2e6


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "mixtral", "qwen3_moe", None, ["llama"]])
def test_another_family_is_refused_with_the_names_of_those_that_work(model_type: Any) -> None:
    with pytest.raises(UserError) as caught:
        Architecture.from_hf_config(LLAMA_32_1B | {"model_type": model_type})
    assert repr(model_type) in caught.value.problem
    assert all(name in caught.value.rule for name in FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("gemma2", "norms"), ("qwen3_moe", "mixtures of experts")],
)
def test_a_family_that_is_asked_for_is_refused_with_what_it_has(model_type: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B | {"model_type": model_type}), "utf-8")
    with pytest.raises(UserError, match=reason):
        Architecture.from_directory(tmp_path)


@pytest.mark.parametrize("config", [MISTRAL_7B, LLAMA_32_1B], ids=["mistral", "llama"])
def test_a_sequence_beyond_the_window_is_refused_and_one_within_sees_everything(config: dict[str, Any]) -> None:
    arch = Architecture.from_hf_config(config)
    window = config.get("sliding_window")
    check_length(arch, window or 8192)
    assert arch.sliding_window == window
    if window is not None:
        with pytest.raises(UserError, match=f"sliding window of {window}") as caught:
            check_length(arch, window + 1)
        assert f"at most {window}" in caught.value.remedy


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (LLAMA_32_1B, {"attention_bias": True}, "attention_bias"),
        (LLAMA_32_1B, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA_32_1B, {"hidden_act": "gelu"}, "gelu"),
        (LLAMA_32_1B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (LLAMA_32_1B, {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        (LLAMA_32_1B, {"rope_scaling": LLAMA_32_1B["rope_scaling"] | {"rope_type": "default"}}, "factor"),
        (LLAMA_32_1B, {"rope_scaling": LLAMA_32_1B["rope_scaling"] | {"low_freq_factor": 4.0}}, "llama3"),
        (LLAMA_32_1B, {"rope_scaling": LLAMA_32_1B["rope_scaling"] | {"factor": "32"}}, "factor"),
        (LLAMA_32_1B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_32_1B, {"head_dim": 0}, "head_dim"),
        (LLAMA_32_1B, {"head_dim": 63}, "head_dim"),
        (QWEN25_05B, {"rope_scaling": LLAMA_32_1B["rope_scaling"]}, "llama3"),
        (QWEN25_05B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN25_05B, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        (QWEN25_05B, {"head_dim": 32}, "head_dim"),
        (QWEN3_06B, {"attention_bias": True}, "attention_bias"),
        (QWEN3_06B, {"head_dim": None}, "head_dim"),
        (MISTRAL_7B, {"sliding_window": 0}, "sliding_window"),
        (SMOLLM3_3B, {"no_rope_layers": [1] * 35}, "no_rope_layers"),
        (SMOLLM3_3B, {"no_rope_layers": [1, 1, 1, 2] * 9}, "no_rope_layers"),
        (SMOLLM3_3B, {"no_rope_layers": ["1"] * 36}, "no_rope_layers"),
        (SMOLLM3_3B, {"no_rope_layers": 4}, "no_rope_layers"),
        (SMOLLM3_3B, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        (SMOLLM3_3B, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        (SMOLLM3_3B, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_what_a_family_does_not_have_is_refused(config: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        Architecture.from_hf_config(config | changes)
    assert named in caught.value.problem


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"partial_rotary_factor": 0.5}),
        ("qwen2", {"llama3": (8.0, 1.0, 4.0, 8192)}),
        ("qwen2", {"head_size": 16}),
        ("qwen3", {"sliding_window": 16}),
        ("phi3", {"head_size": 16}),
        ("llama", {"no_rope_layers": (1, 0)}),
        ("gemma", {}),
    ],
)
def test_an_architecture_has_what_its_family_has(family: str, change: dict[str, Any]) -> None:
    plain = small(partial_rotary_factor=1.0)
    with pytest.raises(UserError, match="family"):
        dataclasses.replace(plain, family=family, **change)


@pytest.mark.parametrize("entries", [None, (1,), (1, 2), (1, 0, 1), [1, 0]])
def test_a_smollm3_says_of_every_layer_whether_it_is_rotated(entries: Any) -> None:
    with pytest.raises(UserError, match="no_rope_layers"):
        small(partial_rotary_factor=1.0, family="smollm3", no_rope_layers=entries)


def test_llama3_scaling_in_closed_form() -> None:
    """Rotations of more than 4 turns in 8,192 tokens stay, of less than one are divided by 32."""
    arch = Architecture.from_hf_config(LLAMA_32_1B)
    found = inverse_frequencies(arch, 1, "always_short").double()
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    turns = 8192 * plain / (2 * math.pi)
    share = ((turns - 1.0) / 3.0).clamp(0, 1)
    assert torch.allclose(found, share * plain + (1 - share) * plain / 32, rtol=1e-5)
    assert {0.0, 1.0} < set(share.tolist()), "slow, fast and some between"


PRESETS = {
    "phi4mini": 3_836_021_760,
    "phi3-mini": 3_821_079_552,
    "phi3.5-mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "smollm3-3b": 3_075_098_624,
}
"""Parameters of the published models of conf/model, as their safetensors headers say."""


def test_every_preset_is_here(repository: Path) -> None:
    assert {file.stem for file in (repository / "conf" / "model").glob("*.yaml")} - {"tiny"} == set(PRESETS)


@pytest.mark.parametrize(("preset", "parameters"), PRESETS.items(), ids=PRESETS)
def test_transformers_builds_the_published_number_of_parameters_from_a_preset(preset: str, parameters: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = find_model(preset)
    assert arch.num_parameters == parameters
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch.to_hf_config()))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert stage_parameters(arch, ParallelConfig(), 0) == parameters, "what the planner counts"


def test_the_presets_of_published_configs_are_read_from_them_alike() -> None:
    for preset in ("llama-3.2-1b", "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "smollm3-3b"):
        assert find_model(preset) == Architecture.from_hf_config(PUBLISHED[preset][0])


def test_a_layout_is_planned_for_a_model_of_another_family() -> None:
    done = phimr("plan", "stage=sft", "model=qwen3-1.7b", "gpus=8", "gpu=h100-80g")
    assert done.returncode == 0, done.stderr
    assert "sft of qwen3-1.7b on 8 x h100-80g: layouts that fit" in done.stdout
