"""Phi-3 in Megatron-Bridge equals transformers' in fp32: logits, loss, every gradient, in every layout.

Weights that come back equal prove no bridge: the planted naive one returns every byte and computes something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file

LOGITS = 1e-5
"""Largest difference of logits of size ~4, and of the loss."""
GRADIENTS = 1e-4
FAULT = 1e-2
# Both regimes and both sides of the boundary between them.
LENGTHS = [32, models.ORIGINAL, models.ORIGINAL + 1, 200]
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
@pytest.mark.parametrize("variant", models.VARIANTS)
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
