"""The learning rate of every stage: one pure function of (step, steps, optim), which the adapters of all
trainers call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phimr_nemo.config import OptimConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of an optimizer step.

    In a warm-up of w = warmup_fraction * steps steps, step k has the rate lr (k + 1) / w, so that no step is spent at
    a rate of 0. From the last step at lr, h, on the rate falls to `min_lr`, which step `steps` would have; with
    p = (k - h) / (steps - h):

    - constant: lr.
    - linear: lr - (lr - min_lr) p; h is the end of the warm-up.
    - cosine: min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983); the same h.
    - wsd, warm-up/stable/decay (Hu et al. 2024, arXiv 2404.06395): linear, but h leaves the last
      decay_fraction * steps steps for the decay (the decay is linear as in Haegele et al. 2024, arXiv 2405.18392).

    Args:
        step: the optimizer step, from 0.
        steps: optimizer steps of the whole run.
        optim: rates and form.
    """
    warmup = round(optim.warmup_fraction * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    hold = max(warmup - 1, 0)
    if optim.schedule == "wsd":
        assert optim.decay_fraction is not None  # a rule of the configuration
        hold = max(hold, steps - round(optim.decay_fraction * steps) - 1)
    progress = min(max(step - hold, 0) / max(steps - hold, 1), 1.0)
    fall = (1.0 - math.cos(math.pi * progress)) / 2.0 if optim.schedule == "cosine" else progress
    return optim.lr - (optim.lr - optim.min_lr) * fall


def adam_settings(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the configuration says of Adam besides the rate, from the groups of an optimizer that was just made."""
    first, *others = groups
    decay = max(group["weight_decay"] for group in (first, *others))
    return {"betas": first["betas"], "eps": first["eps"], "weight_decay": decay}


def keep_settings(groups: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> None:
    """Give groups that a checkpoint has brought the settings of this run: a continued run may have other ones."""
    for group in groups:
        group.update(settings)
    exempt_from_decay(groups)


def exempt_from_decay(groups: Sequence[dict[str, Any]]) -> None:
    """Take the weight decay from the parameter groups of biases and norms.

    Megatron marks them (`wd_mult` 0, `pre_wd_mult` in groups of a checkpoint) and leaves it to the schedule to act on
    the mark.

    Args:
        groups: of a Megatron optimizer.
    """
    for group in groups:
        if group.get("wd_mult", group.get("pre_wd_mult", 1.0)) == 0.0:
            group["weight_decay"] = 0.0
