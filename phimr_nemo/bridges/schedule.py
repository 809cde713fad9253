"""The learning rate of a stage (:mod:`phimr_nemo.training.schedule`) for trainers with schedulers of their own."""

from __future__ import annotations

from typing import Any, Final

from phimr_nemo.config import OptimConfig
from phimr_nemo.training.schedule import learning_rate

TORCH: Final = "torch.optim.lr_scheduler."


def learning_rates(optim: OptimConfig, steps: int) -> list[float]:
    """Of every optimizer step."""
    return [learning_rate(step, steps, optim) for step in range(steps)]


def torch_schedulers(optim: OptimConfig, steps: int) -> list[dict[str, Any]]:
    """The same rates by torch's schedulers one after the other, as NeMo-RL lists them.

    Returns:
        `name` and `kwargs` of each, and last the `milestones` between them.
    """
    warmup = round(optim.warmup_fraction * steps)
    # Torch's line from lr / warmup at step 0 reaches lr at the last step of the warm-up.
    rising = max(warmup - 1, 0)
    parts: list[dict[str, Any]] = []
    milestones = [rising] if rising else []
    if rising:
        warm = {"start_factor": 1 / warmup, "end_factor": 1.0, "total_iters": rising}
        parts.append({"name": f"{TORCH}LinearLR", "kwargs": warm})
    if optim.schedule in ("constant", "wsd"):
        parts.append({"name": f"{TORCH}ConstantLR", "kwargs": {"factor": 1.0, "total_iters": steps}})
    hold = rising
    if optim.decay_fraction is not None:
        hold = max(rising, steps - round(optim.decay_fraction * steps) - 1)
        milestones.append(hold)
    if optim.schedule == "cosine":
        fall = {"T_max": max(steps - hold, 1), "eta_min": optim.min_lr}
        parts.append({"name": f"{TORCH}CosineAnnealingLR", "kwargs": fall})
    elif optim.schedule in ("linear", "wsd"):
        line = {"start_factor": 1.0, "end_factor": optim.min_lr / optim.lr, "total_iters": max(steps - hold, 1)}
        parts.append({"name": f"{TORCH}LinearLR", "kwargs": line})
    return [*parts, {"milestones": milestones}]
