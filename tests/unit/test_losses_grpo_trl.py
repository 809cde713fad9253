"""The policy losses against TRL's, value by value, with TRL's truncated importance sampling and KL penalty.

TRL is no dependency. `pip install --no-deps --target DIR trl==0.24.0`, then PYTHONPATH=DIR makes these tests run; the
same values are derived by hand in test_losses_grpo.py, always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from phimr_nemo.losses import (
    PolicyBatch,
    PolicyLoss,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    truncated_importance_weights,
)

RESPONSES, TOKENS, PROMPT = 16, 24, 3
CLIP_LOW, CLIP_HIGH, BETA, CAP, BUDGET = 0.2, 0.28, 0.1, 1.3, 40
LOSSES: dict[str, tuple[Callable[..., PolicyLoss], str, str]] = {
    "grpo": (grpo_loss, "grpo", "token"),
    "dr_grpo": (partial(dr_grpo_loss, max_new_tokens=BUDGET), "dr_grpo", "token"),
    "dapo": (dapo_loss, "dapo", "token"),
    "gspo": (gspo_loss, "grpo", "sequence"),
}
"""Ours, TRL's `loss_type`, and TRL's `importance_sampling_level`."""


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's GRPOTrainer; its loss is a method that needs only a few of the trainer's settings."""
    pytest.importorskip("trl", reason="TRL is not importable: pip install --no-deps --target DIR trl==0.24.0")
    from trl import GRPOTrainer

    return GRPOTrainer


def made_up() -> dict[str, Tensor]:
    """Float64; policies that differ by a third of a nat a token, so that many ratios are clipped and capped."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(RESPONSES, TOKENS, generator=generator, dtype=torch.float64)

    logprobs = -noise().abs()
    lengths = torch.randint(1, TOKENS + 1, (RESPONSES, 1), generator=generator)
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.3 * noise(),
        "sampler": logprobs + 0.3 * noise(),
        "reference": logprobs + 0.3 * noise(),
        "mask": torch.arange(TOKENS) < lengths,
        "advantages": noise()[:, 0],
    }


def theirs(trainer: Any, loss_type: str, level: str, case: dict[str, Tensor], *, corrected: bool, beta: float) -> Any:
    """TRL's loss and the metrics that it keeps."""
    kept: dict[str, Any] = {"train": defaultdict(list)}
    settings = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (case["logprobs"], torch.zeros(RESPONSES, TOKENS)),
        model=SimpleNamespace(training=True),
        top_entropy_quantile=1.0,
        beta=beta,
        importance_sampling_level=level,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        args=SimpleNamespace(delta=None),
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        loss_type=loss_type,
        current_gradient_accumulation_steps=1,
        max_completion_length=BUDGET,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value),
        _metrics=kept,
    )
    prompt = torch.zeros(RESPONSES, PROMPT, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.zeros(RESPONSES, TOKENS, dtype=torch.int64),
        "completion_mask": case["mask"].long(),
        "advantages": case["advantages"],
        "old_per_token_logps": case["old"],
        "ref_per_token_logps": case["reference"],
        "importance_sampling_ratio": torch.exp(case["old"] - case["sampler"]).clamp(max=CAP),
        "num_items_in_batch": case["mask"].sum(),
    }
    return trainer._compute_loss(settings, None, inputs), kept["train"]


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_are_trls(trl: Any, kind: str, corrected: bool, beta: float) -> None:
    ours, loss_type, level = LOSSES[kind]
    mine, other = made_up(), made_up()
    for case in (mine, other):
        case["logprobs"].requires_grad_()
    batch = PolicyBatch(
        mine["logprobs"],
        mine["old"],
        mine["advantages"],
        mine["mask"],
        ref_logprobs=mine["reference"] if beta else None,
        importance_weights=truncated_importance_weights(mine["old"], mine["sampler"], CAP) if corrected else None,
    )
    result = ours(batch, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, kl_coefficient=beta)
    expected, metrics = theirs(trl, loss_type, level, other, corrected=corrected, beta=beta)
    loss = result.loss_sum / result.denominator
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    assert mine["logprobs"].grad is not None
    assert other["logprobs"].grad is not None
    assert torch.allclose(mine["logprobs"].grad, other["logprobs"].grad, rtol=1e-10, atol=1e-15)
    tokens = int(mine["mask"].sum())
    if beta:
        assert float(result.metrics["kl_to_reference"]) / tokens == pytest.approx(metrics["kl"][0], rel=1e-12)
    if level == "token":
        assert float(result.metrics["clipped_low"]) / tokens == pytest.approx(metrics["clip_ratio/low_mean"][0])
        assert float(result.metrics["clipped_high"]) / tokens == pytest.approx(metrics["clip_ratio/high_mean"][0])
        assert metrics["clip_ratio/low_mean"][0] > 0.01
