"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of config values, NeMo-style.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; default conf/<stage>/paper.yaml.")]
