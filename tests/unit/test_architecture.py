"""Architectures: Phi-4-mini's real numbers, round trips through config.json, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture

PHI4_MINI_PARAMETERS = 3_836_021_760
PHI4_MINI_TENSORS = 194
TINY_VOCABULARY = 512


def tiny(repository: Path, **filled: Any) -> Architecture:
    values = yaml.safe_load((repository / "conf/model/tiny.yaml").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return Architecture.from_preset(values, **{"vocab_size": TINY_VOCABULARY, **ids, **filled})


def real_config(**changes: Any) -> dict[str, Any]:
    """A config.json as the hub has them for Phi-3.5-mini, with its own 48 factors shortened to this head."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [2.0] * 12},
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "initializer_range": 0.02,
        **changes,
    }


def test_the_preset_is_phi4_mini_parameter_for_parameter(repository: Path) -> None:
    arch = Architecture.from_preset(yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text()))
    # Embedding 200064 x 3072; per layer qkv 5120 x 3072, o 3072^2, gate_up 16384 x 3072, down 3072 x 8192, two
    # norms; one last norm.
    layer = 5120 * 3072 + 3072 * 3072 + 16384 * 3072 + 3072 * 8192 + 2 * 3072
    assert arch.num_parameters == 200064 * 3072 + 32 * layer + 3072 == PHI4_MINI_PARAMETERS
    assert (arch.head_dim, arch.rotary_dim) == (128, 96)
    # sqrt(1 + ln(131072 / 4096) / ln 4096) = sqrt(1 + ln 2^5 / ln 2^12) = sqrt(17 / 12)
    assert math.isclose(arch.attention_factor, math.sqrt(17 / 12), rel_tol=1e-12)
    assert round(arch.attention_factor, 6) == 1.190238


def test_the_preset_equals_the_real_config(shared_data: Path, repository: Path) -> None:
    real = Architecture.from_directory(shared_data / "phi4-mini")
    preset = Architecture.from_preset(yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text()))
    assert real == preset


def test_the_table_lists_the_real_checkpoint(shared_data: Path) -> None:
    from phimr_nemo.model.table import tensor_shapes

    shapes = tensor_shapes(Architecture.from_directory(shared_data / "phi4-mini"))
    index = json.loads((shared_data / "phi4-mini" / "model.safetensors.index.json").read_text())
    assert shapes.keys() == index["weight_map"].keys()
    assert len(shapes) == PHI4_MINI_TENSORS
    bytes_of_bfloat16 = 2
    assert sum(map(math.prod, shapes.values())) * bytes_of_bfloat16 == index["metadata"]["total_size"]


@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_is_the_sum_of_the_tensors(repository: Path, tied: bool) -> None:
    from phimr_nemo.model.table import tensor_shapes

    arch = tiny(repository, tie_word_embeddings=tied)
    assert sum(map(math.prod, tensor_shapes(arch).values())) == arch.num_parameters


def test_tiny_is_about_a_million_parameters_with_every_feature(repository: Path) -> None:
    arch = tiny(repository)
    assert 0.8e6 < arch.num_parameters < 1.2e6
    assert arch.num_attention_heads % arch.num_key_value_heads == 0
    assert arch.num_key_value_heads < arch.num_attention_heads
    assert arch.rotary_dim < arch.head_dim
    assert arch.attention_factor > 1
    assert arch.tie_word_embeddings


def test_config_json_round_trip(repository: Path, tmp_path: Path) -> None:
    for arch in (tiny(repository), tiny(repository, short_factor=None, long_factor=None, sliding_window=99)):
        (tmp_path / "config.json").write_text(json.dumps(arch.to_hf_config()))
        assert Architecture.from_directory(tmp_path) == arch


def test_transformers_reads_the_written_config_alike(repository: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arch = tiny(repository)
    config = transformers.Phi3Config(**arch.to_hf_config())
    written = {field.name for field in dataclasses.fields(arch)} & arch.to_hf_config().keys()
    assert "partial_rotary_factor" in written
    for name in written:
        assert getattr(config, name) == getattr(arch, name), name
    assert tuple(config.rope_scaling["long_factor"]) == arch.long_factor
    assert config.architectures == ["Phi3ForCausalLM"]


def test_both_generations_of_transformers_mean_the_same() -> None:
    """transformers 5 writes one rope_parameters dictionary for what 4 spreads over three fields."""
    old = real_config(partial_rotary_factor=1.0)
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta", "partial_rotary_factor")}
    new["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
        "short_factor": [1.0] * 12,
        "long_factor": [2.0] * 12,
    }
    assert Architecture.from_hf_config(new) == Architecture.from_hf_config(old)


def test_plain_rotary_and_defaults() -> None:
    arch = Architecture.from_hf_config(real_config(rope_scaling=None, num_key_value_heads=None))
    assert (arch.short_factor, arch.attention_factor) == (None, 1.0)
    assert arch.num_key_value_heads == arch.num_attention_heads


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"architectures": ["Phi3VForCausalLM"]}, "Phi3VForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"resid_pdrop": 0.1}, "resid_pdrop"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 12}}, "long_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "1 numbers"),
        ({"rope_scaling": {"type": "longrope", "short_mscale": 1.1}}, "short_mscale"),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 12,
                    "long_factor": [0.0] * 12,
                }
            },
            "long_factor",
        ),
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"hidden_size": 97}, "97"),
        ({"hidden_size": -96}, "-96"),
        ({"head_dim": 32}, "head_dim"),
        ({"vocab_size": None}, "vocab_size"),
        ({"eos_token_id": "end", "pad_token_id": 1}, "eos_token_id"),
        ({"partial_rotary_factor": 0.0001}, "partial_rotary_factor"),
    ],
)
def test_what_the_model_would_not_reproduce_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        Architecture.from_hf_config(real_config(**changes))
    assert named in caught.value.problem
    assert caught.value.rule
    assert caught.value.remedy


@pytest.mark.parametrize("content", [None, "{", "[]", "\ufffd\x00"])
def test_unreadable_config_json(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        Architecture.from_directory(tmp_path)


def test_presets_name_unknown_missing_and_unfilled_fields(repository: Path) -> None:
    with pytest.raises(UserError, match="vocab_size"):
        tiny(repository, vocab_size=None)
    with pytest.raises(UserError, match="hidden_sise"):
        tiny(repository, hidden_sise=12)
    with pytest.raises(UserError, match="rope_theta"):
        Architecture.from_preset({"vocab_size": 3})


def test_architecture_needs_no_torch() -> None:
    code = "import sys, phimr_nemo.model.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
