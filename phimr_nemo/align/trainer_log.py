"""From what NeMo-Aligner's trainers log to one line of metrics per step: what both stages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from phimr_nemo.training.optimizer import TrainerOptimizer
from phimr_nemo.training.tracking import RunLog


class TrainerLog:
    """The part of a Lightning logger that the trainers call. A step is written as the number of steps done.

    Args:
        log: where lines go; None on other processes than 0.
        optimizer: knows the gradient norm.
        every: steps between two lines.
        speed: seconds since its last call -> throughput and memory (collective).
    """

    def __init__(
        self,
        log: RunLog | None,
        optimizer: TrainerOptimizer,
        every: int,
        speed: Callable[[float], Mapping[str, float]],
    ) -> None:
        self._log, self._optimizer, self._every, self._speed = log, optimizer, every, speed
        self._seconds = 0.0

    def _write(self, step: int, row: Mapping[str, float], seconds: float) -> None:
        """Write a step's line when it is time (collective); `seconds` were spent on forward, backward and update."""
        self._seconds += seconds
        if step % self._every:
            return
        speed, self._seconds = self._speed(self._seconds), 0.0
        if self._log is not None:
            self._log.write(step, {**row, **speed})

    def log_table(self, *_: Any, **__: Any) -> None:
        """Nothing: sample responses are not kept."""

    def finalize(self) -> None:
        """Nothing: the log's context closes it."""
