"""Weights & Biases, for those who want it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phimr_nemo.config import WandbConfig
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id


class WandbTracker:
    """One W&B run for one run directory; a continued run continues it.

    Args:
        config: project, mode and name.
        directory: the run directory; offline data go to `wandb/` there.
        settings: the run's configuration, shown beside its curves.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, config: WandbConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "tracking.wandb is set, and the package wandb is not installed",
                rule="tracking.wandb needs it",
                remedy="pip install wandb, or leave tracking.wandb out",
            )
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=config.project,
            name=config.name or directory.name,
            # The same directory is the same run, so that a continued one adds to its curves.
            id=content_id("wandb", str(directory.resolve())),
            resume="allow",
            mode=config.mode,
            dir=str(directory),
            config=dict(settings),
            settings=wandb.Settings(console="off", disable_git=True),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send named scalars of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish sending."""
        self._run.finish()
