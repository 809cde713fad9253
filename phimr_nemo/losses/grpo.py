"""Policy-gradient losses over groups of sampled responses: one function per published normalisation.

For token t of response i (of S responses, response i having |o_i| tokens and advantage A_i):

    ratio   rho_it = pi(o_it) / pi_old(o_it)
    clipped c_it   = -w_it min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i)
    kl      k_it   = exp(q) - q - 1,  q = log ref(o_it) - log pi(o_it)          (Schulman's k3 estimator)
    token loss     l_it = c_it + kl_coefficient k_it

w_it are optional weights against a mismatch of sampler and trainer (``truncated_importance_weights``). All
functions return sums together with the denominator that goes with them, to be added up over micro-batches and
data-parallel ranks before the division:

    grpo_loss      sum_i (1/|o_i|) sum_t l_it     over responses               DeepSeekMath, arXiv 2402.03300 eq. 3
    dr_grpo_loss   sum_it l_it                    over responses * max length  Dr. GRPO, arXiv 2503.20783
    dapo_loss      sum_it l_it                    over tokens                  DAPO, arXiv 2503.14476 eq. 8
    gspo_loss      as grpo_loss, but with one ratio per response               GSPO, arXiv 2507.18071 eq. 5

Token tensors are [S, T] with a mask; what they hold outside the mask does not matter. Responses without any
token in the mask (padding rows, overlong responses masked out) count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses.sequences import check_positive, check_token_shapes

__all__ = [
    "PolicyBatch",
    "PolicyLoss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "gspo_loss",
    "k3_kl",
    "truncated_importance_weights",
]

LOG_RATIO_LIMIT = 20.0
"""Beyond it (a factor 5e8) exp would soon overflow float32; such a token gets no gradient."""


class PolicyLoss(NamedTuple):
    """A sum, what to divide it by, and sums to log.

    ``metrics``, without gradient: tokens and sequences (counts); ratio (sum of rho over tokens); clipped_low
    and clipped_high (numbers of tokens whose gradient the lower or upper clip removes; for GSPO tokens of such
    responses); kl_to_old (sum over tokens of k3 for KL(old || pi), the tokens being the old policy's);
    kl_to_reference (k3 for KL(pi || ref), only with reference log-probabilities).
    """

    loss_sum: Tensor
    denominator: Tensor
    metrics: dict[str, Tensor]


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
        return _bounded_exp(trainer_logprobs - sampler_logprobs).clamp(max=cap)


def k3_kl(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || other) from samples of pi: exp(q) - q - 1, q = log other - log pi.

    Source: Schulman 2020, "Approximating KL Divergence"; DeepSeekMath eq. 4. Never negative, and unbiased.

    Args:
        logprobs: log pi of the sampled tokens, any shape.
        other_logprobs: log-probabilities of the same tokens under the other distribution.

    Returns:
        Tensor of the same shape, nats.
    """
    q = (other_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(q) - q


@dataclass(frozen=True)
class PolicyBatch:
    """The token tensors of S sampled responses, as every loss of this module takes them.

    Attributes:
        logprobs: [S, T] log pi of the sampled tokens (nats, at the sampling temperature), with gradient.
        old_logprobs: [S, T] of the policy at the start of the round; in the first update of a round
            ``logprobs.detach()``, which makes the ratio 1 and the gradient the plain policy gradient.
        advantages: [S] one per response.
        loss_mask: [S, T], nonzero at response tokens.
        ref_logprobs: [S, T] of the reference policy, needed when a loss's kl_coefficient > 0.
        importance_weights: [S, T] constants that multiply the clipped term only.

    Raises:
        UserError: shapes that do not fit.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None

    def __post_init__(self) -> None:
        check_token_shapes(
            self.logprobs,
            old_logprobs=self.old_logprobs,
            loss_mask=self.loss_mask,
            ref_logprobs=self.ref_logprobs,
            importance_weights=self.importance_weights,
        )
        if self.advantages.shape != self.logprobs.shape[:1]:
            raise UserError(
                f"advantages {tuple(self.advantages.shape)} do not fit log-probs {tuple(self.logprobs.shape)}",
                rule="one advantage per response: [S] for [S, T]",
                remedy="compute them with group_advantages from one reward per response",
            )


def grpo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, kl_coefficient: float = 0.0) -> PolicyLoss:
    """GRPO: every response weighs the same; sum of each response's mean token loss, over responses.

    Args:
        batch: the responses.
        clip_low: the ratio is clipped below at 1 - clip_low; 0 <= clip_low < 1.
        clip_high: and above at 1 + clip_high; >= 0 (DAPO's "clip higher" when larger than clip_low).
        kl_coefficient: weight of the k3 term; 0 leaves it out.

    Returns:
        PolicyLoss with the number of responses as its denominator.

    Raises:
        UserError: clip bounds or coefficient out of range, coefficient without reference.
    """
    tokens = _token_losses(batch, clip_low, clip_high, kl_coefficient)
    return PolicyLoss(_sum_of_means(tokens.losses, tokens.mask), tokens.metrics["sequences"], tokens.metrics)


def dr_grpo_loss(
    batch: PolicyBatch, *, clip_low: float, clip_high: float, max_new_tokens: int, kl_coefficient: float = 0.0
) -> PolicyLoss:
    """Dr. GRPO: every token weighs 1 / (responses * max_new_tokens), so length is neither paid nor punished.

    To be used with ``centered_advantages``.

    Args:
        batch, clip_low, clip_high, kl_coefficient: as in ``grpo_loss``.
        max_new_tokens: the constant that stands for the length, the budget of generation; >= 1.

    Returns:
        PolicyLoss with responses * max_new_tokens as its denominator.

    Raises:
        UserError: as ``grpo_loss``; max_new_tokens < 1.
    """
    check_positive("max_new_tokens", max_new_tokens)
    tokens = _token_losses(batch, clip_low, clip_high, kl_coefficient)
    return PolicyLoss(tokens.losses.sum(), tokens.metrics["sequences"] * max_new_tokens, tokens.metrics)


def dapo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, kl_coefficient: float = 0.0) -> PolicyLoss:
    """DAPO: every token weighs the same; sum of token losses, over tokens.

    Args:
        batch, clip_low, clip_high, kl_coefficient: as in ``grpo_loss``.

    Returns:
        PolicyLoss with the number of tokens as its denominator.

    Raises:
        UserError: as ``grpo_loss``.
    """
    tokens = _token_losses(batch, clip_low, clip_high, kl_coefficient)
    return PolicyLoss(tokens.losses.sum(), tokens.metrics["tokens"], tokens.metrics)


def gspo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, kl_coefficient: float = 0.0) -> PolicyLoss:
    """GSPO: the ratio of a response is the geometric mean of its tokens' ratios, clipped as a whole.

    s_i = exp((1/|o_i|) sum_t log rho_it); its loss -min(s_i A_i, clip(s_i) A_i), weighted by the response's mean
    importance weight, plus the mean k3 term. The clip range is three orders narrower than GRPO's (the paper
    uses 3e-4 and 4e-4).

    Args:
        batch, clip_low, clip_high, kl_coefficient: as in ``grpo_loss``.

    Returns:
        PolicyLoss with the number of responses as its denominator.

    Raises:
        UserError: as ``grpo_loss``.
    """
    _check_options(batch, clip_low, clip_high, kl_coefficient)
    log_ratio = _log_ratio(batch)
    lengths = batch.loss_mask.bool().sum(dim=1, keepdim=True).clamp(min=1)
    # Every token carries its response's ratio, so the per-token arithmetic below is the per-response one.
    of_response = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(log_ratio)
    tokens = _add_reference_kl(_clipped_tokens(batch, of_response, clip_low, clip_high), batch, kl_coefficient)
    return PolicyLoss(_sum_of_means(tokens.losses, tokens.mask), tokens.metrics["sequences"], tokens.metrics)


class _TokenLosses(NamedTuple):
    losses: Tensor  # [S, T], 0 outside the mask
    mask: Tensor  # [S, T] bool
    metrics: dict[str, Tensor]


def _token_losses(batch: PolicyBatch, clip_low: float, clip_high: float, kl_coefficient: float) -> _TokenLosses:
    _check_options(batch, clip_low, clip_high, kl_coefficient)
    tokens = _clipped_tokens(batch, _log_ratio(batch), clip_low, clip_high)
    return _add_reference_kl(tokens, batch, kl_coefficient)


def _log_ratio(batch: PolicyBatch) -> Tensor:
    return torch.where(batch.loss_mask.bool(), batch.logprobs - batch.old_logprobs, 0.0)


def _clipped_tokens(batch: PolicyBatch, log_ratio: Tensor, clip_low: float, clip_high: float) -> _TokenLosses:
    mask = batch.loss_mask.bool()
    ratio = _bounded_exp(log_ratio)
    advantage = batch.advantages.unsqueeze(1)
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
    if batch.importance_weights is not None:
        losses = losses * torch.where(mask, batch.importance_weights.detach(), 0.0)
    with torch.no_grad():
        kl_to_old = torch.where(mask, k3_kl(batch.old_logprobs, batch.logprobs), 0.0)
        metrics = {
            "tokens": mask.sum(),
            "sequences": mask.any(dim=1).sum(),
            "ratio": torch.where(mask, ratio, 0.0).sum(),
            "clipped_low": (mask & (ratio < 1.0 - clip_low) & (advantage < 0)).sum(),
            "clipped_high": (mask & (ratio > 1.0 + clip_high) & (advantage > 0)).sum(),
            "kl_to_old": kl_to_old.sum(),
        }
    return _TokenLosses(torch.where(mask, losses, 0.0), mask, metrics)


def _add_reference_kl(tokens: _TokenLosses, batch: PolicyBatch, kl_coefficient: float) -> _TokenLosses:
    if batch.ref_logprobs is None:
        return tokens
    # Masked before the exponential: garbage under the mask must not reach the gradient as 0 * inf.
    kl = k3_kl(torch.where(tokens.mask, batch.logprobs, 0.0), torch.where(tokens.mask, batch.ref_logprobs, 0.0))
    metrics = tokens.metrics | {"kl_to_reference": kl.detach().sum()}
    return _TokenLosses(tokens.losses + kl_coefficient * kl, tokens.mask, metrics)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _sum_of_means(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()


def _check_options(batch: PolicyBatch, clip_low: float, clip_high: float, kl_coefficient: float) -> None:
    if not 0.0 <= clip_low < 1.0 or not clip_high >= 0.0:
        raise UserError(
            f"clip_low {clip_low}, clip_high {clip_high}",
            rule="0 <= clip_low < 1 and clip_high >= 0",
            remedy="they are distances from a ratio of 1, for instance 0.2 and 0.28",
        )
    if not kl_coefficient >= 0.0 or (kl_coefficient > 0.0 and batch.ref_logprobs is None):
        raise UserError(
            f"kl_coefficient {kl_coefficient} {'without' if batch.ref_logprobs is None else 'with'} a reference",
            rule="kl_coefficient >= 0, and reference log-probabilities when it is positive",
            remedy="pass ref_logprobs or set the coefficient to 0",
        )
