"""Preference losses on summed log-probabilities of pairs: one function per published loss.

With w the chosen and l the rejected response to a question x, every function starts from the log-ratios

    r_w = log pi(w|x) - log ref(w|x),    r_l = log pi(l|x) - log ref(l|x)        (nats, summed over tokens)

and returns (sum over pairs, metrics). The metrics are sums over pairs too, without gradient; divide loss and
metrics by the number of pairs of the global batch (``metrics["pairs"]``, summed over micro-batches and ranks).
Metrics: pairs; accuracy (beta r_w > beta r_l, so ties are 0); chosen_reward = beta r_w, rejected_reward =
beta r_l, margin = their difference; chosen_logprob and rejected_logprob (to see likelihood displacement).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from phimr_nemo.errors import UserError
from phimr_nemo.losses.sequences import check_positive, check_sequence_shapes

__all__ = [
    "apo_down_loss",
    "apo_zero_loss",
    "dpo_loss",
    "ipo_loss",
    "label_smoothed_dpo_loss",
    "length_normalized_dpo_loss",
    "length_normalized_ipo_loss",
    "rpo_loss",
]

Metrics = dict[str, Tensor]

MAX_LABEL_SMOOTHING = 0.5
"""At one half a pair says nothing about which side is better."""


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """Sigmoid DPO: sum over pairs of -log sigma(beta (r_w - r_l)).

    Source: Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); the paper's stage 3 uses it as it is. Equal policy
    and reference give ln 2 per pair; dL/d r_w = -beta sigma(-beta (r_w - r_l)) = -dL/d r_l.

    Args:
        chosen: [n] log pi(w|x) in nats, summed over the response's tokens.
        rejected: [n] log pi(l|x).
        ref_chosen: [n] log ref(w|x).
        ref_rejected: [n] log ref(l|x).
        beta: strength of the tie to the reference, > 0.

    Returns:
        (loss_sum [], metrics: sums over pairs, see the module).

    Raises:
        UserError: shapes that differ, beta <= 0.

    >>> same = torch.tensor([-5.0, -7.0])
    >>> loss, metrics = dpo_loss(same, same, same, same, beta=0.1)
    >>> f"{(loss / metrics['pairs']).item():.4f}"  # ln 2 while policy and reference are equal
    '0.6931'
    """
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    losses = -logsigmoid(beta * (ratio_chosen - ratio_rejected))
    return losses.sum(), _metrics(chosen, rejected, beta * ratio_chosen, beta * ratio_rejected)


def label_smoothed_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Metrics]:
    """Conservative DPO: sum of -(1 - e) log sigma(d) - e log sigma(-d), d = beta (r_w - r_l).

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO", eq. 3: e is the
    probability that a pair's labels are swapped. The minimum is at d = log((1 - e) / e), not at infinity.

    Args:
        chosen: as in ``dpo_loss``, like rejected, ref_chosen, ref_rejected and beta.
        label_smoothing: e, 0 <= e < 0.5.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``; e out of range.
    """
    if not 0.0 <= label_smoothing < MAX_LABEL_SMOOTHING:
        raise UserError(
            f"label_smoothing {label_smoothing}",
            rule=f"0 <= label_smoothing < {MAX_LABEL_SMOOTHING}",
            remedy="it is the share of pairs whose chosen and rejected are swapped by mistake",
        )
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    delta = beta * (ratio_chosen - ratio_rejected)
    losses = -(1.0 - label_smoothing) * logsigmoid(delta) - label_smoothing * logsigmoid(-delta)
    return losses.sum(), _metrics(chosen, rejected, beta * ratio_chosen, beta * ratio_rejected)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """IPO: sum of (r_w - r_l - 1 / (2 beta))^2.

    Source: Azar et al. 2023 (arXiv 2310.12036, eq. 17; tau there is beta here). TRL applies it to log-ratios
    per token: that is ``length_normalized_ipo_loss``.

    Args:
        chosen: as in ``dpo_loss``, like rejected, ref_chosen, ref_rejected and beta.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``.
    """
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    losses = (ratio_chosen - ratio_rejected - 1.0 / (2.0 * beta)).square()
    return losses.sum(), _metrics(chosen, rejected, beta * ratio_chosen, beta * ratio_rejected)


def apo_zero_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """APO-zero: sum of (1 - sigma(beta r_w)) + sigma(beta r_l), which anchors each side at the reference.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization (arXiv 2408.06266, eq. 7); SmolLM3's stage of
    preferences. For chosen responses that are better than the model's own: their likelihood rises, that of the
    rejected ones falls, whatever the other side does. Equal policy and reference give 1 per pair.

    Args:
        chosen: as in ``dpo_loss``, like rejected, ref_chosen, ref_rejected and beta.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``.
    """
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    losses = (-beta * ratio_chosen).sigmoid() + (beta * ratio_rejected).sigmoid()
    return losses.sum(), _metrics(chosen, rejected, beta * ratio_chosen, beta * ratio_rejected)


def apo_down_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Metrics]:
    """APO-down: sum of sigma(beta r_w) + 1 - sigma(beta (r_w - r_l)).

    Source: arXiv 2408.06266, eq. 8. For chosen responses that are worse than the model's own: both sides' likelihood
    falls, that of the rejected ones more. Equal policy and reference give 1 per pair.

    Args:
        chosen: as in ``dpo_loss``, like rejected, ref_chosen, ref_rejected and beta.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``.
    """
    ratio_chosen, ratio_rejected = _log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta)
    losses = (beta * ratio_chosen).sigmoid() + (-beta * (ratio_chosen - ratio_rejected)).sigmoid()
    return losses.sum(), _metrics(chosen, rejected, beta * ratio_chosen, beta * ratio_rejected)


def length_normalized_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> tuple[Tensor, Metrics]:
    """DPO on log-ratios per token: sum of -log sigma(beta (r_w / |w| - r_l / |l|)).

    Source: Lambert et al. 2024, Tulu 3 (arXiv 2411.15124, eq. 6). It removes the reward for mere length;
    usual beta is ten or more times that of ``dpo_loss``. Reward metrics are per token as well.

    Args:
        chosen: as in ``dpo_loss``, like rejected, ref_chosen, ref_rejected and beta.
        chosen_tokens: [n] number of tokens summed in ``chosen``.
        rejected_tokens: [n] number of tokens summed in ``rejected``.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``.
    """
    per_token = _per_token(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    return dpo_loss(*per_token, beta)


def length_normalized_ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> tuple[Tensor, Metrics]:
    """IPO on log-ratios per token, as TRL's ``loss_type="ipo"``: sum of (r_w / |w| - r_l / |l| - 1 / (2 beta))^2.

    Source: eq. 17 of arXiv 2310.12036 with the length normalisation its authors recommended to TRL.

    Args:
        chosen: as in ``length_normalized_dpo_loss``, like all others.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``.
    """
    per_token = _per_token(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    return ipo_loss(*per_token, beta)


def rpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    chosen_tokens: Tensor,
    nll_weight: float,
) -> tuple[Tensor, Metrics]:
    """DPO with the chosen response's likelihood held up: sum of dpo - alpha log pi(w|x) / |w|.

    Source: Pang et al. 2024, Iterative Reasoning Preference Optimization (arXiv 2404.19733, eq. 1), which
    averages the second term over each sequence's tokens, as here. TRL's ``rpo_alpha`` averages it over the
    tokens of the whole batch instead. Metrics gain ``nll``, the sum of -log pi(w|x) / |w|.

    Args:
        chosen: as in ``dpo_loss``, like rejected, ref_chosen, ref_rejected and beta.
        chosen_tokens: [n] number of tokens summed in ``chosen``.
        nll_weight: alpha, > 0.

    Returns:
        As ``dpo_loss``.

    Raises:
        UserError: as ``dpo_loss``; alpha <= 0.
    """
    check_positive("nll_weight", nll_weight)
    check_sequence_shapes(chosen, chosen_tokens=chosen_tokens)
    preference, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    nll = -(chosen / chosen_tokens).sum()
    return preference + nll_weight * nll, metrics | {"nll": nll.detach()}


def _log_ratios(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    check_positive("beta", beta)
    check_sequence_shapes(chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return chosen - ref_chosen, rejected - ref_rejected


def _per_token(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_sequence_shapes(chosen, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)
    check_sequence_shapes(chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return (
        chosen / chosen_tokens,
        rejected / rejected_tokens,
        ref_chosen / chosen_tokens,
        ref_rejected / rejected_tokens,
    )


@torch.no_grad()
def _metrics(chosen: Tensor, rejected: Tensor, chosen_reward: Tensor, rejected_reward: Tensor) -> Metrics:
    return {
        "pairs": torch.tensor(chosen.numel(), device=chosen.device),
        "accuracy": (chosen_reward > rejected_reward).sum(),
        "margin": (chosen_reward - rejected_reward).sum(),
        "chosen_reward": chosen_reward.sum(),
        "rejected_reward": rejected_reward.sum(),
        "chosen_logprob": chosen.sum(),
        "rejected_logprob": rejected.sum(),
    }
