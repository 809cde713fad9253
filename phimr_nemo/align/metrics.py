"""From what NeMo-Aligner's trainers log to one line of metrics per step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from phimr_nemo.align.optimizer import TrainerOptimizer
from phimr_nemo.runs import MetricsWriter

DPO_NAMES: Final = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logprob",
    "rejected_logprob",
    "lr",
    "step_time",
)
_NOT_UPDATE_NAMES: Final = frozenset({"optim_step"})
_NOT_ROLLOUT_NAMES: Final = frozenset({"rollout_size", "epoch"})
_SECONDS: Final = {
    "sample": "sample_seconds",
    "reward": "reward_seconds",
    "logprobs": "logprob_seconds",
    "train_time": "train_seconds",
}


@contextlib.contextmanager
def metrics_writer(directory: Path, done_steps: int) -> Iterator[MetricsWriter | None]:
    """A writer on process 0, None elsewhere; lines of steps after the `done_steps` first are dropped."""
    if dist.get_rank() != 0:
        yield None
        return
    with MetricsWriter(directory, from_step=done_steps + 1) as writer:
        yield writer


class _Log:
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


class DPOLog(_Log):
    """One line per optimizer step."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        """Write the step's line; the trainer counts steps from 0."""
        if prefix == "train/":
            row = {name: float(metrics[name]) for name in DPO_NAMES}
            self._write(step + 1, row | {"grad_norm": self._optimizer.grad_norm})


class GRPOLog(_Log):
    """One line per round, from what the trainer logs in its course: rollouts, updates, timers."""

    def __init__(self, writer: MetricsWriter | None, optimizer: TrainerOptimizer, every: int) -> None:
        super().__init__(writer, optimizer, every)
        self._rollouts: dict[str, float] = {}
        self._updates: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        """Collect; the timers come last and end the round's line. Updates of a round are averaged."""
        if prefix == "train_rollouts/":
            self._rollouts = {name: float(value) for name, value in metrics.items() if name not in _NOT_ROLLOUT_NAMES}
        elif prefix == "train_optim/":
            update = {name: float(value) for name, value in metrics.items() if name not in _NOT_UPDATE_NAMES}
            self._updates.append(update | {"grad_norm": self._optimizer.grad_norm})
        elif prefix == "timers/":
            self._write(step + 1, {**self._rollouts, **_mean(self._updates), **_seconds(metrics)})
            self._updates = []


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else {})}


def _seconds(timers: Mapping[str, Any]) -> dict[str, float]:
    seconds = {ours: float(timers[theirs]) for theirs, ours in _SECONDS.items() if theirs in timers}
    return seconds | {"step_time": float(timers["rollout_time"]) + float(timers["train_time"])}
