"""Weights against a mismatch of sampler and trainer: the same weights in two engines, or weights some steps old.

With d_t = log pi_trainer(o_t) - log pi_sampler(o_t) of the tokens of a response, its own policy gradient wants the
product of the tokens' ratios, exp(sum_t d_t), as its weight. That is unbiased and of great variance; every function
here trades one for the other. All are constants to the gradient:

    truncated   min(exp(d_t), cap)                          a token each, biased, never 0
    masked      exp(d_t) where low <= exp(d_t) <= high, else 0      a token each (IcePop)
    sequence    exp(sum d) where low <= exp(sum d) <= high, else 0  a response each
"""

from __future__ import annotations

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses.sequences import bounded_exp, check_positive, check_token_shapes

__all__ = ["masked_importance_weights", "sequence_masked_weights", "truncated_importance_weights"]


def truncated_importance_weights(trainer_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap) per token, without gradient.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    (truncated importance sampling). Both log-probabilities belong to the same weights at the same
    temperature; what differs is the arithmetic of the two engines.

    Args:
        trainer_logprobs: [S, T] by the training engine, nats.
        sampler_logprobs: [S, T] by the sampling engine, nats.
        cap: largest weight, > 0.

    Returns:
        [S, T] weights in (0, cap].

    Raises:
        UserError: the shapes differ, cap <= 0.
    """
    check_token_shapes(trainer_logprobs, sampler_logprobs=sampler_logprobs)
    check_positive("cap", cap)
    with torch.no_grad():
        return bounded_exp(trainer_logprobs - sampler_logprobs).clamp(max=cap)


def masked_importance_weights(
    trainer_logprobs: Tensor, sampler_logprobs: Tensor, *, low: float, high: float
) -> Tensor:
    """pi_trainer / pi_sampler per token where it is in [low, high], and 0 elsewhere, without gradient.

    Source: IcePop (Ling Team 2025, arXiv 2510.18855); TRL's ``token_mask``. Where `truncated` keeps a
    token that the engines disagree about at the weight of the cap, this leaves it out.

    Args:
        trainer_logprobs: [S, T] by the training engine, nats.
        sampler_logprobs: [S, T] by the sampling engine, nats.
        low, high: the bounds, 0 <= low <= 1 <= high (0.5 and 5 in the paper).

    Returns:
        [S, T] weights, 0 or in [low, high].

    Raises:
        UserError: the shapes differ, bounds out of range.
    """
    check_token_shapes(trainer_logprobs, sampler_logprobs=sampler_logprobs)
    _check_bounds(low, high)
    with torch.no_grad():
        return _masked(bounded_exp(trainer_logprobs - sampler_logprobs), low, high)


def sequence_masked_weights(
    trainer_logprobs: Tensor, sampler_logprobs: Tensor, loss_mask: Tensor, *, low: float, high: float
) -> Tensor:
    """pi_trainer / pi_sampler of the whole response where it is in [low, high], and 0 elsewhere, without gradient.

    Within the bounds the weight is the unbiased one. Source: Liu and Li 2025, "When Speed Kills Stability" (masked
    importance sampling); TRL's ``sequence_mask``. The ratio of a long response is far from 1 for small differences.

    Args:
        trainer_logprobs: [S, T] by the training engine, nats.
        sampler_logprobs: [S, T] by the sampling engine, nats.
        loss_mask: [S, T], nonzero at response tokens.
        low, high: the bounds, 0 <= low <= 1 <= high.

    Returns:
        [S, T] weights, one value a response.

    Raises:
        UserError: the shapes differ, bounds out of range.
    """
    check_token_shapes(trainer_logprobs, sampler_logprobs=sampler_logprobs, loss_mask=loss_mask)
    _check_bounds(low, high)
    with torch.no_grad():
        difference = torch.where(loss_mask.bool(), trainer_logprobs - sampler_logprobs, 0.0)
        ratio = bounded_exp(difference.sum(dim=1, keepdim=True))
        return _masked(ratio, low, high).expand_as(trainer_logprobs)


def _masked(ratio: Tensor, low: float, high: float) -> Tensor:
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _check_bounds(low: float, high: float) -> None:
    if not 0.0 <= low <= 1.0 <= high:
        raise UserError(
            f"low {low}, high {high}",
            rule="0 <= low <= 1 <= high: a token that both engines find equally likely has the ratio 1",
            remedy="IcePop's bounds are 0.5 and 5",
        )
