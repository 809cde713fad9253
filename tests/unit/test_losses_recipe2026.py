"""Losses of the recipe of 2026: expected gradients over an enumerated vocabulary, plain loops, values by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses import (
    PolicyBatch,
    PolicyLoss,
    apo_down_loss,
    apo_zero_loss,
    batch_advantages,
    cispo_loss,
    dapo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    importance_weighted_k3_kl,
    k3_kl,
    masked_importance_weights,
    sequence_masked_weights,
)

WORDS = 5
FACTOR_OF_EXACT = 1e-9


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, and log-probabilities of a reference and of an older policy, over all words."""
    generator = torch.Generator().manual_seed(0)

    def logits() -> Tensor:
        return torch.randn(WORDS, generator=generator, dtype=torch.float64)

    return logits().requires_grad_(), logits().log_softmax(0), logits().log_softmax(0)


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def divergence(one: Tensor, other: Tensor) -> Tensor:
    return (one.exp() * (one - other)).sum()


def expected_gradient(estimate: Callable[[Tensor], Tensor], sampled: Tensor | None, logits: Tensor) -> Tensor:
    """The mean gradient of an estimate over words drawn from `sampled`, or from the policy itself."""
    policy = logits.log_softmax(0)
    weights = (policy if sampled is None else sampled).exp().detach()
    return gradient((weights * estimate(policy)).sum(), logits)


def test_the_gradient_of_k3_is_that_of_the_other_direction() -> None:
    logits, reference, _ = distributions()
    found = expected_gradient(lambda policy: k3_kl(policy, reference), None, logits)
    torch.testing.assert_close(found, gradient(divergence(reference, logits.log_softmax(0)), logits))
    assert not torch.allclose(found, gradient(divergence(logits.log_softmax(0), reference), logits), atol=1e-2)


@pytest.mark.parametrize("is_off_policy", [False, True])
def test_weighted_k3_has_value_and_gradient_of_the_divergence_to_the_reference(is_off_policy: bool) -> None:
    logits, reference, older = distributions()
    sampled = older if is_off_policy else logits.log_softmax(0).detach()

    def estimate(policy: Tensor) -> Tensor:
        return importance_weighted_k3_kl(policy, reference, sampled)

    exact = divergence(logits.log_softmax(0), reference)
    torch.testing.assert_close(expected_gradient(estimate, sampled, logits), gradient(exact, logits))
    mean = (sampled.exp() * estimate(logits.log_softmax(0))).sum()
    torch.testing.assert_close(mean, exact)
    # Without the weight neither is right off policy.
    unweighted = expected_gradient(lambda policy: k3_kl(policy, reference), sampled, logits)
    assert is_off_policy == (
        not torch.allclose((sampled.exp() * k3_kl(logits.log_softmax(0), reference)).sum(), exact)
    )
    assert not torch.allclose(unweighted, gradient(exact, logits), atol=1e-2)


def test_a_losses_penalty_is_the_estimator_that_is_asked_for() -> None:
    """One response a word, weighed by its probability under the older policy; the penalty is all there is."""
    logits, reference, older = distributions()
    policy = logits.log_softmax(0)
    for weighted in (False, True):
        total = torch.zeros((), dtype=torch.float64)
        for word in range(WORDS):
            columns = [values[word].view(1, 1) for values in (policy, older, reference)]
            zero, mask = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1)
            batch = PolicyBatch(columns[0], columns[1], zero, mask, ref_logprobs=columns[2])
            result = dapo_loss(batch, clip_low=0.2, clip_high=0.2, kl_coefficient=1.0, weighted_kl=weighted)
            total = total + older[word].exp() * result.loss_sum
        exact = gradient(divergence(logits.log_softmax(0), reference), logits)
        found = torch.autograd.grad(total, logits, retain_graph=True)[0]
        assert torch.allclose(found, exact, rtol=FACTOR_OF_EXACT) == weighted


@pytest.mark.parametrize("loss", [grpo_loss, dapo_loss, gspo_loss, cispo_loss])
def test_the_entropy_bonus_is_weighed_as_the_loss_weighs_a_token(loss: Callable[..., PolicyLoss]) -> None:
    batch, *_ = responses(0.2, 0.28, weights=True)
    entropy = torch.rand(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    without = loss(batch, clip_low=0.2, clip_high=0.28)
    result = loss(replace(batch, entropy=entropy), clip_low=0.2, clip_high=0.28, entropy_bonus=0.5)
    by_token = loss in (dapo_loss, cispo_loss)
    lengths = batch.loss_mask.sum(dim=1, keepdim=True)
    weights = -0.5 * batch.loss_mask / (1 if by_token else lengths)
    assert (result.loss_sum - without.loss_sum).item() == pytest.approx((weights * entropy).sum().item())
    torch.testing.assert_close(torch.autograd.grad(result.loss_sum, entropy)[0], weights.double())
    assert result.metrics["entropy"].item() == pytest.approx(entropy[batch.loss_mask.bool()].sum().item())
    with pytest.raises(UserError, match=r"entropy_bonus 0\.5 without"):
        loss(batch, clip_low=0.2, clip_high=0.28, entropy_bonus=0.5)


def responses(low: float, high: float, *, weights: bool) -> tuple[PolicyBatch, list[float], float]:
    """Responses of 3, 1 and 2 tokens; CISPO's gradient for each token and its loss, in plain Python."""
    generator = torch.Generator().manual_seed(1)
    logprobs, old = (-torch.rand(3, 3, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    importance = torch.rand(3, 3, generator=generator, dtype=torch.float64) * 2 if weights else None
    advantages = torch.tensor([1.5, -0.5, -2.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    gradients, loss = [], 0.0
    for row, column in mask.nonzero().tolist():
        ratio = math.exp(float(logprobs[row, column] - old[row, column]))
        weight = max(1 - low, min(1 + high, ratio)) * (
            float(importance[row, column]) if importance is not None else 1
        )
        gradients.append(-weight * float(advantages[row]))
        loss += gradients[-1] * float(logprobs[row, column])
    batch = PolicyBatch(logprobs.requires_grad_(), old, advantages, mask, importance_weights=importance)
    return batch, gradients, loss


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.28), (0.2, 3.0)])
@pytest.mark.parametrize("weights", [False, True])
def test_cispo_keeps_every_tokens_gradient_and_clips_its_weight(low: float, high: float, weights: bool) -> None:
    batch, gradients, loss = responses(low, high, weights=weights)
    result = cispo_loss(batch, clip_low=low, clip_high=high)
    result.loss_sum.backward()
    grad = batch.logprobs.grad
    assert grad is not None
    assert result.loss_sum.item() == pytest.approx(loss)
    assert grad[batch.loss_mask.bool()].tolist() == pytest.approx(gradients)
    assert not grad[~batch.loss_mask.bool()].any()
    assert result.denominator.item() == 6
    ratio = (batch.logprobs - batch.old_logprobs).exp()[batch.loss_mask.bool()]
    assert result.metrics["clipped_high"].item() == int((ratio > 1 + high).sum())
    assert result.metrics["clipped_low"].item() == int((ratio < 1 - low).sum())


def test_in_the_first_update_cispo_has_the_gradient_of_dapo() -> None:
    batch, *_ = responses(0.2, 0.28, weights=False)
    first = PolicyBatch(batch.logprobs, batch.logprobs.detach(), batch.advantages, batch.loss_mask)
    found = [
        torch.autograd.grad(loss(first, clip_low=0.2, clip_high=0.28).loss_sum, batch.logprobs)[0]
        for loss in (cispo_loss, dapo_loss)
    ]
    torch.testing.assert_close(*found)


def test_cispo_may_have_no_lower_bound_and_the_others_must() -> None:
    batch, *_ = responses(1.0, 0.28, weights=False)
    cispo_loss(batch, clip_low=1.0, clip_high=0.28)
    with pytest.raises(UserError, match=r"clip_low 1\.1"):
        cispo_loss(batch, clip_low=1.1, clip_high=0.28)
    with pytest.raises(UserError, match=r"clip_low 1\.0"):
        dapo_loss(batch, clip_low=1.0, clip_high=0.28)


def test_a_batchs_scale_does_not_blow_up_prompts_that_are_nearly_solved() -> None:
    rewards, groups = [1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1, 2, 2]
    means = [0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 1.0, 1.0]
    deviation = statistics.stdev(rewards)
    expected = [(reward - mean) / (deviation + 1e-4) for reward, mean in zip(rewards, means, strict=True)]
    given = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    found = batch_advantages(*given)
    assert found.tolist() == pytest.approx(expected)
    assert found[6:].tolist() == [0.0, 0.0]
    by_group = group_advantages(*given)
    assert by_group[3] / by_group[5] > found[3] / found[5]
    assert batch_advantages(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]
    assert batch_advantages(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])).tolist() == [0.0] * 4


def test_tokens_that_the_engines_disagree_about_are_left_out() -> None:
    """Ratios 2, 1/2, 6 and 0.4 within [0.5, 5]: the bounds belong to it, and what is outside weighs nothing."""
    trainer = torch.tensor([[0.5, 0.1, 0.6, 0.2]], dtype=torch.float64).log().requires_grad_()
    sampler = torch.tensor([[0.25, 0.2, 0.1, 0.5]], dtype=torch.float64).log()
    weights = masked_importance_weights(trainer, sampler, low=0.5 - 1e-9, high=5.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 0.0, 0.0]], dtype=torch.float64))
    assert not weights.requires_grad


def test_a_response_that_the_engines_disagree_about_is_left_out_whole() -> None:
    """Products 2 x 1/2 x 3 = 3, 1/4 x 1/2 = 1/8 and 4; what is outside of the mask has no say."""
    ratios = torch.tensor([[2.0, 0.5, 3.0], [0.25, 0.5, 9.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    weights = sequence_masked_weights(ratios.log(), torch.zeros(3, 3, dtype=torch.float64), mask, low=0.5, high=3.5)
    torch.testing.assert_close(weights[:, 0], torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))
    assert (weights == weights[:, :1]).all()


@pytest.mark.parametrize(("low", "high"), [(1.1, 2.0), (0.5, 0.9), (-0.1, 2.0), (0.5, float("nan"))])
def test_bounds_that_leave_out_equal_engines_are_refused(low: float, high: float) -> None:
    values = torch.zeros(1, 2)
    with pytest.raises(UserError, match="low"):
        masked_importance_weights(values, values, low=low, high=high)
    with pytest.raises(UserError, match="low"):
        sequence_masked_weights(values, values, torch.ones(1, 2), low=low, high=high)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_apo_by_hand_and_by_its_gradients(beta: float) -> None:
    """With s = sigma(beta r): d apo_zero is -beta s (1 - s) on the chosen side, beta s (1 - s) on the other."""
    sides = [
        torch.tensor(values, dtype=torch.float64)
        for values in ([-1.0, -3.0], [-2.0, -1.0], [-1.5, -2.0], [-1.0, -2.5])
    ]
    chosen, rejected = sides[0].requires_grad_(), sides[1].requires_grad_()
    ratios = [(float(w - rw), float(l - rl)) for w, l, rw, rl in zip(*sides, strict=True)]
    zero, metrics = apo_zero_loss(chosen, rejected, sides[2], sides[3], beta)
    assert zero.item() == pytest.approx(sum(1 - sigmoid(beta * w) + sigmoid(beta * l) for w, l in ratios))
    grads = torch.autograd.grad(zero, [chosen, rejected])
    expected = [[-beta * sigmoid(beta * w) * sigmoid(-beta * w) for w, _ in ratios]]
    expected += [[beta * sigmoid(beta * l) * sigmoid(-beta * l) for _, l in ratios]]
    assert [grad.tolist() for grad in grads] == [pytest.approx(side) for side in expected]
    assert metrics["accuracy"].item() == sum(w > l for w, l in ratios)
    down, _ = apo_down_loss(chosen, rejected, sides[2], sides[3], beta)
    assert down.item() == pytest.approx(sum(sigmoid(beta * w) + 1 - sigmoid(beta * (w - l)) for w, l in ratios))
    for loss in (apo_zero_loss, apo_down_loss):
        assert loss(sides[2], sides[3], sides[2], sides[3], beta)[0].item() == pytest.approx(2.0)
