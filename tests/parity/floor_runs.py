"""Short runs of the four training stages: their inputs, settings and outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import align_inputs
import supervised_inputs
import torch
from distributed import run_distributed
from floor_worker import Outcome, run
from safetensors.torch import load_file

from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.metrics import Stage

STAGES: tuple[Stage, ...] = ("midtrain", "sft", "dpo", "grpo")
STEPS = 4
LR, MIN_LR = 1e-3, 1e-4


def make_inputs(root: Path) -> Path:
    """The inputs of all four stages, in `root`."""
    supervised_inputs.make_inputs(root / "supervised")
    align_inputs.make_inputs(root / "align")
    return root


def settings(stage: Stage, inputs: Path, output: Path, *extra: str) -> list[str]:
    """A run of STEPS steps with a checkpoint after each."""
    shared = [
        *(f"run.output={output}", "checkpoint.every=1", "checkpoint.keep=3", "run.log_every=1"),
        *("optim.warmup_fraction=0.5", f"optim.lr={LR}", f"optim.min_lr={MIN_LR}", "optim.schedule=linear"),
    ]
    if stage in ("midtrain", "sft"):
        return [
            *supervised_inputs.overrides(stage, inputs / "supervised", output),
            f"max_steps={STEPS}",
            *shared,
            *extra,
        ]
    case = align_inputs.make_case(inputs / "align", "unused", stage)
    rounds = ["inner_batches=1", f"steps={STEPS}", "kl=0", "temperature.end=1.0"] if stage == "grpo" else []
    return [*case.overrides, *rounds, *shared, *extra]


def go(
    stage: Stage,
    overrides: Sequence[str],
    *,
    stop_after: int | None = None,
    poison: int | None = None,
    preset: Path | None = None,
) -> Outcome:
    """:func:`floor_worker.run` in a process of its own."""
    [outcome] = run_distributed(run, 1, stage, list(overrides), stop_after, poison, preset)
    found: Outcome = outcome
    return found


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "hf" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logged(output: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(output) if name in row]
