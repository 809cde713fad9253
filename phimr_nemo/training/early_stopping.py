"""Early stopping: mid-training ends "until validation saturates" (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from phimr_nemo.config import EarlyStoppingConfig
from phimr_nemo.training import platform


def is_saturated(losses: Sequence[float], patience: int, min_delta: float) -> bool:
    """Whether the last `patience` validation losses brought no progress.

    Progress is a loss lower by more than `min_delta` than the loss that was progress before it; the first loss is.

    Args:
        losses: validation losses (nats a token), oldest first.
        patience: at least 1.
        min_delta: not negative.
    """
    best, without_progress = float("inf"), 0
    for loss in losses:
        if loss < best - min_delta:
            best, without_progress = loss, 0
        else:
            without_progress += 1
    return without_progress >= patience


class StopWhenSaturated(pl.Callback):
    """Ends training by :func:`is_saturated`; its history is saved with every checkpoint."""

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config = config
        self._losses: dict[int, float] = {}

    @property
    def is_saturated(self) -> bool:
        """Whether training ended, or ends now, for this reason."""
        losses = [loss for _, loss in sorted(self._losses.items())]
        return is_saturated(losses, self.config.patience, self.config.min_delta)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """A run that had ended, and died before its export, does not train on."""
        trainer.should_stop = trainer.should_stop or self.is_saturated

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Look at the newest validation loss (collective)."""
        if trainer.state.fn != "fit":
            return
        loss = torch.as_tensor(trainer.callback_metrics["val_loss"]).to(platform.device(), torch.float64)
        dist.broadcast(loss, 0)
        # By step: a resumed run measures again at the step of its checkpoint.
        self._losses[trainer.global_step] = float(loss)
        if self.is_saturated:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Validation losses by step."""
        return {"losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self._losses = {int(step): float(loss) for step, loss in state_dict["losses"].items()}
