"""The learning rate as NeMo 2.0 and Lightning want it: the adapter of :mod:`phimr_nemo.training.schedule`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo.lightning.pytorch.optim import LRSchedulerModule
from torch.optim.lr_scheduler import LRScheduler

from phimr_nemo.config import OptimConfig
from phimr_nemo.training.schedule import exempt_from_decay, learning_rate


class LightningScheduler(LRScheduler):
    """:func:`learning_rate` as torch's scheduler, which Lightning steps after each optimizer step.

    Args:
        optimizer: NeMo's; its rate (`initial_lr` of the groups) replaces `optim.lr`.
        optim: form and rates.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, optimizer: Any, optim: OptimConfig, steps: int) -> None:
        self._optim, self._steps = optim, steps
        exempt_from_decay(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Return each group's rate for the step to come."""
        return [learning_rate(self.last_epoch, self._steps, replace(self._optim, lr=base)) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer steps done, as plain data."""
        return {"step": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after them."""
        self.last_epoch, self.base_lrs = int(state_dict["step"]), list(state_dict["base_lrs"])
        self._last_lr = self.get_lr()


class Schedule(LRSchedulerModule):
    """:class:`LightningScheduler` as the part of a NeMo 2.0 recipe that makes it.

    Args:
        optim: form and rates.
        max_steps: optimizer steps of the whole run.
    """

    def __init__(self, optim: OptimConfig, max_steps: int) -> None:
        super().__init__()
        self.optim, self.max_steps = optim, max_steps

    def scheduler(self, model: Any, optimizers: Any) -> dict[str, Any]:  # noqa: ARG002
        """Make it (NeMo's hook)."""
        made = LightningScheduler(optimizers, self.optim, self.max_steps)
        return {"optimizer": optimizers, "lr_scheduler": {"scheduler": made, "interval": "step"}}
