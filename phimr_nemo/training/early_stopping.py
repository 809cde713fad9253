"""What a run is judged by: the history of one metric, its best value, and whether training has converged.

The paper's mid-training goes on "until validation saturates" (section 3.1). The history is read from the run's own
metrics, so a run that continues has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist

from phimr_nemo.config import EarlyStoppingConfig
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.metrics import Metric


@dataclass(frozen=True)
class Measured:
    """The metric's value for the weights of a step."""

    step: int
    value: float


def measurements(
    rows: Iterable[Mapping[str, Any]], metric: Metric, *, every: int, last: int, done: int
) -> list[Measured]:
    """Return what a run has measured so far, oldest first.

    A metric that is measured after its step speaks for that step. Any other is noisy, and a step's value tells of the
    weights before it; its mean over `every` steps speaks for the last of them.

    Args:
        rows: of metrics.jsonl.
        metric: which one.
        every: steps between two measurements.
        last: the run's last step, which ends a measurement as well.
        done: steps done; later rows are left out, and a measurement that is not complete has no value yet.
    """
    found = [(int(row["step"]), float(row[metric.name])) for row in rows if metric.name in row]
    found = [(step, value) for step, value in found if step <= done and math.isfinite(value)]
    if metric.after:
        return [Measured(step, value) for step, value in found]
    parts: dict[int, list[float]] = {}
    for step, value in found:
        parts.setdefault(min(-(-step // every) * every, last), []).append(value)
    return [Measured(step, fmean(values)) for step, values in sorted(parts.items()) if step <= done]


def is_better(value: float, than: float, metric: Metric) -> bool:
    """Return whether a value is better than another one, in the metric's direction."""
    return value > than if metric.better == "higher" else value < than


def best_of(history: Sequence[Measured], metric: Metric) -> Measured | None:
    """Return the first of the best measurements; None where there is none."""
    best: Measured | None = None
    for measured in history:
        if best is None or is_better(measured.value, best.value, metric):
            best = measured
    return best


def has_converged(values: Sequence[float], patience: int, min_delta: float, metric: Metric) -> bool:
    """Return whether the last `patience` values brought no progress.

    Progress is a value better by more than `min_delta` than the value that was progress before it; the first one is.

    Args:
        values: of the metric, oldest first.
        patience: at least 1.
        min_delta: not negative, in the metric's unit.
        metric: its direction.
    """
    best, without_progress = math.nan, 0
    for value in values:
        bar = best + min_delta if metric.better == "higher" else best - min_delta
        if math.isnan(best) or is_better(value, bar, metric):
            best, without_progress = value, 0
        else:
            without_progress += 1
    return without_progress >= patience


class Judge:
    """The measure of one run; all processes get one answer.

    Args:
        directory: the run directory.
        metric: what it goes by.
        early_stopping: the rule; None = never.
        every: steps between two measurements.
        last: the run's last step.
    """

    def __init__(
        self, directory: Path, metric: Metric, early_stopping: EarlyStoppingConfig | None, *, every: int, last: int
    ) -> None:
        self.metric, self._rule = metric, early_stopping
        self._directory, self._every, self._last = directory, every, last

    def history(self, done: int) -> list[Measured]:
        """Return the measurements of the first `done` steps (collective: process 0 reads)."""
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            rows = read_metrics(self._directory)
            box = [measurements(rows, self.metric, every=self._every, last=self._last, done=done)]
        dist.broadcast_object_list(box)
        found: list[Measured] = box[0]
        return found

    def is_due(self, done: int) -> bool:
        """Return whether a measurement may have been made after `done` steps."""
        return done % self._every == 0 or done == self._last

    def has_converged(self, done: int) -> bool:
        """Return whether training ends after `done` steps (collective)."""
        if self._rule is None or not self.is_due(done):
            return False
        values = [measured.value for measured in self.history(done)]
        return has_converged(values, self._rule.patience, self._rule.min_delta, self.metric)
