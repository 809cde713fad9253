"""The recipe in its smallest form: a model of 40 K parameters, a few steps a stage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phimr_nemo.config import STAGES, QuickstartConfig, load_config
from phimr_nemo.jobs.launch import launch
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.jobs.quickstart import ROWS, seed_steps
from phimr_nemo.jobs.steps.step import Step

ORIGINAL_LENGTH = 64
"""Of the model: shorter sequences are in LongRoPE's short regime when they are a run's longest."""

ROW = 256
"""Tokens of a packed row."""

BASE = (
    *("hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4"),
    *("num_key_value_heads=2", f"original_max_position_embeddings={ORIGINAL_LENGTH}", "max_position_embeddings=2048"),
)
MIDTRAIN_STEPS, SFT_STEPS, DPO_STEPS, GRPO_STEPS = 4, 3, 2, 2
MIDTRAIN = (
    *(f"sequence_length={ROW}", f"max_steps={MIDTRAIN_STEPS}", "global_batch=2", "micro_batch=1"),
    *("validation_rows=2", "validate_every=2", "checkpoint.every=1", "run.log_every=1"),
)
SFT = (
    *(f"max_steps={SFT_STEPS}", "global_batch=4", "micro_batch=2", "validation_rows=4", "validate_every=3"),
    *(f"checkpoint.every={SFT_STEPS}", "run.log_every=1"),
)
DPO = (f"max_steps={DPO_STEPS}", "global_batch=4", "micro_batch=2", "checkpoint.every=1")
GRPO = (
    *(f"steps={GRPO_STEPS}", "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "micro_batch=8"),
    *("checkpoint.every=1", "run.log_every=1"),
)
EVALUATE = ("max_new_tokens=12", "workers=1")
PROBLEMS, OWN_PROBLEMS, HELD_OUT, SAMPLES = 60, 16, 6, 2
OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "base": BASE,
    "rows": (f"sequence_length={ROW}",),
    "midtrain": MIDTRAIN,
    "sft": SFT,
    "sft-without-midtrain": SFT,
    "own-rollouts": ("teacher.kind=programmatic", "teacher.mistake_rate=0.5", "rollouts_per_problem=4"),
    "dpo": DPO,
    "grpo": GRPO,
    **{f"evaluate-{name}": EVALUATE for name, _ in ROWS},
}
"""Of the quickstart's steps, by name. So small a model is never right, so its own rollouts are a program's."""


def quickstart(root: Path, *overrides: str) -> list[Step]:
    """The quickstart's steps in this form, in `root`; `overrides` are the quickstart's own."""
    sizes = [f"train_problems={PROBLEMS}", f"rl_problems={OWN_PROBLEMS}"]
    sizes += [f"heldout_problems={HELD_OUT}", f"evaluation_samples={SAMPLES}", *overrides]
    steps = seed_steps(load_config(QuickstartConfig, Path("conf/quickstart/tiny.yaml"), sizes), 0, root)
    steps = [
        replace(step, arguments=tuple(a for a in step.arguments if not a.startswith("teacher.path=")))
        for step in steps
    ]
    return with_overrides(steps, OVERRIDES)


def with_overrides(steps: list[Step], overrides: Mapping[str, tuple[str, ...]]) -> list[Step]:
    """Steps with further overrides, by the step's name."""
    return [replace(step, arguments=(*step.arguments, *overrides.get(step.name, ()))) for step in steps]


def run_again(steps: list[Step]) -> None:
    """The same commands once more, in this process: a finished step needs none of its own."""
    for step in steps:
        stage, config = resolved(step)
        preflight(stage, config)
        launch(stage, config)


def resolved(step: Step) -> tuple[str, Any]:
    """A step's stage and configuration."""
    stage, _, preset, *overrides = step.arguments
    return stage, load_config(STAGES[stage], Path(preset), overrides)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def times(directory: Path) -> dict[str, int]:
    """When each file below a directory was written."""
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
