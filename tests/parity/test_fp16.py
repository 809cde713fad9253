"""fp16 where bf16 is offered: the losses of fp32 up to rounding, the scale of the loss, and steps that overflow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import align_inputs
import pytest
import supervised_inputs
import torch
from align_inputs import make_case
from distributed import run_distributed
from floor_worker import run
from safetensors.torch import load_file

from phimr_nemo.config import GuardConfig
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.guard import MOST_OVERFLOWS_IN_A_ROW, BatchGuard

NEAR = 0.1
"""Nats: fp16 has eleven bits, and Adam's first steps have the size of the learning rate whatever a gradient's is."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fp16")
    align_inputs.make_inputs(root / "align")
    supervised_inputs.make_inputs(root / "supervised")
    return root


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_stage_trains_in_fp16_as_in_fp32(stage: str, inputs: Path, tmp_path: Path) -> None:
    losses = {}
    for dtype in ("fp32", "fp16"):
        output = tmp_path / dtype
        shared = [f"run.output={output}", f"model.dtype={dtype}", "run.log_every=1"]
        if stage == "sft":
            run_distributed(
                run,
                1,
                stage,
                [*supervised_inputs.overrides(stage, inputs / "supervised", output), "max_steps=3", *shared],
            )
        else:
            case = make_case(inputs / "align", "unused", stage)
            rounds = ["steps=2"] if stage == "grpo" else ["max_steps=3"]
            run_distributed(run, 1, stage, [*case.overrides, *rounds, *shared])
        losses[dtype] = [row["loss"] for row in read_metrics(output) if "loss" in row]
    # GRPO samples other responses once a rounding has chosen another token.
    compared = 3 if stage != "grpo" else 0
    assert losses["fp16"][:compared] == pytest.approx(losses["fp32"][:compared], abs=NEAR)
    assert losses["fp16"][:1] == pytest.approx(losses["fp32"][:1], abs=0.01)
    root = inputs / ("supervised" if stage == "sft" else "align")
    base, trained = (load_file(place / "hf" / "model.safetensors") for place in (root / "base", tmp_path / "fp16"))
    assert {weight.dtype for weight in trained.values()} == {torch.float16}
    assert all(weight.isfinite().all() for weight in trained.values())
    assert any((trained[name].float() - base[name].float()).abs().max() > 1e-4 for name in base)


def test_a_run_that_only_overflows_stops(tmp_path: Path) -> None:
    """An overflow now and then is fp16's way; so many in a row are not."""
    answers = [*[True] * MOST_OVERFLOWS_IN_A_ROW, False, *[True] * (MOST_OVERFLOWS_IN_A_ROW + 1)]
    asked = iter(answers)
    megatron: Any = SimpleNamespace(
        prepare_grads=lambda: next(asked), get_grad_norm=lambda: 1.0, step_with_ready_grads=lambda: True
    )
    guard = BatchGuard(tmp_path, GuardConfig(on_nan="skip"), lambda _: [])
    guard.attach(megatron, lambda: 7)
    for _ in answers[:-1]:
        megatron.prepare_grads()
    with pytest.raises(UserError, match=f"{MOST_OVERFLOWS_IN_A_ROW + 1} steps in a row overflow fp16"):
        megatron.prepare_grads()
