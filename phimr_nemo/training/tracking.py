"""Where a run's metrics go: metrics.jsonl, TensorBoard, and Weights & Biases for those who want it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phimr_nemo.config import TrackingConfig, WandbConfig
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id
from phimr_nemo.store.runs import MetricsWriter


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

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table; all rows have the keys of the first."""
        import wandb

        columns: list[Any] = list(rows[0]) if rows else []
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Finish sending."""
        self._run.finish()


class RunLog:
    """Named scalars of steps, to every place that the configuration names. Process 0 has one.

    Args:
        directory: the run directory.
        tracking: the places besides metrics.jsonl and TensorBoard.
        settings: the run's configuration, shown beside its curves.
        done: steps done; lines of later steps, of an interrupted run, are dropped.
    """

    def __init__(self, directory: Path, tracking: TrackingConfig, settings: Mapping[str, Any], *, done: int) -> None:
        wandb = tracking.wandb
        self._tracker = None if wandb is None else WandbTracker(wandb, directory, settings)
        self._writer = MetricsWriter(directory, from_step=done + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write named scalars of a step."""
        self._writer.write(step, metrics)
        if self._tracker is not None:
            self._tracker.write(step, metrics)

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table to W&B, where there is one; all rows have the keys of the first."""
        if self._tracker is not None:
            self._tracker.write_table(step, name, rows)

    def write_histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Add a distribution to TensorBoard."""
        self._writer.write_histogram(step, name, values)

    def close(self) -> None:
        """Flush and close everything."""
        self._writer.close()
        if self._tracker is not None:
            self._tracker.close()


@contextlib.contextmanager
def open_log(
    directory: Path, tracking: TrackingConfig, settings: Mapping[str, Any], *, done: int
) -> Iterator[RunLog | None]:
    """A :class:`RunLog` on process 0, None elsewhere."""
    if dist.get_rank() != 0:
        yield None
        return
    with contextlib.closing(RunLog(directory, tracking, settings, done=done)) as log:
        yield log
