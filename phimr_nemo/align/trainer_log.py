"""From what NeMo-Aligner's trainers log to one line of metrics per step: what both stages share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phimr_nemo.store.runs import MetricsWriter
from phimr_nemo.training.optimizer import TrainerOptimizer


@contextlib.contextmanager
def metrics_writer(directory: Path, done_steps: int) -> Iterator[MetricsWriter | None]:
    """A writer on process 0, None elsewhere; lines of steps after the `done_steps` first are dropped."""
    if dist.get_rank() != 0:
        yield None
        return
    with MetricsWriter(directory, from_step=done_steps + 1) as writer:
        yield writer


class TrainerLog:
    """The part of a Lightning logger that the trainers call. A step is written as the number of steps done."""

    def __init__(self, writer: MetricsWriter | None, optimizer: TrainerOptimizer, every: int) -> None:
        self._writer, self._optimizer, self._every = writer, optimizer, every

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        if self._writer is not None and step % self._every == 0:
            self._writer.write(step, row)

    def log_table(self, *_: Any, **__: Any) -> None:
        """Nothing: sample responses are not kept."""

    def finalize(self) -> None:
        """Nothing: the writer's context closes it."""
