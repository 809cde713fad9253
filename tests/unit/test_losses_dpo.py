"""The preference losses: values and gradients by hand, minima where theory puts them, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses import (
    dpo_loss,
    ipo_loss,
    label_smoothed_dpo_loss,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    rpo_loss,
)

BETA = 0.25
CHOSEN_TOKENS, REJECTED_TOKENS = torch.tensor([4, 2, 5]), torch.tensor([8, 2, 1])

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
ALL_LOSSES: dict[str, Loss] = {
    "dpo": lambda w, l, rw, rl: dpo_loss(w, l, rw, rl, BETA),
    "label_smoothed": lambda w, l, rw, rl: label_smoothed_dpo_loss(w, l, rw, rl, BETA, 0.1),
    "ipo": lambda w, l, rw, rl: ipo_loss(w, l, rw, rl, BETA),
    "length_normalized_dpo": lambda w, l, rw, rl: length_normalized_dpo_loss(
        w, l, rw, rl, BETA, CHOSEN_TOKENS, REJECTED_TOKENS
    ),
    "length_normalized_ipo": lambda w, l, rw, rl: length_normalized_ipo_loss(
        w, l, rw, rl, BETA, CHOSEN_TOKENS, REJECTED_TOKENS
    ),
    "rpo": lambda w, l, rw, rl: rpo_loss(w, l, rw, rl, BETA, CHOSEN_TOKENS, 0.5),
}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def random_pairs(count: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(0)

    def sums() -> Tensor:
        return -4 * torch.rand(count, generator=generator, dtype=torch.float64)

    return sums(), sums(), sums(), sums()


def select(pairs: Pairs, rows: slice) -> Pairs:
    return pairs[0][rows], pairs[1][rows], pairs[2][rows], pairs[3][rows]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_first_step_is_ln_2_per_pair() -> None:
    chosen, rejected, *_ = random_pairs()
    loss_sum, metrics = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), BETA)
    assert loss_sum.item() == pytest.approx(3 * math.log(2), rel=1e-15)
    assert metrics["pairs"].item() == 3
    assert metrics["accuracy"].item() == 0
    assert metrics["margin"].item() == 0.0


def test_dpo_value_gradient_and_metrics_by_hand() -> None:
    """r_w = -3 - (-5) = 2, r_l = -4 - (-2) = -2, beta 0.25: d = 1, loss -ln sigma(1), dL/dr_w = -0.25 sigma(-1)."""
    chosen, rejected = vector(-3.0), vector(-4.0)
    loss_sum, metrics = dpo_loss(chosen, rejected, vector(-5.0).detach(), vector(-2.0).detach(), BETA)
    loss_sum.backward()
    assert loss_sum.item() == pytest.approx(math.log(1 + math.exp(-1.0)))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-BETA * sigmoid(-1.0))
    assert rejected.grad.item() == pytest.approx(BETA * sigmoid(-1.0))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "pairs": 1,
            "accuracy": 1,
            "margin": 1.0,
            "chosen_reward": 0.5,
            "rejected_reward": -0.5,
            "chosen_logprob": -3.0,
            "rejected_logprob": -4.0,
        }
    )


def test_label_smoothing_is_the_mixture_of_both_labellings() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_pairs()
    right, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA)
    swapped, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, BETA)
    smoothed, _ = label_smoothed_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA, 0.2)
    assert smoothed.item() == pytest.approx((0.8 * right + 0.2 * swapped).item(), rel=1e-12)


def test_label_smoothing_has_its_minimum_at_the_log_odds() -> None:
    """(1-e) sigma(-d) = e sigma(d) at d = ln((1-e)/e); with r_l = 0 that is r_w = d / beta."""
    best = math.log(0.8 / 0.2) / BETA
    zero = torch.zeros(1, dtype=torch.float64)
    for offset, sign in ((-1.0, -1), (0.0, 0), (1.0, 1)):
        chosen = vector(best + offset)
        label_smoothed_dpo_loss(chosen, zero, zero, zero, BETA, 0.2)[0].backward()
        assert chosen.grad is not None
        gradient = chosen.grad.item()
        assert (abs(gradient) < 1e-12) if sign == 0 else (math.copysign(1, gradient) == sign)


def test_ipo_by_hand_and_zero_at_its_target() -> None:
    """1 / (2 * 0.25) = 2: a log-ratio difference of 2 costs 0, one of 5 costs 9 with slope 6."""
    zero = torch.zeros(1, dtype=torch.float64)
    at_target, beyond = vector(2.0), vector(5.0)
    assert ipo_loss(at_target, zero, zero, zero, BETA)[0].item() == 0.0
    loss_sum, _ = ipo_loss(beyond, zero, zero, zero, BETA)
    loss_sum.backward()
    assert loss_sum.item() == 9.0
    assert beyond.grad is not None
    assert beyond.grad.item() == 6.0


def test_length_normalized_losses_use_log_ratios_per_token() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_pairs()
    differences = [
        float((chosen[i] - ref_chosen[i]) / CHOSEN_TOKENS[i] - (rejected[i] - ref_rejected[i]) / REJECTED_TOKENS[i])
        for i in range(3)
    ]
    sums = (chosen, rejected, ref_chosen, ref_rejected)
    loss_sum, metrics = length_normalized_dpo_loss(*sums, BETA, CHOSEN_TOKENS, REJECTED_TOKENS)
    assert loss_sum.item() == pytest.approx(sum(-math.log(sigmoid(BETA * d)) for d in differences), rel=1e-12)
    assert metrics["margin"].item() == pytest.approx(BETA * sum(differences), rel=1e-9)
    loss_sum, _ = length_normalized_ipo_loss(*sums, BETA, CHOSEN_TOKENS, REJECTED_TOKENS)
    assert loss_sum.item() == pytest.approx(sum((d - 2.0) ** 2 for d in differences), rel=1e-12)


def test_length_normalization_removes_the_gain_of_mere_length() -> None:
    """Ten times the tokens at the same log-ratio per token: DPO is satisfied, the normalised loss still ln 2."""
    zero = torch.zeros(1, dtype=torch.float64)
    long_chosen, short_rejected = vector(10.0), vector(1.0)
    normalized, _ = length_normalized_dpo_loss(
        long_chosen, short_rejected, zero, zero, 1.0, torch.tensor([10]), torch.tensor([1])
    )
    assert normalized.item() == pytest.approx(math.log(2))
    assert dpo_loss(long_chosen, short_rejected, zero, zero, 1.0)[0].item() < 0.01


def test_rpo_adds_the_chosen_likelihood_per_token() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_pairs()
    preference, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA)
    loss_sum, metrics = rpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA, CHOSEN_TOKENS, 0.5)
    nll = sum(-float(c) / int(n) for c, n in zip(chosen, CHOSEN_TOKENS, strict=True))
    assert loss_sum.item() == pytest.approx(preference.item() + 0.5 * nll, rel=1e-12)
    assert metrics["nll"].item() == pytest.approx(nll, rel=1e-12)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradients_equal_finite_differences(name: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_pairs()
    assert torch.autograd.gradcheck(
        lambda w, l: ALL_LOSSES[name](w, l, ref_chosen, ref_rejected)[0],
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_first_step_raises_chosen_and_lowers_rejected(name: str) -> None:
    chosen, rejected, *_ = random_pairs()
    references = chosen.clone(), rejected.clone()
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss_sum, metrics = ALL_LOSSES[name](chosen, rejected, *references)
    loss_sum.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()
    assert not any(value.requires_grad for value in metrics.values())


def test_sums_over_micro_batches_equal_the_whole_batch() -> None:
    pairs = random_pairs(5)
    whole, whole_metrics = dpo_loss(*pairs, BETA)
    first, first_metrics = dpo_loss(*select(pairs, slice(0, 2)), BETA)
    second, second_metrics = dpo_loss(*select(pairs, slice(2, 5)), BETA)
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-12)
    for name, value in whole_metrics.items():
        assert (first_metrics[name] + second_metrics[name]).item() == pytest.approx(value.item(), rel=1e-12)


def test_extreme_margins_stay_finite() -> None:
    chosen = vector(-1e4, 1e4)
    zero = torch.zeros(2, dtype=torch.float64)
    loss_sum, _ = dpo_loss(chosen, zero, zero, zero, 1.0)
    loss_sum.backward()
    assert loss_sum.item() == pytest.approx(1e4)
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(UserError, match="beta"):
        dpo_loss(*random_pairs(), beta)


def test_bad_shapes_and_ranges_are_refused() -> None:
    pairs = random_pairs()
    with pytest.raises(UserError, match="ref_rejected"):
        dpo_loss(*pairs[:3], pairs[3][:2], BETA)
    with pytest.raises(UserError, match="vector"):
        dpo_loss(*(2 * (pairs[0].unsqueeze(1),)), pairs[2], pairs[3], BETA)
    with pytest.raises(UserError, match="label_smoothing"):
        label_smoothed_dpo_loss(*pairs, BETA, 0.5)
    with pytest.raises(UserError, match="nll_weight"):
        rpo_loss(*pairs, BETA, CHOSEN_TOKENS, 0.0)
    with pytest.raises(UserError, match="chosen_tokens"):
        rpo_loss(*pairs, BETA, CHOSEN_TOKENS[:1], 0.5)
