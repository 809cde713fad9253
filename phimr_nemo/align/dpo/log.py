"""One line of DPO's metrics per optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from phimr_nemo.align.trainer_log import TrainerLog
from phimr_nemo.training.metrics import metrics_of
from phimr_nemo.training.optimizer import TrainerOptimizer
from phimr_nemo.training.tracking import RunLog

COLLAPSE_SHIFT: Final = -0.1
"""Nats a token: the chosen responses' tokens have lost a tenth of their probability, geometric mean; over a response
of a hundred tokens that is a factor of e^10."""
_LOGGER: Final = logging.getLogger(__name__)


class DPOLog(TrainerLog):
    """One line per optimizer step, and a warning when the policy collapses.

    The rule: in some step the chosen responses' log-probabilities are, on the mean over its pairs, more than
    ``-COLLAPSE_SHIFT`` nats a token below the reference's. The margin may still grow then, because the rejected ones
    fall faster, while probability goes to texts that nobody has chosen (likelihood displacement, arXiv 2410.08847).

    Attributes:
        collapsed_at: the first such step, or None.
    """

    def __init__(
        self,
        log: RunLog | None,
        optimizer: TrainerOptimizer,
        every: int,
        speed: Callable[[float], Mapping[str, float]],
    ) -> None:
        super().__init__(log, optimizer, every, speed)
        self.collapsed_at: int | None = None

    def log_metrics(self, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        """Write the step's line; the trainer counts steps from 0."""
        if prefix != "train/":
            return
        row = {name: float(metrics[name]) for name in metrics_of("dpo") if name in metrics}
        self._write(step + 1, row | {"grad_norm": self._optimizer.grad_norm}, row["step_time"])
        if self.collapsed_at is None and row["chosen_shift"] < COLLAPSE_SHIFT:
            self.collapsed_at = step + 1
            if self._log is not None:
                _LOGGER.warning(
                    "collapse at step %d: the chosen responses are %.3f nats a token below the reference (warning "
                    "below %.1f); lower optim.lr, raise beta, or hold them up with loss.kind=rpo loss.nll_weight=1",
                    *(step + 1, -row["chosen_shift"], COLLAPSE_SHIFT),
                )
