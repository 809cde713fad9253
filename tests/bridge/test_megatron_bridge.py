"""Phi-3 in Megatron-Bridge equals transformers' in fp32: logits, loss, every gradient, in every layout.

Weights that come back equal prove no bridge: the planted naive one returns every byte and computes something else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phi3_models
import pytest
import torch
from distributed import run_distributed
from own_worker import step
from safetensors.torch import load_file

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.model import Architecture
from phimr_nemo.model.files.distcheckpoint import DistCheckpoint
from phimr_nemo.model.longrope import LongRopePolicy, inverse_frequencies
from phimr_nemo.model.table import tensor_shapes

Run = Callable[..., list[Any]]

LOGITS = 1e-5
"""Largest difference of logits of size ~4, and of the loss."""
GRADIENTS = 1e-4
FAULT = 1e-2
UPDATE = 1e-3
"""Largest |difference| of an update over |update| (2-norms, of each tensor): Adam divides by small gradients."""
PHI4_MINI_PARAMETERS = 3_836_021_760
# Both regimes and both sides of the boundary between them.
LENGTHS = [32, phi3_models.ORIGINAL, phi3_models.ORIGINAL + 1, 200]
LAYOUTS = [(1, 1), (2, 1), (1, 2)]


@pytest.fixture(scope="session")
def hf(in_bridge: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A variant's Hugging Face directory, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(variant: str, layout: str = "transformers4") -> Path:
        key = (variant, layout)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf") / f"{variant}-{layout}"
            in_bridge("make", 1, made[key], variant, layout)
        return made[key]

    return get


def worst(results: list[list[dict[str, Any]]]) -> dict[str, float]:
    """The largest of each difference over ranks and lengths."""
    each = [one for rank in results for one in rank]
    return {name: max(one[name] for one in each if one[name] is not None) for name in each[0]}


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("variant", phi3_models.VARIANTS)
def test_logits_loss_and_gradients_are_those_of_transformers(
    variant: str, tensor: int, pipeline: int, hf: Any, in_bridge: Run
) -> None:
    found = worst(in_bridge("compare", tensor * pipeline, hf(variant), tensor, pipeline, LENGTHS))
    print(f"{variant} TP {tensor} PP {pipeline}: {found}")
    assert found["logits"] <= LOGITS
    assert found["loss"] <= LOGITS
    assert found["gradients"] <= GRADIENTS


def test_four_tensor_parallel_ranks_share_one_head_each(hf: Any, in_bridge: Run) -> None:
    found = worst(in_bridge("compare", 4, hf("plain"), 4, 1, [32]))
    assert found["logits"] <= LOGITS
    assert found["gradients"] <= GRADIENTS


def test_a_config_of_transformers_5_gives_the_same_model(hf: Any, in_bridge: Run) -> None:
    old, new = hf("tied"), hf("tied", "transformers5")
    written = json.loads((new / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_scaling" not in written
    assert "rope_parameters" not in json.loads((old / "config.json").read_text())
    found = worst(in_bridge("compare", 1, new, 1, 1, LENGTHS))
    assert found["logits"] <= LOGITS
    assert found["gradients"] <= GRADIENTS


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_byte_comes_back(tensor: int, pipeline: int, hf: Any, in_bridge: Run, tmp_path: Path) -> None:
    source, target = hf("untied"), tmp_path / "back"
    in_bridge("round_trip", tensor * pipeline, source, target, tensor, pipeline)
    assert_same_weights(source, target)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.int32), second[name].view(torch.int32)), name


def test_the_naive_bridge_returns_every_byte_and_computes_something_else(
    hf: Any, in_bridge: Run, tmp_path: Path
) -> None:
    source, target = hf("tied"), tmp_path / "back"
    in_bridge("round_trip", 1, source, target, 1, 1, True)
    assert_same_weights(source, target)
    found = in_bridge("compare", 1, source, 1, 1, LENGTHS, True)[0]
    print(f"naive: {found}")
    assert all(one["logits"] > FAULT for one in found)
    assert all(one["gradients"] > GRADIENTS for one in found)


def test_the_naive_bridge_is_wrong_at_two_ranks_even_for_plain_rotary_embeddings(hf: Any, in_bridge: Run) -> None:
    # One rank has nothing to cut, so here the naive mapping of gate_up is the only fault.
    alone = worst(in_bridge("compare", 1, hf("full"), 1, 1, [32], True))
    assert alone["logits"] <= LOGITS
    shared = worst(in_bridge("compare", 2, hf("full"), 2, 1, [32], True))
    print(f"naive, TP 2: {shared}")
    assert shared["logits"] > FAULT


def test_a_stage_goes_on_there_and_back_with_equal_steps(in_bridge: Run, tmp_path: Path) -> None:
    shape = ("max_position_embeddings=256", "original_max_position_embeddings=16", "num_hidden_layers=2")
    run_stage(
        "base", load_config(STAGES["base"], Path("conf/base/tiny.yaml"), [f"run.output={tmp_path / 'base'}", *shape])
    )
    base, batch = tmp_path / "base" / "hf", tmp_path / "batch.safetensors"

    def both(source: Path, name: str, tensor: int, pipeline: int) -> tuple[Path, Path]:
        """One step from `source` on either side; the same loss and the same update."""
        ours, theirs = tmp_path / f"{name}-ours", tmp_path / f"{name}-theirs"
        loss = run_distributed(step, 1, str(source), str(ours), str(batch))[0]
        losses = in_bridge("step", tensor * pipeline, source, theirs, batch, tensor, pipeline)
        assert losses == pytest.approx([loss] * len(losses), abs=LOGITS)
        before, mine, other = weights(source), weights(ours), weights(theirs)
        assert mine.keys() == other.keys() == before.keys()
        ratios = {
            key: float((mine[key] - other[key]).norm() / (mine[key] - value).norm()) for key, value in before.items()
        }
        print(f"{name}: loss {loss} and {losses}, update {max(ratios.values()):.1e}")
        assert max(ratios.values()) <= UPDATE, ratios
        return ours, theirs

    ours, theirs = both(base, "first", 2, 1)
    both(ours, "there", 1, 1)
    both(theirs, "back", 1, 2)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, in however many files."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def phi4_mini(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Architecture]:
    """config.json of the real model."""
    import yaml

    arch = Architecture.from_preset(yaml.safe_load((repository / "conf" / "model" / "phi4mini.yaml").read_text()))
    directory = tmp_path_factory.mktemp("phi4mini")
    (directory / "config.json").write_text(json.dumps({**arch.to_hf_config(), "torch_dtype": "bfloat16"}))
    return directory, arch


def test_the_real_config_has_every_parameter_and_comes_back(
    phi4_mini: tuple[Path, Architecture], in_bridge: Run, tmp_path: Path
) -> None:
    directory, arch = phi4_mini
    found = in_bridge("on_meta", 1, directory)[0]
    assert found["parameters"] == PHI4_MINI_PARAMETERS
    assert {name: tuple(shape) for name, shape in found["tensors"].items()} == tensor_shapes(arch)
    # 96 of 128 dimensions times sqrt(1 + ln 32 / ln 4096).
    assert found["factor"] == pytest.approx([1.190238071] * 96 + [1.0] * 32, abs=1e-7)
    (tmp_path / "config.json").write_text(json.dumps({**found["config"], **token_ids(arch)}))
    # Its window of attention is longer than its longest sequence: none.
    assert Architecture.from_directory(tmp_path) == dataclasses.replace(arch, sliding_window=None)


def test_the_published_config_is_that_model(
    phi4_mini: tuple[Path, Architecture], shared_data: Path, in_bridge: Run
) -> None:
    published, ours = (in_bridge("on_meta", 1, place)[0] for place in (shared_data / "phi4-mini", phi4_mini[0]))
    assert published == ours


def token_ids(arch: Architecture) -> dict[str, int]:
    """What a provider does not carry: Megatron-Core's model has no special tokens."""
    return {name: getattr(arch, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@pytest.mark.parametrize("policy", ["per_sequence", "long_when_max_length_exceeds_original", "always_short"])
@pytest.mark.parametrize("max_length", [4096, 4097])
def test_angles_are_those_of_this_project_under_every_policy(
    policy: LongRopePolicy, max_length: int, phi4_mini: tuple[Path, Architecture], in_bridge: Run, hf: Any
) -> None:
    arch = Architecture.from_directory(hf("tied"))
    scaled = max_length - 4096 + arch.original_max_position_embeddings
    lengths = [10, arch.original_max_position_embeddings, scaled]
    found = in_bridge("angles", 1, hf("tied"), policy, scaled, lengths)[0]
    for length, angles in zip(lengths, found, strict=True):
        frequencies = inverse_frequencies(arch, scaled, policy, length)
        assert angles == ((length - 1) * frequencies).tolist() * 2


@pytest.mark.parametrize(
    ("policy", "lengths", "said"),
    [
        ("per_sequence", [10, 64, 1], ""),
        ("per_sequence", [65, 200], ""),
        ("per_sequence", [10, 65], "sequences of 10 and 65 tokens"),
        ("long_when_max_length_exceeds_original", [10, 65], ""),
        ("always_short", [10, 65], ""),
    ],
)
def test_a_packed_row_of_both_regimes_is_refused(
    policy: str, lengths: list[int], said: str, hf: Any, in_bridge: Run
) -> None:
    answer = in_bridge("pack", 1, hf("tied"), policy, lengths)[0]
    assert said in answer
    assert bool(said) == bool(answer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"longrope_policy": "sometimes"}, "longrope_policy='sometimes'"),
        ({"longrope_long_factor": [1.0, 2.0]}, "[2, 6] factors for 6 rotated pairs"),
        ({"longrope_long_factor": None}, "both longrope_short_factor and longrope_long_factor"),
        ({"longrope_original_max_position_embeddings": None}, "longrope_original_max_position_embeddings"),
        ({"rotary_percent": 1.0}, "[6] factors for 8 rotated pairs"),
        ({"qk_layernorm": True}, "q_layernorm"),
    ],
)
def test_a_provider_that_cannot_be_exact_is_refused(changes: Any, said: str, hf: Any, in_bridge: Run) -> None:
    assert said in in_bridge("configure", 1, hf("tied"), changes)[0]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "metadata"),
    [
        (1, 2, None),
        (1, 2, {"non_homogeneous_layers": True}),
        (2, 1, {"singleton_local_shards": True}),
    ],
    ids=["all layers together", "layer by layer", "gate and up apart"],
)
def test_checkpoints_of_the_newest_megatron_core_are_read(
    tensor: int, pipeline: int, metadata: Any, hf: Any, in_bridge: Run, tmp_path: Path
) -> None:
    source = hf("untied")
    in_bridge("save_distributed", tensor * pipeline, source, tmp_path / "saved", tensor, pipeline, metadata)
    checkpoint = DistCheckpoint(tmp_path / "saved", Architecture.from_directory(source))
    for name, wanted in weights(source).items():
        found = torch.empty_like(wanted)
        checkpoint.read_rows(name, 0, found)
        assert torch.equal(found, wanted), name
