"""The learning rate of every optimizer step of a stage, taken from the scheduler that the stage itself uses."""

from __future__ import annotations

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
