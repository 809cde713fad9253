"""What is measured between two steps of an alignment stage, once each, in a run that continues as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.tracking import RunLog


@dataclass(frozen=True)
class Measure:
    """One measurement.

    Attributes:
        every: steps between two of it.
        name: the metric by which metrics.jsonl shows that a step was measured.
        take: a step -> its metrics (collective; those of process 0 count).
    """

    every: int
    name: str
    take: Callable[[int], Mapping[str, float]]


class Measuring:
    """Measures the weights that a step left.

    A run that was stopped after a step measures it when it continues, so nothing is missing and the grace time is for
    the checkpoint.

    Args:
        measures: what is measured.
        directory: the run's; its metrics show what was measured before. The log is open already.
        log: where the metrics go; None on other processes than 0.
        last: the run's last step, which is measured as well.
    """

    def __init__(self, measures: Sequence[Measure], directory: Path, log: RunLog | None, *, last: int) -> None:
        self._measures, self._log, self._last = measures, log, last
        box: list[Any] = [[]]
        if dist.get_rank() == 0:
            rows = list(read_metrics(directory))
            box = [[(one.name, row["step"]) for one in measures for row in rows if one.name in row]]
        dist.broadcast_object_list(box)
        self._done: set[tuple[str, int]] = {(name, step) for name, step in box[0]}

    def after(self, step: int) -> None:
        """Measure what is due after a step and was not measured yet (collective)."""
        for measure in self._measures:
            is_due = step > 0 and (step % measure.every == 0 or step == self._last)
            if is_due and (measure.name, step) not in self._done:
                row = measure.take(step)
                self._done.add((measure.name, step))
                if self._log is not None:
                    self._log.write(step, row)
