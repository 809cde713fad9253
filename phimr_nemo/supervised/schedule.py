"""The learning rate as NeMo 2.0 and Lightning want it: the adapter of :mod:`phimr_nemo.training.schedule`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo.lightning.pytorch.optim import LRSchedulerModule
from torch.optim.lr_scheduler import LRScheduler

from phimr_nemo.config import OptimConfig
from phimr_nemo.training.schedule import adam_settings, exempt_from_decay, keep_settings, learning_rate


class LightningScheduler(LRScheduler):
    """:func:`learning_rate` as torch's scheduler, which Lightning steps after each optimizer step.

    Args:
        optimizer: NeMo's; its rate (`initial_lr` of the groups) replaces `optim.lr`.
        optim: form and rates.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, optimizer: Any, optim: OptimConfig, steps: int) -> None:
        self._optim, self._steps = optim, steps
        self._settings = adam_settings(optimizer.param_groups)
        exempt_from_decay(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Return each group's rate for the step to come."""
        return [learning_rate(self.last_epoch, self._steps, replace(self._optim, lr=base)) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer steps done, as plain data."""
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after them, with this run's settings; the optimizer's state is loaded already."""
        self.last_epoch = int(state_dict["step"])
        self._last_lr = self.get_lr()
        keep_settings(self.optimizer.param_groups, self._settings)
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


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
