"""NeMo-Run recipes, one short file a stage. See recipes/README.md for the table of stages.

A recipe is a `run.Partial` of :func:`run_recipe`. Run its file (`python -m recipes.midtrain --config ... key=value`,
also under torchrun or sbatch), or give it to any NeMo-Run executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import nemo_run as run
import typer

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import exit_with_message
from phimr_nemo.jobs.launch import launch
from phimr_nemo.jobs.preflight import preflight


def run_recipe(stage: str, config: str, overrides: list[str]) -> None:
    """Run a stage: the function behind every recipe.

    Args:
        stage: a key of :data:`phimr_nemo.config.STAGES`.
        config: YAML file.
        overrides: `key.sub=value` items.

    Raises:
        UserError, Preempted: see :func:`phimr_nemo.jobs.launch.launch`.
    """
    resolved: Any = load_config(STAGES[stage], Path(config), overrides)
    preflight(stage, resolved)
    launch(stage, resolved)


def stage_recipe(stage: str, config: str, overrides: Sequence[str]) -> run.Partial:
    """The recipe of a stage, for any NeMo-Run executor."""
    return run.Partial(run_recipe, stage=stage, config=config, overrides=list(overrides))


def main(recipe: Callable[[str, Sequence[str]], run.Partial], default: str) -> None:
    """Run a recipe's file: `--config FILE key=value ...`, in this process or as one rank of a torchrun.

    Args:
        recipe: makes the recipe from a config file and overrides.
        default: the config file when none is given.
    """

    def command(
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
        config: Annotated[str, typer.Option("--config")] = default,
    ) -> None:
        run.run(recipe(config, overrides or []), direct=True)

    command.__doc__ = recipe.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    with exit_with_message():
        app()
