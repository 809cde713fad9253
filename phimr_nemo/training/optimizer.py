"""Megatron's optimizer with its learning rate, as NeMo-Aligner's trainers call them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import nn

from phimr_nemo.config import OptimConfig
from phimr_nemo.training.schedule import adam_settings, exempt_from_decay, keep_settings, learning_rate


class TrainerOptimizer:
    """Megatron's optimizer behind `step(closure=None)`; keeps the last step's gradient norm.

    Megatron clips by itself, so the trainers' own clipping stays off.
    """

    def __init__(self, megatron: Any) -> None:
        self.megatron = megatron
        self.grad_norm = 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups, which hold the learning rate."""
        groups: list[dict[str, Any]] = self.megatron.param_groups
        return groups

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self.megatron.zero_grad()

    def step(self, closure: None = None) -> None:  # noqa: ARG002  DPOTrainer passes closure=None
        """Clip, update, and remember the norm before clipping; the guard stands before the update."""
        _updated, norm, _zeros = self.megatron.step()
        self.grad_norm = float(norm)


class TrainerScheduler:
    """:func:`learning_rate` behind what NeMo-Aligner's trainers call: `step()` after each optimizer step.

    Args:
        optim: rates and form.
        optimizer: anything with `param_groups`; they get the rate of the step to come.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, optim: OptimConfig, optimizer: Any, steps: int) -> None:
        self._optim, self._optimizer, self._steps, self._step = optim, optimizer, steps, 0
        self._settings = adam_settings(optimizer.param_groups)
        exempt_from_decay(optimizer.param_groups)
        self._set()

    def step(self) -> None:
        """Go on by one optimizer step."""
        self._step += 1
        self._set()

    def _set(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, self._steps, self._optim)

    def state_dict(self) -> dict[str, int]:
        """Return the optimizer steps done."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after them, with this run's settings; the optimizer's state is loaded already."""
        keep_settings(self._optimizer.param_groups, self._settings)
        self._step = int(state["step"])
        self._set()


def build_optimizer(
    config: OptimConfig, models: list[nn.Module], *, steps: int, dtype: torch.dtype
) -> tuple[TrainerOptimizer, TrainerScheduler]:
    """Make AdamW over the models' parameters, and its schedule.

    Args:
        config: rates, betas, weight decay, clipping.
        models: model chunks inside Megatron's DistributedDataParallel.
        steps: optimizer steps of the whole run.
        dtype: of the parameters.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
        ),
        models,
    )
    # Its moments exist from the start: a run may be saved before its first update, and a checkpoint without them
    # could not be loaded.
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    return TrainerOptimizer(optimizer), TrainerScheduler(config, optimizer, steps)
