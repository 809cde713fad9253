"""`phimr bridge`: a stage's configuration and data for another trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

# First, because it prepares a machine without CUDA for what the others import.
from phimr_nemo.align import lifecycle  # noqa: F401
from phimr_nemo.bridges.export import Export, write_export
from phimr_nemo.bridges.nemo_rl import export_nemo_rl
from phimr_nemo.bridges.nemotron import export_nemotron
from phimr_nemo.bridges.trl.export import export_trl
from phimr_nemo.config import STAGES, load_config

Target = Literal["trl", "nemo-rl", "nemotron"]
Stage = Literal["sft", "dpo", "grpo"]

TARGETS: Final[dict[Target, Callable[[Any], Export]]] = {
    "trl": export_trl,
    "nemo-rl": export_nemo_rl,
    "nemotron": export_nemotron,
}


def run_bridge(target: Target, stage: Stage, config: Path, output: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Write a stage of the recipe in another trainer's form.

    Args:
        target: the other trainer.
        stage: of the recipe.
        config: the stage's YAML file.
        output: a directory that does not exist or is empty.
        overrides: `key=value` of the stage.

    Returns:
        The target with its version, and how many samples and steps.

    Raises:
        UserError: the configuration or data is not usable, or a setting has no counterpart there.
    """
    resolved = load_config(STAGES[stage], config, overrides)
    return write_export(output, stage, resolved, TARGETS[target](resolved))
