"""The family's published config.json files: what is read from each, and which lengths it is trained at.

The numbers are those of the models' pages on the Hugging Face hub; only the values of the Phi-3 models' 48 rotary
factors are made up (their count and order matter here), Phi-4-mini's are the real ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.layout import check_length

PHI3_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 32064,
}
FACTORS = {"short_factor": [1.0 + i / 100 for i in range(48)], "long_factor": [1.0 + i for i in range(48)]}
LONG = {"max_position_embeddings": 131072, "sliding_window": 262144}
PHI3_MINI_128K = {**PHI3_MINI, **LONG, "rope_scaling": {"type": "su", **FACTORS}}
PHI35_MINI = {**PHI3_MINI, **LONG, "rope_scaling": {"type": "longrope", **FACTORS}}
PHI3_PARAMETERS = 3_821_079_552
"""Of every Phi-3-mini, as its safetensors headers say."""


def phi4_mini(repository: Path, **changes: Any) -> dict[str, Any]:
    values = yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text())
    scaling = {
        "type": "longrope",
        "short_factor": values.pop("short_factor"),
        "long_factor": values.pop("long_factor"),
    }
    # What the published file says besides.
    extra = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
    fixed = {name: PHI3_MINI[name] for name in ("architectures", "model_type", "hidden_act", "attention_dropout")}
    return {**fixed, **extra, **values, "rope_scaling": scaling, "torch_dtype": "bfloat16", **changes}


def write(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_phi4_mini_and_phi4_mini_reasoning(repository: Path, tmp_path: Path, shared_data: Path) -> None:
    """Reasoning has Instruct's architecture; its file differs in the name and the version that wrote it."""
    real = Architecture.from_directory(shared_data / "phi4-mini")
    published = json.loads((shared_data / "phi4-mini" / "config.json").read_text())
    reasoning = {**published, "_name_or_path": "Phi-4-mini-reasoning", "transformers_version": "4.50.0"}
    assert Architecture.from_directory(write(tmp_path / "reasoning", reasoning)) == real
    assert Architecture.from_directory(write(tmp_path / "preset", phi4_mini(repository))) == real


def test_phi4_mini_as_its_preset_writes_it(repository: Path, tmp_path: Path) -> None:
    arch = Architecture.from_directory(write(tmp_path / "hf", phi4_mini(repository)))
    assert (arch.num_attention_heads, arch.num_key_value_heads, arch.rotary_dim) == (24, 8, 96)
    assert arch.tie_word_embeddings
    # A window of 262,144 tokens is wider than the longest sequence: full attention at every length.
    for length in (4096, 4097, arch.max_position_embeddings):
        check_length(arch, length)
    with pytest.raises(UserError, match="sequence_length=131073"):
        check_length(arch, arch.max_position_embeddings + 1)


@pytest.mark.parametrize(
    ("config", "rotary_type"), [(PHI3_MINI_128K, "su"), (PHI35_MINI, "longrope")], ids=["phi-3-128k", "phi-3.5"]
)
def test_phi3_mini_with_128k(config: dict[str, Any], rotary_type: str, tmp_path: Path) -> None:
    assert config["rope_scaling"]["type"] == rotary_type
    arch = Architecture.from_directory(write(tmp_path / "hf", config))
    # The whole head of 96 is rotated, all 32 heads have keys and values of their own, the head is not tied.
    assert (arch.head_dim, arch.rotary_dim, arch.num_key_value_heads) == (96, 96, 32)
    assert arch.short_factor == tuple(FACTORS["short_factor"])
    assert arch.long_factor == tuple(FACTORS["long_factor"])
    assert arch.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    assert not arch.tie_word_embeddings
    assert arch.num_parameters == PHI3_PARAMETERS
    check_length(arch, 131072)


def test_the_two_names_of_longrope_are_one() -> None:
    assert Architecture.from_hf_config(PHI3_MINI_128K) == Architecture.from_hf_config(PHI35_MINI)
    written = Architecture.from_hf_config(PHI3_MINI_128K).to_hf_config()
    assert written["rope_scaling"]["type"] == "longrope"


def test_phi3_mini_4k_is_full_attention_up_to_its_window_and_refused_beyond(tmp_path: Path) -> None:
    arch = Architecture.from_directory(write(tmp_path / "hf", PHI3_MINI))
    assert (arch.short_factor, arch.attention_factor) == (None, 1.0)
    assert arch.num_parameters == PHI3_PARAMETERS
    check_length(arch, 2047)
    for length in (2048, 4096):
        with pytest.raises(UserError) as caught:
            check_length(arch, length)
        assert f"sequence_length={length} with a sliding window of 2047" in caught.value.problem
        assert "2047" in caught.value.remedy


def test_a_window_is_full_attention_up_to_its_own_length_in_transformers(tmp_path: Path) -> None:
    """What the rule rests on: in transformers the window changes nothing up to its length, and something beyond."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    window = 7
    small = {
        **PHI3_MINI,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    models = []
    for value in (window, None):
        torch.manual_seed(0)
        models.append(Phi3ForCausalLM(Phi3Config(**{**small, "sliding_window": value})).eval())
    for length, is_equal in ((window, True), (window + 1, False)):
        ids = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            windowed, full = (model(ids).logits for model in models)
        assert torch.equal(windowed, full) is is_equal, length


def test_phi4_with_14b(tmp_path: Path) -> None:
    """Phi-4 and Phi-4-reasoning are of the family too: plain rotary with another base, 40 heads in 10 groups."""
    changes = {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "sliding_window": None,
        "vocab_size": 100352,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "pad_token_id": 100349,
    }
    arch = Architecture.from_directory(write(tmp_path / "hf", {**PHI3_MINI, **changes}))
    assert (arch.head_dim, arch.rotary_dim, arch.rope_theta) == (128, 128, 250000.0)
    assert arch.num_parameters == 14_659_507_200
    check_length(arch, 16384)
