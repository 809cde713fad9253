"""The whole recipe on each family in its smallest form: the quickstart's own steps, and the same table at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
import smollm3  # noqa: F401  transformers 4.51 has no SmolLM3
import torch
from warm_phimr import run_steps

from phimr_nemo.config.tiny import FamilyName
from phimr_nemo.data.chat import load_tokenizer, prompt_text
from phimr_nemo.jobs.quickstart import ROWS, write_report
from phimr_nemo.model.base import TURNS
from phimr_nemo.store.runs import RunDirectory, read_metrics

pytestmark = pytest.mark.slow

CLASSES: dict[FamilyName, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""Phi's recipe is in test_tiny.py."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's steps write to ROOT/FAMILY/seed-0."""
    root = tmp_path_factory.mktemp("families")
    run_steps([step for name in CLASSES for step in small.quickstart(root / name / "seed-0", f"family={name}")])
    return root


@pytest.mark.parametrize("family", CLASSES)
def test_every_step_of_the_recipe_is_done_on_the_family(family: FamilyName, root: Path) -> None:
    from transformers import AutoModelForCausalLM

    place = root / family / "seed-0"
    steps = small.quickstart(place, f"family={family}")
    assert all(RunDirectory(step.output).is_done for step in steps)
    for stage, count in (("midtrain", small.MIDTRAIN_STEPS), ("sft", small.SFT_STEPS), ("dpo", small.DPO_STEPS)):
        losses = [line["loss"] for line in read_metrics(place / stage) if "loss" in line]
        assert len(losses) == count
        assert all(0.0 < loss < 10.0 for loss in losses)
    release = place / "release" / "hf"
    assert json.loads((release / "config.json").read_text("utf-8"))["model_type"] == family
    model = AutoModelForCausalLM.from_pretrained(release, torch_dtype=torch.float32)
    assert type(model).__name__ == CLASSES[family]
    tokenizer = load_tokenizer(release)
    prompt = prompt_text(tokenizer, "What is 2+2?")
    before, behind = TURNS[family].role
    assert f"{before}user{behind}What is 2+2?" in prompt
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    assert bool(model(ids).logits.isfinite().all())


@pytest.mark.parametrize("family", CLASSES)
def test_the_table_has_the_rows_of_the_quickstarts(family: FamilyName, root: Path, tmp_path: Path) -> None:
    write_report([root / family], tmp_path)
    table = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert [row["row"] for row in table] == [row for _, row in ROWS]
    assert {row["n"] for row in table} == {small.HELD_OUT}
