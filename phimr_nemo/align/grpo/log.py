"""One line of metrics per round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.align.grpo.collapse import CollapseWatch
from phimr_nemo.align.trainer_log import TrainerLog
from phimr_nemo.config.evaluation import MonitorConfig
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.metrics import PASS_RATE_MIDDLES, PASS_RATE_NAMES
from phimr_nemo.training.optimizer import TrainerOptimizer
from phimr_nemo.training.plots import plot_rounds
from phimr_nemo.training.tracking import RunLog

_LOGGER: Final = logging.getLogger(__name__)
_NOT_UPDATE_NAMES: Final = frozenset({"optim_step"})
_NOT_ROLLOUT_NAMES: Final = frozenset({"rollout_size", "epoch"})
_SECONDS: Final = {
    "sync": "sync_seconds",
    "sample": "sample_seconds",
    "reward": "reward_seconds",
    "refill": "refill_seconds",
    "logprobs": "logprob_seconds",
    "train_time": "train_seconds",
}


class RoundsLog(TrainerLog):
    """One line per round, from what the trainer logs in its course: rollouts, updates, timers.

    On process 0 it also watches for a collapse, warns once of each kind, and draws the stage's picture now and then.

    Args:
        log, optimizer, every, speed: as for :class:`TrainerLog`.
        monitor: what is watched.
        directory: the run's; its metrics so far are those of the steps that the run continues from.

    Attributes:
        watch: what has been found.
        idle_rounds: rounds in which no response had a gradient.
    """

    def __init__(
        self,
        log: RunLog | None,
        optimizer: TrainerOptimizer,
        every: int,
        speed: Callable[[float], Mapping[str, float]],
        *,
        monitor: MonitorConfig,
        directory: Path,
    ) -> None:
        super().__init__(log, optimizer, every, speed)
        self._rollouts: dict[str, float] = {}
        self._updates: list[dict[str, float]] = []
        self._monitor, self._directory = monitor, directory
        past = list(read_metrics(directory)) if log is not None else []
        self.watch = CollapseWatch(monitor, past)
        self.idle_rounds = sum(row.get("with_gradient") == 0.0 for row in past)

    def log_metrics(self, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        """Collect; the timers come last and end the round's line. Updates of a round are averaged."""
        if prefix == "train_rollouts/":
            self._rollouts = {name: float(value) for name, value in metrics.items() if name not in _NOT_ROLLOUT_NAMES}
        elif prefix == "train_optim/":
            update = {name: float(value) for name, value in metrics.items() if name not in _NOT_UPDATE_NAMES}
            self._updates.append(update | {"grad_norm": self._optimizer.grad_norm})
        elif prefix == "timers/":
            self._end_round(step + 1, {**self._rollouts, **_mean(self._updates), **_seconds(metrics)})
            self._updates = []

    def _end_round(self, step: int, row: Mapping[str, float]) -> None:
        self.idle_rounds += row.get("with_gradient") == 0.0
        self._write(step, row, row["train_seconds"])
        if self._log is None:
            return
        if set(PASS_RATE_NAMES) <= row.keys():
            counts = zip(PASS_RATE_MIDDLES, PASS_RATE_NAMES, strict=True)
            self._log.write_histogram(
                step, "group_pass_rate", [share for share, name in counts for _ in range(int(row[name]))]
            )
        for message in self.watch.observe(step, row):
            _LOGGER.warning(message)
        if step % self._monitor.dashboard_every == 0:
            self.draw()

    def warn_of_idleness(self, rounds: int) -> None:
        """Say on process 0 that a run has learnt nothing, when it is over.

        Args:
            rounds: of the run.
        """
        if self._log is not None and rounds and self.idle_rounds >= rounds:
            _LOGGER.warning(
                "no response of %d rounds had a gradient: the weights are those of the base. All rewards of a group "
                "were equal, or every response was left out; look at pass_rate, truncated, ungraded and kept among "
                "the metrics, then bring prompts that are sometimes solved or raise max_new_tokens",
                rounds,
            )

    def draw(self) -> None:
        """Write the dashboard, on process 0."""
        if self._log is not None:
            self._plot(self._directory, self.watch.found)

    def _plot(self, directory: Path, collapses: Mapping[str, int]) -> None:
        raise NotImplementedError


class GRPOLog(RoundsLog):
    """The log whose picture is `grpo.png`."""

    def _plot(self, directory: Path, collapses: Mapping[str, int]) -> None:
        plot_rounds(directory, collapses, "grpo")


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else {})}


def _seconds(timers: Mapping[str, Any]) -> dict[str, float]:
    seconds = {ours: float(timers[theirs]) for theirs, ours in _SECONDS.items() if theirs in timers}
    return seconds | {"step_time": float(timers["rollout_time"]) + float(timers["train_time"])}
