"""From what NeMo-Aligner's trainers log to one line of metrics per step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from phimr_nemo.align.collapse import CollapseWatch
from phimr_nemo.align.optimizer import TrainerOptimizer
from phimr_nemo.align.plots import plot_grpo
from phimr_nemo.align.rollouts import PASS_RATE_MIDDLES, PASS_RATE_NAMES
from phimr_nemo.config.alignment import MonitorConfig
from phimr_nemo.runs import MetricsWriter, read_metrics

DPO_NAMES: Final = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logprob",
    "rejected_logprob",
    "kl_to_reference",
    "chosen_shift",
    "length_difference",
    "length_margin_correlation",
    "nll",
    "lr",
    "step_time",
)
"""`nll` with the RPO loss only."""

COLLAPSE_SHIFT: Final = -0.1
"""Nats a token: the chosen responses' tokens have lost a tenth of their probability, geometric mean; over a response
of a hundred tokens that is a factor of e^10."""
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
    """One line per optimizer step, and a warning when the policy collapses.

    The rule: in some step the chosen responses' log-probabilities are, on the mean over its pairs, more than
    ``-COLLAPSE_SHIFT`` nats a token below the reference's. The margin may still grow then, because the rejected ones
    fall faster, while probability goes to texts that nobody has chosen (likelihood displacement, arXiv 2410.08847).

    Attributes:
        collapsed_at: the first such step, or None.
    """

    def __init__(self, writer: MetricsWriter | None, optimizer: TrainerOptimizer, every: int) -> None:
        super().__init__(writer, optimizer, every)
        self.collapsed_at: int | None = None

    def log_metrics(self, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        """Write the step's line; the trainer counts steps from 0."""
        if prefix != "train/":
            return
        row = {name: float(metrics[name]) for name in DPO_NAMES if name in metrics}
        self._write(step + 1, row | {"grad_norm": self._optimizer.grad_norm})
        if self.collapsed_at is None and row["chosen_shift"] < COLLAPSE_SHIFT:
            self.collapsed_at = step + 1
            if self._writer is not None:
                _LOGGER.warning(
                    "collapse at step %d: the chosen responses are %.3f nats a token below the reference (warning "
                    "below %.1f); lower optim.lr, raise beta, or hold them up with loss.kind=rpo loss.nll_weight=1",
                    *(step + 1, -row["chosen_shift"], COLLAPSE_SHIFT),
                )


class GRPOLog(_Log):
    """One line per round, from what the trainer logs in its course: rollouts, updates, timers.

    On process 0 it also watches for a collapse, warns once of each kind, and draws `grpo.png` now and then.

    Args:
        writer: of the run's metrics; None on other processes.
        optimizer: knows the gradient norm.
        every: steps between two lines.
        monitor: what is watched.
        directory: the run's; its metrics so far are those of the steps that the run continues from.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        optimizer: TrainerOptimizer,
        every: int,
        monitor: MonitorConfig,
        directory: Path,
    ) -> None:
        super().__init__(writer, optimizer, every)
        self._rollouts: dict[str, float] = {}
        self._updates: list[dict[str, float]] = []
        self._monitor, self._directory = monitor, directory
        self.watch = CollapseWatch(monitor, read_metrics(directory) if writer is not None else ())

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
        self._write(step, row)
        if self._writer is None:
            return
        counts = zip(PASS_RATE_MIDDLES, PASS_RATE_NAMES, strict=True)
        self._writer.write_histogram(
            step, "group_pass_rate", [share for share, name in counts for _ in range(int(row[name]))]
        )
        for message in self.watch.observe(step, row):
            _LOGGER.warning(message)
        if step % self._monitor.dashboard_every == 0:
            self.draw()

    def draw(self) -> None:
        """Write the dashboard, on process 0."""
        if self._writer is not None:
            plot_grpo(self._directory, self.watch.found)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else {})}


def _seconds(timers: Mapping[str, Any]) -> dict[str, float]:
    seconds = {ours: float(timers[theirs]) for theirs, ours in _SECONDS.items() if theirs in timers}
    return seconds | {"step_time": float(timers["rollout_time"]) + float(timers["train_time"])}
