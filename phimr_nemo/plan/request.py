"""`phimr plan KEY=VALUE...`: which keys are the planner's, which the stage's, and which of those fix the layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, GenerationPlanConfig, TrainingPlanConfig, find_config, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.layout import check_length
from phimr_nemo.plan.workload import StageConfig

TRAINING_STAGES: Final = ("midtrain", "sft", "dpo", "grpo", "distill")
GENERATION_STAGE: Final = "generate"
LAYOUT_KEYS: Final = frozenset(
    {
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.context",
        "parallel.data",
        "parallel.sequence",
        "parallel.virtual",
        "micro_batch",
        "model.recompute",
    }
)


@dataclass(frozen=True)
class TrainingRequest:
    """A training stage to plan.

    Attributes:
        pinned: the layout's keys that are not to be varied.
    """

    plan: TrainingPlanConfig
    config: StageConfig
    arch: Architecture
    pinned: frozenset[str]


def read_request(arguments: Sequence[str], stage_config: Path | None) -> TrainingRequest | GenerationPlanConfig:
    """Sort `key=value` arguments and load both configurations.

    Args:
        arguments: `stage=...` is one of them.
        stage_config: a YAML file of the stage whose own layout is planned; None = the paper's, any layout.

    Raises:
        UserError: no or an unknown stage, an unknown key, a wrong value, no such model, sequences beyond its context.
    """
    stage = _stage(arguments)
    path = Path("conf") / "plan" / f"{stage}.yaml"
    if stage == GENERATION_STAGE:
        return load_config(GenerationPlanConfig, path, arguments)
    names = {item.name for item in dataclasses.fields(TrainingPlanConfig)}
    own = [item for item in arguments if _key(item) in names]
    others = [item for item in arguments if _key(item) not in names]
    source = stage_config if stage_config is not None else Path("conf") / stage / "paper.yaml"
    # The starting weights are not read: the model's shape comes from `model`.
    pinned = LAYOUT_KEYS & {_key(item) for item in others}
    layout = [] if stage_config is not None else _neutral_layout(pinned)
    config: Any = load_config(STAGES[stage], source, ["base=planned", *layout, *others])
    if stage_config is not None:
        pinned = LAYOUT_KEYS
        if not any(_key(item) == "gpus" for item in own):
            own.append(f"gpus={config.parallel.world_size}")
    plan = load_config(TrainingPlanConfig, path, own)
    arch = find_model(plan.model)
    check_length(arch, config.sequence_length)
    return TrainingRequest(plan, config, arch, pinned)


def _neutral_layout(pinned: frozenset[str]) -> list[str]:
    """Overrides by which the preset's own layout, which is not planned, has no part in what is refused."""
    sizes = dict.fromkeys(("tensor", "pipeline", "context", "data", "virtual"), 1)
    # These two want another process beside the first.
    sizes["tensor"] += "parallel.sequence" in pinned
    sizes["pipeline"] += "parallel.virtual" in pinned
    return [*(f"parallel.{name}={size}" for name, size in sizes.items()), "parallel.sequence=false", "micro_batch=1"]


def find_model(name: str) -> Architecture:
    """The architecture of a preset in conf/model, or of a Hugging Face directory.

    Raises:
        UserError: neither is there, or it is not of this family.
    """
    import yaml

    if Path(name).is_dir():
        return Architecture.from_directory(Path(name))
    preset = find_config(Path("conf") / "model" / f"{name}.yaml")
    return Architecture.from_preset(yaml.safe_load(preset.read_text(encoding="utf-8")))


def _key(argument: str) -> str:
    return argument.partition("=")[0]


def _stage(arguments: Sequence[str]) -> str:
    known = (*TRAINING_STAGES, GENERATION_STAGE)
    chosen = [item.partition("=")[2] for item in arguments if _key(item) == "stage"]
    if not chosen or chosen[-1] not in known:
        raise UserError(
            f"stage={chosen[-1]}" if chosen else "no stage is given",
            rule=f"stage=NAME names one of {', '.join(known)}",
            remedy="for example: phimr plan stage=midtrain gpus=128 gpu=h100-80g",
        )
    return chosen[-1]
