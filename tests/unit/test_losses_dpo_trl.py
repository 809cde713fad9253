"""The preference losses against TRL's, value by value.

TRL is no dependency. `pip install --no-deps --target DIR trl==0.24.0`, then PYTHONPATH=DIR makes these tests run; the
same values are derived by hand in test_losses_dpo.py, always.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from phimr_nemo.losses import (
    dpo_loss,
    ipo_loss,
    label_smoothed_dpo_loss,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
)

BETA = 0.3
SMOOTHING = 0.15
PAIRS = 64
CHOSEN_TOKENS = torch.arange(1, PAIRS + 1)
REJECTED_TOKENS = CHOSEN_TOKENS.flip(0)


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's DPOTrainer; its loss is a method that needs only a few of the trainer's settings."""
    pytest.importorskip("trl", reason="TRL is not importable: pip install --no-deps --target DIR trl==0.24.0")
    from trl import DPOTrainer

    return DPOTrainer


def sums() -> tuple[Tensor, ...]:
    """Policy's and reference's sums of chosen and rejected: float64, up to 200 nats apart."""
    generator = torch.Generator().manual_seed(0)
    return tuple(-200 * torch.rand(PAIRS, generator=generator, dtype=torch.float64) for _ in range(4))


def theirs(trainer: Any, kind: str, values: tuple[Tensor, ...], smoothing: float = 0.0) -> tuple[Tensor, ...]:
    settings = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        reference_free=False,
        f_divergence_type=None,
        beta=BETA,
        label_smoothing=smoothing,
    )
    result: tuple[Tensor, ...] = trainer.dpo_loss(settings, *values, loss_type=kind)
    return result


def with_gradients(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (values[0].clone().requires_grad_(), values[1].clone().requires_grad_(), *values[2:])


def per_token(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(v / n for v, n in zip(values, 2 * (CHOSEN_TOKENS, REJECTED_TOKENS), strict=True))


@pytest.mark.parametrize("kind", ["dpo", "label_smoothed", "ipo", "length_normalized_dpo", "length_normalized_ipo"])
def test_value_and_gradients_are_trls(trl: Any, kind: str) -> None:
    ours_in, theirs_in = with_gradients(sums()), with_gradients(sums())
    w, l, rw, rl = ours_in
    lengths = (CHOSEN_TOKENS, REJECTED_TOKENS)
    ours, metrics = {
        "dpo": lambda: dpo_loss(w, l, rw, rl, BETA),
        "label_smoothed": lambda: label_smoothed_dpo_loss(w, l, rw, rl, BETA, SMOOTHING),
        "ipo": lambda: ipo_loss(w, l, rw, rl, BETA),
        "length_normalized_dpo": lambda: length_normalized_dpo_loss(w, l, rw, rl, BETA, *lengths),
        "length_normalized_ipo": lambda: length_normalized_ipo_loss(w, l, rw, rl, BETA, *lengths),
    }[kind]()
    inputs = per_token(theirs_in) if kind.startswith("length") else theirs_in
    smoothing = SMOOTHING if kind == "label_smoothed" else 0.0
    losses, chosen_rewards, rejected_rewards = theirs(
        trl, "ipo" if kind.endswith("ipo") else "sigmoid", inputs, smoothing
    )
    assert ours.item() == pytest.approx(losses.sum().item(), rel=1e-12)
    ours.backward()
    losses.sum().backward()
    for mine, other in zip(ours_in[:2], theirs_in[:2], strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-10, atol=0)
    assert metrics["chosen_reward"].item() == pytest.approx(chosen_rewards.sum().item(), rel=1e-12)
    assert metrics["rejected_reward"].item() == pytest.approx(rejected_rewards.sum().item(), rel=1e-12)
