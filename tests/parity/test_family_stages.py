"""A stage of the recipe on a base of another family: it learns, in any layout, and hands on what it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from supervised_inputs import (
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    STEPS,
    WEIGHT_TOLERANCE,
    curve,
    differences,
    make_inputs,
    overrides,
)
from supervised_worker import train

from phimr_nemo.data.chat import load_tokenizer, render_prompt
from phimr_nemo.model.files.hf import HFDirectory

PLAIN = ("partial_rotary_factor=1.0", "long_factor_growth=0.0")
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.fixture(scope="module", params=CLASSES)
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family = request.param
    return family, make_inputs(tmp_path_factory.mktemp(family), f"family={family}", *PLAIN)


def test_sft_learns_and_writes_a_model_of_the_bases_own_family(inputs: tuple[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, root = inputs
    base, made = root / "base" / "hf", tmp_path / "one" / "hf"
    run_distributed(train, 1, "sft", overrides("sft", root, tmp_path / "one"))
    losses = [loss for loss, _ in curve(tmp_path / "one")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(made, torch_dtype=torch.float32)
    assert type(model).__name__ == CLASSES[family]
    assert json.loads((made / "config.json").read_text())["model_type"] == family
    old, new = HFDirectory(base), HFDirectory(made)
    assert old.architecture == new.architecture
    assert not any(torch.equal(old.read(name), new.read(name)) for name in old.names()), "every tensor has learnt"
    prompt = render_prompt(load_tokenizer(made), "What is 2+2?")
    assert prompt == render_prompt(load_tokenizer(base), "What is 2+2?")
    run_distributed(train, 2, "sft", overrides("sft", root, tmp_path / "two", LAYOUTS["TP2"]))
    loss, gradient, weight = differences(tmp_path / "one", tmp_path / "two")
    assert loss <= LOSS_TOLERANCE
    assert gradient <= GRADIENT_TOLERANCE
    assert weight <= WEIGHT_TOLERANCE
