"""LoRA by NeMo's adapters: what is trained, what is exported, and what PEFT makes of it; tensor parallel as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import align_inputs
import pytest
import supervised_inputs
import torch
from align_inputs import make_case
from distributed import run_distributed
from floor_worker import run
from lora_worker import Adapted, adapted
from safetensors.torch import load_file
from torch import Tensor

from phimr_nemo.config import DPOConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.model.files.checkpoints import open_checkpoint
from phimr_nemo.training.adapters.peft import PEFT_CONFIG, PEFT_WEIGHTS
from phimr_nemo.training.seal import checkpoints

LORA = ("lora.rank=4", "lora.alpha=8")
SPLIT = ("parallel.tensor=2", "parallel.sequence=true")
PLAIN = ("partial_rotary_factor=1.0", "long_factor_growth=0.0")
MATRICES = 4
NEAR = 2e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    align_inputs.make_inputs(root / "align")
    supervised_inputs.make_inputs(root / "supervised")
    return root


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 200, (3, 12), generator=generator)
    return tokens, torch.roll(tokens, -1, dims=1)


def logprobs(model: Any) -> Tensor:
    tokens, labels = rows()
    with torch.no_grad():
        everything = model(tokens).logits.float().log_softmax(-1)
    found: Tensor = everything.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return found


def hugging_face(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("family", "layout"),
    [("phi3", ()), ("phi3", SPLIT), ("qwen2", ()), ("qwen3", SPLIT)],
)
def test_peft_and_the_merged_export_say_what_the_trainer_says(
    family: str, layout: tuple[str, ...], inputs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    root = inputs / "align"
    if family != "phi3":
        root = tmp_path / family
        align_inputs.make_inputs(root, f"family={family}", *PLAIN)
    case = make_case(root, "unused", "dpo", *LORA, *layout)
    size = 2 if layout else 1
    found: list[Adapted] = run_distributed(adapted, size, case.config, case.overrides, *rows(), tmp_path)
    ours = found[0].logprobs
    base = hugging_face(root / "base" / "hf")
    assert (logprobs(base) - ours).abs().max() > 100 * NEAR
    torch.testing.assert_close(logprobs(hugging_face(tmp_path / "hf")), ours, atol=NEAR, rtol=0)
    torch.testing.assert_close(
        logprobs(PeftModel.from_pretrained(base, tmp_path / "adapter")), ours, atol=NEAR, rtol=0
    )
    torch.testing.assert_close(found[0].again, ours, atol=0, rtol=0)
    assert len(found[0].trained) == 2 * MATRICES * 2
    assert all(".adapter." in name for name in found[0].trained)
    assert not any(".adapter." in name for name in found[0].frozen)


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_stage_trains_adapters_and_resumes_exactly(stage: str, inputs: Path, tmp_path: Path) -> None:
    """The export is the base with the written adapter in it; a stopped run ends where a whole one does."""

    def overrides(name: str) -> list[str]:
        shared = [f"run.output={tmp_path / name}", "checkpoint.every=1", "checkpoint.keep=3", "optim.lr=1e-2", *LORA]
        if stage == "sft":
            return [
                *supervised_inputs.overrides(stage, inputs / "supervised", tmp_path / name),
                "max_steps=3",
                *shared,
            ]
        case = make_case(inputs / "align", "unused", stage)
        rounds = (
            ["steps=3", "passes=2", "entropy_bonus=0.01", "curriculum.solved_from=0.5"]
            if stage == "grpo"
            else ["max_steps=3"]
        )
        return [*case.overrides, *rounds, *shared]

    run_distributed(run, 1, stage, overrides("whole"))
    run_distributed(run, 1, stage, overrides("parts"), 2)
    run_distributed(run, 1, stage, overrides("parts"))
    whole, parts = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(UserError, match="holds adapters beside its matrices"):
        open_checkpoint(checkpoints(tmp_path / "whole" / "checkpoints")[0], tmp_path / "whole" / "hf")
    root = inputs / ("supervised" if stage == "sft" else "align")
    base = load_file(root / "base" / "hf" / "model.safetensors")
    adapter = load_file(tmp_path / "whole" / "adapter" / PEFT_WEIGHTS)
    scale = 8 / json.loads((tmp_path / "whole" / "adapter" / PEFT_CONFIG).read_text())["r"]
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        update = torch.zeros_like(weight)
        if f"{module}.lora_A.weight" in adapter:
            update = scale * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
            assert update.any()
        torch.testing.assert_close(whole[name], weight + update, atol=1e-6, rtol=0)


def test_the_best_checkpoint_of_adapters_is_refused(inputs: Path) -> None:
    case = make_case(inputs / "align", "unused", "dpo", *LORA)
    with pytest.raises(UserError, match="with adapters the last step is exported"):
        load_config(DPOConfig, case.config, [*case.overrides, "checkpoint.best=true"])
