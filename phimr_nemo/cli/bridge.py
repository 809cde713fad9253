"""`phimr bridge`: a stage of the recipe for another trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from phimr_nemo.cli.options import ConfigFile, Overrides
from phimr_nemo.text.printable import say


def bridge(
    target: Annotated[Literal["trl", "nemo-rl", "nemotron"], typer.Argument(help="The other trainer.")],
    stage: Annotated[Literal["sft", "dpo", "grpo"], typer.Argument(help="The stage of the recipe.")],
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
) -> None:
    """A stage's configuration and data for TRL, NeMo-RL or Nemotron, with a table of what becomes of each setting."""
    from phimr_nemo.jobs.launch import silence_import_notes

    silence_import_notes()
    from phimr_nemo.bridges.command import run_bridge

    path = config if config is not None else Path("conf") / stage / "paper.yaml"
    facts = run_bridge(target, stage, path, out, overrides or [])
    say("  ".join(f"{name}: {value}" for name, value in facts.items()))
