"""The losses of the recipe of 2026 against TRL's own code, on the same numbers: value and gradient."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phimr_nemo.losses import PolicyBatch, PolicyLoss, cispo_loss, dapo_loss, masked_importance_weights

HERE = Path(__file__).parent
RESPONSES, TOKENS = 12, 16
LOW, HIGH, BETA = 0.2, 0.28, 0.1
NEAR = 1e-9
Loss = Callable[..., PolicyLoss]
CASES: dict[str, tuple[Loss, dict[str, Any], dict[str, Any]]] = {
    "cispo": (cispo_loss, {"clip_low": 1.0}, {"loss_type": "cispo", "epsilon_high": 1 + HIGH, "weighted_kl": False}),
    "cispo, weighted KL": (
        cispo_loss,
        {"clip_low": 1.0, "weighted_kl": True},
        {"loss_type": "cispo", "epsilon_high": 1 + HIGH, "weighted_kl": True},
    ),
    "clip higher, weighted KL": (
        dapo_loss,
        {"clip_low": LOW, "weighted_kl": True},
        {"loss_type": "dapo", "epsilon_high": HIGH, "weighted_kl": True},
    ),
}
"""Ours with its options, and TRL's settings."""


def made_up() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(RESPONSES, TOKENS, generator=generator, dtype=torch.float64)

    logprobs = -noise().abs()
    old = logprobs + 0.3 * noise()
    lengths = torch.randint(1, TOKENS + 1, (RESPONSES, 1), generator=generator)
    return {
        "logprobs": logprobs,
        "old": old,
        "reference": logprobs + 0.3 * noise(),
        "weights": masked_importance_weights(old, old + 0.5 * noise(), low=0.5, high=2.0),
        "mask": (torch.arange(TOKENS) < lengths).double(),
        "advantages": noise()[:, 0],
    }


def test_losses_and_gradients_equal_trls(
    bridge_python: Path, bridge_variables: dict[str, str], tmp_path: Path
) -> None:
    numbers = made_up()
    assert (numbers["weights"] == 0).any()
    tensors = {name: values.tolist() for name, values in numbers.items()}
    settings = [theirs | {"epsilon_low": LOW, "beta": BETA, "tensors": tensors} for _, _, theirs in CASES.values()]
    cases, file = tmp_path / "cases.json", tmp_path / "found.json"
    cases.write_text(json.dumps(settings), "utf-8")
    command = [str(bridge_python), str(HERE / "trl_losses.py"), str(cases), str(file)]
    done = subprocess.run(command, env=bridge_variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in zip(CASES, json.loads(file.read_text("utf-8")), strict=True):
        loss, options, _ = CASES[name]
        value, gradient = ours(loss, numbers, options)
        assert found["loss"] == pytest.approx(value, rel=NEAR), name
        torch.testing.assert_close(
            torch.tensor(found["gradient"], dtype=torch.float64), gradient, rtol=1e-7, atol=NEAR
        )
        # Another bound is another loss.
        assert ours(loss, numbers, options | {"clip_high": 0.1})[0] != pytest.approx(value, rel=1e-3), name


def ours(loss: Loss, numbers: dict[str, Tensor], options: dict[str, Any]) -> tuple[float, Tensor]:
    logprobs = numbers["logprobs"].clone().requires_grad_()
    names = ("old", "advantages", "mask", "reference", "weights")
    result = loss(
        PolicyBatch(logprobs, *(numbers[name] for name in names)),
        **({"clip_high": HIGH, "kl_coefficient": BETA} | options),
    )
    mean = result.loss_sum / result.denominator
    return mean.item(), torch.autograd.grad(mean, logprobs)[0]
