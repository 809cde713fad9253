"""The learning rate as a pure function, against closed forms written down a second time, and its adapters."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from phimr_nemo.config import STAGES, OptimConfig, load_config
from phimr_nemo.config.common import Schedule as ScheduleName
from phimr_nemo.errors import UserError
from phimr_nemo.training.optimizer import TrainerScheduler
from phimr_nemo.training.schedule import learning_rate

LR, MIN_LR = 1.0, 0.1
SHAPES: tuple[ScheduleName, ...] = get_args(ScheduleName)
SIZES = tuple(itertools.product((1, 2, 7, 10, 40), (0.0, 0.1, 0.25, 0.5)))


def optim(schedule: str, **changes: Any) -> OptimConfig:
    values: dict[str, Any] = {
        "lr": LR,
        "min_lr": MIN_LR,
        "warmup_fraction": 0.0,
        "schedule": schedule,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "clip_grad": 1.0,
        "distributed": False,
        "decay_fraction": 0.4 if schedule == "wsd" else None,
    }
    return OptimConfig(**{**values, **changes})


def closed_form(schedule: str, steps: int, warmup: int, decay: int) -> list[float]:
    """Piece by piece: the warm-up, the plateau, and the fall, in which step `steps` would have the smallest rate."""
    rates = [LR * (k + 1) / warmup for k in range(warmup)]
    if schedule == "constant":
        return rates + [LR] * (steps - warmup)
    if not rates:
        rates = [LR]
    if schedule == "wsd":
        rates += [LR] * (steps - decay - len(rates))
    falling = steps - len(rates) + 1
    for k in range(1, falling):
        share = k / falling
        if schedule == "cosine":
            share = math.sin(math.pi * share / 2) ** 2
        rates.append(LR * (1 - share) + MIN_LR * share)
    return rates


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize(("steps", "warmup"), SIZES)
def test_every_schedule_is_its_closed_form(schedule: str, steps: int, warmup: float) -> None:
    config = optim(schedule, warmup_fraction=warmup)
    found = [learning_rate(step, steps, config) for step in range(steps)]
    assert found == pytest.approx(closed_form(schedule, steps, round(warmup * steps), round(0.4 * steps)), rel=1e-12)


@pytest.mark.parametrize("schedule", SHAPES)
def test_no_step_is_spent_at_zero_and_the_last_is_next_to_the_smallest(schedule: str) -> None:
    config = optim(schedule, warmup_fraction=0.1, min_lr=0.0)
    found = [learning_rate(step, 100, config) for step in range(100)]
    assert min(found) > 0.0
    assert max(found) == LR
    assert learning_rate(100, 100, config) == (LR if schedule == "constant" else pytest.approx(0.0, abs=1e-12))


def test_one_step_has_the_full_rate() -> None:
    assert [learning_rate(0, 1, optim(schedule, warmup_fraction=0.1)) for schedule in SHAPES] == [LR] * len(SHAPES)


@pytest.mark.parametrize("schedule", SHAPES)
def test_both_adapters_give_the_function_also_after_a_restart(schedule: str) -> None:
    from phimr_nemo.supervised.schedule import LightningScheduler

    steps, half = 10, 4
    config = optim(schedule, warmup_fraction=0.2)
    expected = [learning_rate(step, steps, config) for step in range(steps)]
    for adapter in (
        lambda optimizer: TrainerScheduler(config, optimizer, steps),
        lambda optimizer: LightningScheduler(optimizer, config, steps),
    ):
        found, state = [], None
        for length in (half, steps - half):
            optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR)
            scheduler = adapter(optimizer)
            if state is not None:
                scheduler.load_state_dict(state)
            for _ in range(length):
                found.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            state = scheduler.state_dict()
        assert found == expected


def test_biases_and_norms_are_exempt_from_the_weight_decay() -> None:
    groups = adam_groups(0.1)
    TrainerScheduler(optim("cosine"), SimpleNamespace(param_groups=groups), 3)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def adam_groups(decay: float, beta: float = 0.9, eps: float = 1e-8) -> list[dict[str, Any]]:
    """As Megatron makes them: of matrices, and of biases and norms."""
    return [{"wd_mult": mult, "weight_decay": decay, "betas": (beta, 0.95), "eps": eps} for mult in (1.0, 0.0)]


def test_a_continued_run_has_its_own_settings_and_not_those_of_the_checkpoint() -> None:
    """The optimizer's state, loaded before the schedule's, brings the old run's groups, in another order and form."""
    optimizer = SimpleNamespace(param_groups=adam_groups(0.3, 0.8, 1e-6))
    scheduler = TrainerScheduler(optim("constant", lr=0.5), optimizer, 10)
    old = [{**group, "lr": LR, "pre_wd_mult": group.pop("wd_mult")} for group in adam_groups(0.1)]
    optimizer.param_groups = [{name: group[name] for name in group if name != "wd_mult"} for group in reversed(old)]
    scheduler.load_state_dict({"step": 4})
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.5)
        assert group["weight_decay"] == 0.3 * group["pre_wd_mult"]


def test_lightnings_adapter_keeps_the_new_settings_as_well() -> None:
    from phimr_nemo.supervised.schedule import LightningScheduler

    optimizers = [
        torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr, weight_decay=decay)
        for lr, decay in ((LR, 0.1), (0.5, 0.3))
    ]
    old, new = (LightningScheduler(optimizer, optim("linear"), 10) for optimizer in optimizers)
    for _ in range(4):
        optimizers[0].step()
        old.step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    new.load_state_dict(old.state_dict())
    [group] = optimizers[1].param_groups
    assert group["weight_decay"] == 0.3
    assert group["lr"] == learning_rate(4, 10, optim("linear", lr=0.5))


@pytest.mark.parametrize("stage", ["midtrain", "sft", "dpo", "grpo"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.min_lr=1", "optim.min_lr=1.0 with optim.lr"),
        ("optim.schedule=wsd", "optim.schedule=wsd with optim.decay_fraction=None"),
        ("optim.decay_fraction=0.2", "decay_fraction=0.2"),
        ("optim.schedule=wsd optim.decay_fraction=0.9 optim.warmup_fraction=0.2", "warmup_fraction=0.2"),
        ("optim.schedule=polynomial", "optim.schedule"),
    ],
)
def test_rates_that_make_no_curve_are_refused_when_they_are_read(
    stage: str, change: str, named: str, repository: Path
) -> None:
    with pytest.raises(UserError, match=named):
        load_config(STAGES[stage], repository / "conf" / stage / "tiny.yaml", ["base=b", *change.split()])
