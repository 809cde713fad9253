"""Megatron's optimizer and schedule, and their adapters to what NeMo-Aligner's trainers call."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from phimr_nemo.config import OptimConfig
from phimr_nemo.errors import UserError


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
        """Clip, update, and remember the norm before clipping.

        Raises:
            UserError: the norm is not finite. The weights are lost then; the newest checkpoint is not.
        """
        _updated, norm, _zeros = self.megatron.step()
        check_finite("the gradient norm", float(norm))
        self.grad_norm = float(norm)


class TrainerScheduler:
    """Megatron's learning-rate schedule behind `step()`, counted in optimizer steps."""

    def __init__(self, megatron: OptimizerParamScheduler) -> None:
        self.megatron = megatron

    def step(self) -> None:
        """Go on by one optimizer step."""
        self.megatron.step(increment=1)


def build_optimizer(
    config: OptimConfig, models: list[nn.Module], *, steps: int, dtype: torch.dtype
) -> tuple[TrainerOptimizer, TrainerScheduler]:
    """AdamW over the models' parameters and a schedule (:func:`build_schedule`) for `steps` optimizer steps.

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
    return TrainerOptimizer(optimizer), TrainerScheduler(build_schedule(config, optimizer, steps))


def build_schedule(config: OptimConfig, optimizer: Any, steps: int) -> OptimizerParamScheduler:
    """The learning rate of each optimizer step, set in the optimizer's parameter groups.

    In the warm-up of w = warmup_fraction * steps steps, step k (from 0) has the rate lr (k + 1) / w, so that no step
    is spent at a rate of 0; then it falls to `min_lr`, which step `steps` would have.

    Args:
        config: rates and form of the schedule.
        optimizer: anything with `param_groups`.
        steps: optimizer steps of the whole run.
    """
    warmup = round(config.warmup_fraction * steps)
    return OptimizerParamScheduler(
        optimizer,
        # Megatron's line from init_lr at step 0 to lr at step warmup - 1 is then lr (k + 1) / warmup.
        init_lr=config.lr / max(warmup, 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(warmup - 1, 0),
        lr_decay_steps=steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def check_finite(name: str, value: float) -> None:
    """Stop a run that has diverged.

    Raises:
        UserError: the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise UserError(
            f"{name} is {value}",
            rule="training goes on only with finite numbers",
            remedy="lower optim.lr or optim.clip_grad; the newest checkpoint is from before this step",
        )
