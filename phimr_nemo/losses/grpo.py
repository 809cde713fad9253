"""Policy-gradient losses over groups of sampled responses: one function per published normalisation.

For token t of response i (of S responses, response i having |o_i| tokens and advantage A_i):

    ratio   rho_it = pi(o_it) / pi_old(o_it)
    clipped c_it   = -w_it min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i)
    kl      k_it   = exp(q) - q - 1,  q = log ref(o_it) - log pi(o_it)          (Schulman's k3 estimator)
                     or rho_it times that                                      (``importance_weighted_k3_kl``)
    token loss     l_it = c_it + kl_coefficient k_it - entropy_bonus H_it

H_it is the entropy of the policy at the token (nats); every loss weighs it as it weighs the token. w_it are
optional weights against a mismatch of sampler and trainer (:mod:`phimr_nemo.losses.mismatch`). All functions return
sums together with the denominator that goes with them, to be added up over micro-batches and data-parallel ranks
before the division:

    grpo_loss      sum_i (1/|o_i|) sum_t l_it     over responses               DeepSeekMath, arXiv 2402.03300 eq. 3
    dr_grpo_loss   sum_it l_it                    over responses * max length  Dr. GRPO, arXiv 2503.20783
    dapo_loss      sum_it l_it                    over tokens                  DAPO, arXiv 2503.14476 eq. 8
    gspo_loss      as grpo_loss, but with one ratio per response               GSPO, arXiv 2507.18071 eq. 5
    cispo_loss     as dapo_loss, but the clip is on a weight of log pi         CISPO, arXiv 2506.13585

Token tensors are [S, T] with a mask; what they hold outside the mask does not matter. Responses without any
token in the mask (padding rows, overlong responses masked out) count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses.sequences import LOG_RATIO_LIMIT, bounded_exp, check_positive, check_token_shapes

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "PolicyBatch",
    "PolicyLoss",
    "cispo_loss",
    "dapo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "gspo_loss",
    "importance_weighted_k3_kl",
    "k3_kl",
]


class PolicyLoss(NamedTuple):
    """A sum, what to divide it by, and sums to log.

    ``metrics``, without gradient: tokens and sequences (counts); ratio (sum of rho over tokens); clipped_low
    and clipped_high (numbers of tokens whose gradient the lower or upper clip removes; for GSPO tokens of such
    responses); kl_to_old (sum over tokens of k3 for KL(old || pi), the tokens being the old policy's);
    kl_to_reference (the penalty's estimate, only with reference log-probabilities); entropy (sum of the
    policy's, only with entropies).
    """

    loss_sum: Tensor
    denominator: Tensor
    metrics: dict[str, Tensor]


def k3_kl(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || other) from samples of pi: k3 = exp(q) - q - 1, q = log other - log pi.

    Source: Schulman 2020, "Approximating KL Divergence"; DeepSeekMath eq. 4. Never negative.

    Of what it is unbiased, for a token's distribution given the tokens before it:

    - Its *value* is that of KL(pi || other), on tokens drawn from pi.
    - Its *gradient* is that of the other direction, KL(other || pi), on tokens drawn from pi: the sampling
      distribution depends on pi too, and autograd does not see that. E_pi[dk3] = -E_other[d log pi].
    - On tokens of an older policy it is unbiased of neither.

    ``importance_weighted_k3_kl`` has the value and the gradient of KL(pi || other), on and off policy.

    Args:
        logprobs: log pi of the sampled tokens, any shape.
        other_logprobs: log-probabilities of the same tokens under the other distribution.

    Returns:
        Tensor of the same shape, nats.
    """
    q = (other_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(q) - q


def importance_weighted_k3_kl(logprobs: Tensor, other_logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """rho k3 with rho = pi / sampled: unbiased of KL(pi || other) in its value *and* in its gradient.

    Source: DeepSeek-V3.2 (arXiv 2512.02556, "unbiased KL estimate"); TRL's
    ``use_bias_correction_kl``. The gradient flows through rho: d(rho k3) = rho log(pi / other) d log pi, whose mean
    over tokens of the sampled policy is d KL(pi || other). On policy rho is 1 in value, and the gradient still
    differs from that of ``k3_kl``. The distribution of the tokens before it is taken as it was sampled.

    Args:
        logprobs: log pi of the sampled tokens, any shape.
        other_logprobs: log-probabilities of the same tokens under the other distribution.
        sampled_logprobs: and under the policy that they were drawn from; constant.

    Returns:
        Tensor of the same shape, nats.
    """
    return bounded_exp(logprobs - sampled_logprobs.detach()) * k3_kl(logprobs, other_logprobs)


@dataclass(frozen=True)
class PolicyBatch:
    """The token tensors of S sampled responses, as every loss of this module takes them.

    Attributes:
        logprobs: [S, T] log pi of the sampled tokens (nats, at the sampling temperature), with gradient.
        old_logprobs: [S, T] of the policy at the start of the round; in the first update of a round
            ``logprobs.detach()``, which makes the ratio 1 and the gradient the plain policy gradient.
        advantages: [S] one per response, or [S, T] one per token; constants.
        loss_mask: [S, T], nonzero at response tokens.
        ref_logprobs: [S, T] of the reference policy, needed when a loss's kl_coefficient > 0.
        importance_weights: [S, T] constants that multiply the clipped term only.
        entropy: [S, T] of the policy at each token (nats), with gradient; needed when a loss's entropy_bonus > 0.

    Raises:
        UserError: shapes that do not fit.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def token_advantages(self) -> Tensor:
        """[S, 1] or [S, T]: each token's."""
        return self.advantages if self.advantages.ndim == 2 else self.advantages.unsqueeze(1)

    def __post_init__(self) -> None:
        check_token_shapes(
            self.logprobs,
            old_logprobs=self.old_logprobs,
            loss_mask=self.loss_mask,
            ref_logprobs=self.ref_logprobs,
            importance_weights=self.importance_weights,
            entropy=self.entropy,
        )
        if self.advantages.shape not in (self.logprobs.shape[:1], self.logprobs.shape):
            raise UserError(
                f"advantages {tuple(self.advantages.shape)} do not fit log-probs {tuple(self.logprobs.shape)}",
                rule="one advantage per response, [S] for [S, T], or one per token, [S, T]",
                remedy="compute them with group_advantages from one reward per response",
            )


def grpo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, **penalty: Unpack[Penalty]) -> PolicyLoss:
    """GRPO: every response weighs the same; sum of each response's mean token loss, over responses.

    Args:
        batch: the responses.
        clip_low: the ratio is clipped below at 1 - clip_low; 0 <= clip_low < 1.
        clip_high: and above at 1 + clip_high; >= 0 (DAPO's "clip higher" when larger than clip_low).
        penalty: see ``Penalty``.

    Returns:
        PolicyLoss with the number of responses as its denominator.

    Raises:
        UserError: clip bounds or coefficient out of range, coefficient without reference.

    >>> logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    >>> batch = PolicyBatch(logprobs, logprobs, torch.tensor([1.0, -0.5]), torch.tensor([[1, 1], [1, 0]]))
    >>> loss = grpo_loss(batch, clip_low=0.2, clip_high=0.2)  # at ratio 1 a response's loss is minus its advantage
    >>> loss[0].item(), loss[1].item()
    (-0.5, 2)
    """
    tokens = _token_losses(batch, clip_low, clip_high, penalty)
    return PolicyLoss(_sum_of_means(tokens.losses, tokens.mask), tokens.metrics["sequences"], tokens.metrics)


def dr_grpo_loss(
    batch: PolicyBatch,
    *,
    clip_low: float,
    clip_high: float,
    max_new_tokens: int,
    **penalty: Unpack[Penalty],
) -> PolicyLoss:
    """Dr. GRPO: every token weighs 1 / (responses * max_new_tokens), so length is neither paid nor punished.

    To be used with ``centered_advantages``.

    Args:
        batch, clip_low, clip_high, penalty: as in ``grpo_loss``.
        max_new_tokens: the constant that stands for the length, the budget of generation; >= 1.

    Returns:
        PolicyLoss with responses * max_new_tokens as its denominator.

    Raises:
        UserError: as ``grpo_loss``; max_new_tokens < 1.
    """
    check_positive("max_new_tokens", max_new_tokens)
    tokens = _token_losses(batch, clip_low, clip_high, penalty)
    return PolicyLoss(tokens.losses.sum(), tokens.metrics["sequences"] * max_new_tokens, tokens.metrics)


def dapo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, **penalty: Unpack[Penalty]) -> PolicyLoss:
    """DAPO: every token weighs the same; sum of token losses, over tokens.

    Args:
        batch, clip_low, clip_high, penalty: as in ``grpo_loss``.

    Returns:
        PolicyLoss with the number of tokens as its denominator.

    Raises:
        UserError: as ``grpo_loss``.
    """
    tokens = _token_losses(batch, clip_low, clip_high, penalty)
    return PolicyLoss(tokens.losses.sum(), tokens.metrics["tokens"], tokens.metrics)


def gspo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, **penalty: Unpack[Penalty]) -> PolicyLoss:
    """GSPO: the ratio of a response is the geometric mean of its tokens' ratios, clipped as a whole.

    s_i = exp((1/|o_i|) sum_t log rho_it); its loss -min(s_i A_i, clip(s_i) A_i), weighted by the response's mean
    importance weight, plus the mean k3 term. The clip range is three orders narrower than GRPO's (the paper
    uses 3e-4 and 4e-4).

    Args:
        batch, clip_low, clip_high, penalty: as in ``grpo_loss``.

    Returns:
        PolicyLoss with the number of responses as its denominator.

    Raises:
        UserError: as ``grpo_loss``.
    """
    _check_options(batch, clip_low, clip_high, penalty)
    log_ratio = _log_ratio(batch)
    lengths = batch.loss_mask.bool().sum(dim=1, keepdim=True).clamp(min=1)
    # Every token carries its response's ratio, so the per-token arithmetic below is the per-response one.
    of_response = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(log_ratio)
    tokens = _add_penalty(_clipped_tokens(batch, of_response, clip_low, clip_high), batch, penalty)
    return PolicyLoss(_sum_of_means(tokens.losses, tokens.mask), tokens.metrics["sequences"], tokens.metrics)


def cispo_loss(batch: PolicyBatch, *, clip_low: float, clip_high: float, **penalty: Unpack[Penalty]) -> PolicyLoss:
    """CISPO: c_it = -w_it sg(clip(rho_it)) A_i log pi(o_it), over tokens: no token loses its gradient to the clip.

    Source: MiniMax-M1 (arXiv 2506.13585), which sets no lower bound (clip_low 1); ScaleRL (arXiv 2510.13786).
    TRL's ``loss_type="cispo"`` has 1 + clip_high as its ``epsilon_high``. Where the ratio is 1 the gradient is
    that of ``dapo_loss``; its value is another, and 0 says nothing.

    Args:
        batch, penalty: as in ``grpo_loss``.
        clip_low: the weight is clipped below at 1 - clip_low; 0 <= clip_low <= 1, and 1 is no bound.
        clip_high: and above at 1 + clip_high.

    Returns:
        PolicyLoss with the number of tokens as its denominator; its metrics clipped_low and clipped_high are tokens
        whose weight is clipped.

    Raises:
        UserError: as ``grpo_loss``.
    """
    _check_options(batch, clip_low, clip_high, penalty, largest_low=1.0)
    clipped = _clipped_tokens(batch, _log_ratio(batch), clip_low, clip_high)
    ratio = bounded_exp(_log_ratio(batch)).detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if batch.importance_weights is not None:
        weight = weight * batch.importance_weights.detach()
    losses = -weight * batch.token_advantages * batch.logprobs
    metrics = clipped.metrics | {
        "clipped_low": (clipped.mask & (ratio < 1.0 - clip_low)).sum(),
        "clipped_high": (clipped.mask & (ratio > 1.0 + clip_high)).sum(),
    }
    masked = _TokenLosses(torch.where(clipped.mask, losses, 0.0), clipped.mask, metrics)
    tokens = _add_penalty(masked, batch, penalty)
    return PolicyLoss(tokens.losses.sum(), tokens.metrics["tokens"], tokens.metrics)


class Penalty(TypedDict, total=False):
    """What every loss adds to each token's, weighed as it weighs the token; each is 0 or False by default.

    Attributes:
        kl_coefficient: weight of the k3 term.
        weighted_kl: the term is ``importance_weighted_k3_kl``, else ``k3_kl``.
        entropy_bonus: weight of the entropy, which the loss then raises.
    """

    kl_coefficient: float
    weighted_kl: bool
    entropy_bonus: float


class _TokenLosses(NamedTuple):
    losses: Tensor  # [S, T], 0 outside the mask
    mask: Tensor  # [S, T] bool
    metrics: dict[str, Tensor]


def _token_losses(batch: PolicyBatch, clip_low: float, clip_high: float, penalty: Penalty) -> _TokenLosses:
    _check_options(batch, clip_low, clip_high, penalty)
    tokens = _clipped_tokens(batch, _log_ratio(batch), clip_low, clip_high)
    return _add_penalty(tokens, batch, penalty)


def _log_ratio(batch: PolicyBatch) -> Tensor:
    return torch.where(batch.loss_mask.bool(), batch.logprobs - batch.old_logprobs, 0.0)


def _clipped_tokens(batch: PolicyBatch, log_ratio: Tensor, clip_low: float, clip_high: float) -> _TokenLosses:
    mask = batch.loss_mask.bool()
    ratio = bounded_exp(log_ratio)
    advantage = batch.token_advantages
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


def _add_penalty(tokens: _TokenLosses, batch: PolicyBatch, penalty: Penalty) -> _TokenLosses:
    losses, metrics = tokens.losses, tokens.metrics
    if batch.entropy is not None:
        entropy = torch.where(tokens.mask, batch.entropy, 0.0)
        losses = losses - penalty.get("entropy_bonus", 0.0) * entropy
        metrics = metrics | {"entropy": entropy.detach().sum()}
    if batch.ref_logprobs is not None:
        # Masked before the exponential: garbage under the mask must not reach the gradient as 0 * inf.
        policy, reference, sampled = (
            torch.where(tokens.mask, values, 0.0)
            for values in (batch.logprobs, batch.ref_logprobs, batch.old_logprobs)
        )
        weighted = penalty.get("weighted_kl", False)
        kl = importance_weighted_k3_kl(policy, reference, sampled) if weighted else k3_kl(policy, reference)
        losses = losses + penalty.get("kl_coefficient", 0.0) * kl
        metrics = metrics | {"kl_to_reference": kl.detach().sum()}
    return _TokenLosses(losses, tokens.mask, metrics)


def _sum_of_means(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()


def _check_options(
    batch: PolicyBatch, clip_low: float, clip_high: float, penalty: Penalty, largest_low: float = 0.0
) -> None:
    if not (0.0 <= clip_low < 1.0 or clip_low == largest_low) or not clip_high >= 0.0:
        raise UserError(
            f"clip_low {clip_low}, clip_high {clip_high}",
            rule="0 <= clip_low < 1 (CISPO: <= 1) and clip_high >= 0",
            remedy="they are distances from a ratio of 1, for instance 0.2 and 0.28",
        )
    kl_coefficient, entropy_bonus = penalty.get("kl_coefficient", 0.0), penalty.get("entropy_bonus", 0.0)
    if not kl_coefficient >= 0.0 or (kl_coefficient > 0.0 and batch.ref_logprobs is None):
        raise UserError(
            f"kl_coefficient {kl_coefficient} {'without' if batch.ref_logprobs is None else 'with'} a reference",
            rule="kl_coefficient >= 0, and reference log-probabilities when it is positive",
            remedy="pass ref_logprobs or set the coefficient to 0",
        )
    if not entropy_bonus >= 0.0 or (entropy_bonus > 0.0 and batch.entropy is None):
        raise UserError(
            f"entropy_bonus {entropy_bonus} {'without' if batch.entropy is None else 'with'} entropies",
            rule="entropy_bonus >= 0, and the policy's entropies when it is positive",
            remedy="pass entropy or set the bonus to 0",
        )
