"""The learning rate of every optimizer step of a stage, taken from the scheduler that the stage itself uses."""

from __future__ import annotations

from typing import Any

import torch

from phimr_nemo.config import OptimConfig
from phimr_nemo.supervised.assembly import lr_schedule
from phimr_nemo.training.optimizer import build_schedule


def supervised_rates(optim: OptimConfig, steps: int) -> list[float]:
    """Of stages 1 and 2 (NeMo's schedulers)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = lr_schedule(optim, steps).scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def alignment_rates(optim: OptimConfig, steps: int) -> list[float]:
    """Of stages 3 and 4 (Megatron's scheduler)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = build_schedule(optim, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step(increment=1)
    return rates


def torch_schedulers(optim: OptimConfig, steps: int, *, supervised: bool) -> list[dict[str, Any]]:
    """The same rates by torch's schedulers one after the other, as NeMo-RL lists them.

    With w warm-up steps, rates rise in lines to `lr` and fall from there to `min_lr`, which step `steps` would have:
    NeMo (stages 1 and 2) gives step k of the warm-up lr (k + 1) / (w + 1), Megatron (3 and 4) lr (k + 1) / w.

    Returns:
        `name` and `kwargs` of each, and last the `milestones` between them.
    """
    warmup = round(optim.warmup_fraction * steps)
    rising = warmup if supervised else max(warmup - 1, 0)
    schedulers = "torch.optim.lr_scheduler."
    parts: list[dict[str, Any]] = []
    if rising:
        warm = {"start_factor": 1 / (rising + 1), "end_factor": 1.0, "total_iters": rising}
        parts.append({"name": schedulers + "LinearLR", "kwargs": warm})
    length = max(steps - rising, 1)
    if optim.schedule == "cosine":
        parts.append({"name": schedulers + "CosineAnnealingLR", "kwargs": {"T_max": length, "eta_min": optim.min_lr}})
    elif optim.schedule == "linear":
        fall = {"start_factor": 1.0, "end_factor": optim.min_lr / optim.lr, "total_iters": length}
        parts.append({"name": schedulers + "LinearLR", "kwargs": fall})
    else:
        parts.append({"name": schedulers + "ConstantLR", "kwargs": {"factor": 1.0, "total_iters": steps}})
    return [*parts, {"milestones": [rising] if rising else []}]
