"""What stage 3 optimises: a preference loss over pairs, in padded or packed micro-batches, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from phimr_nemo.align.microbatch import (
    MicroBatch,
    chunks_by_length,
    cut,
    packed_row,
    sequence_sums,
    trimmed_width,
    used_lengths,
)
from phimr_nemo.align.policy import LossSums
from phimr_nemo.config import DPOConfig
from phimr_nemo.config.dpo import PreferenceLoss, RPOLoss, SmoothedLoss
from phimr_nemo.data.packing import pack
from phimr_nemo.losses import (
    IGNORED_LABEL,
    apo_down_loss,
    apo_zero_loss,
    dpo_loss,
    ipo_loss,
    label_smoothed_dpo_loss,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    rpo_loss,
)
from phimr_nemo.losses.device import sent

MIN_SPREAD: Final = 1e-6
"""Margins (nats) that differ less have no correlation with anything: they are rounding."""


@dataclass(frozen=True)
class PairSums:
    """One number a pair, [n] each: log-probabilities of the responses (nats), and the tokens that they sum."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


PairLoss = Callable[[PairSums], tuple[Tensor, dict[str, Tensor]]]


def pair_loss(loss: PreferenceLoss, beta: float) -> PairLoss:
    """The configured function of :mod:`phimr_nemo.losses.dpo`.

    Args:
        loss: its kind and its own parameter.
        beta: strength of the tie to the reference.
    """
    if isinstance(loss, SmoothedLoss):
        return partial(_smoothed, beta=beta, label_smoothing=loss.label_smoothing)
    if isinstance(loss, RPOLoss):
        return partial(_rpo, beta=beta, nll_weight=loss.nll_weight)
    plain: Mapping[str, PairLoss] = {
        "dpo": lambda s: dpo_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta),
        "ipo": lambda s: ipo_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta),
        "apo_zero": lambda s: apo_zero_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta),
        "apo_down": lambda s: apo_down_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta),
        "length_normalized_dpo": lambda s: length_normalized_dpo_loss(
            s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta, s.chosen_tokens, s.rejected_tokens
        ),
        "length_normalized_ipo": lambda s: length_normalized_ipo_loss(
            s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta, s.chosen_tokens, s.rejected_tokens
        ),
    }
    return plain[loss.kind]


def _smoothed(s: PairSums, *, beta: float, label_smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
    return label_smoothed_dpo_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta, label_smoothing)


def _rpo(s: PairSums, *, beta: float, nll_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    return rpo_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, beta, s.chosen_tokens, nll_weight)


class DPOObjective:
    """The mean of a preference loss over the pairs of the global batch (paper, stage 3: sigmoid DPO).

    Args:
        config: loss, beta, micro-batch and packing.
        multiple: sequence lengths are multiples of this.
        pad_id: token of the padding.
    """

    def __init__(self, config: DPOConfig, *, multiple: int, pad_id: int) -> None:
        self._loss = pair_loss(config.loss, config.beta)
        self._packed, self._size = config.packed, config.micro_batch
        self._capacity = 2 * config.micro_batch * config.sequence_length
        self._multiple, self._pad_id = multiple, pad_id

    def micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Pairs of like length together in padded rows, or as many pairs in a packed row as it holds.

        Each micro-batch has the chosen sides first, then the rejected ones; `extras` have the numbers of its pairs
        in the batch, `pairs` [n], and once they are known the reference log-probabilities, `reference` [2 n].

        Args:
            batch: `chosen`, `rejected`, `chosen_labels`, `rejected_labels` int64 [b, s]; with the reference
                log-probabilities also `ref_policy_log_probs_chosen` and `_rejected` float32 [b].
        """
        sides = [used_lengths(batch["chosen_labels"]), used_lengths(batch["rejected_labels"])]
        if self._packed:
            rows = [torch.from_numpy(row) for row in pack((sides[0] + sides[1]).numpy(), self._capacity)]
            return [self._packed_micro_batch(batch, pairs, sides) for pairs in rows]
        longer = torch.maximum(*sides)
        return [
            self._padded_micro_batch(batch, pairs, longer[pairs]) for pairs in chunks_by_length(longer, self._size)
        ]

    def _padded_micro_batch(self, batch: Mapping[str, Tensor], pairs: Tensor, longer: Tensor) -> MicroBatch:
        columns = trimmed_width(longer, batch["chosen"].shape[1], self._multiple)
        tokens, labels = _both(batch, pairs, "{}"), _both(batch, pairs, "{}_labels")
        return MicroBatch(
            cut(tokens, columns, self._pad_id), cut(labels, columns, IGNORED_LABEL), _extras(batch, pairs)
        )

    def _packed_micro_batch(self, batch: Mapping[str, Tensor], pairs: Tensor, sides: list[Tensor]) -> MicroBatch:
        tokens, labels = _both(batch, pairs, "{}"), _both(batch, pairs, "{}_labels")
        lengths = [length for side in sides for length in side[pairs].tolist()]
        row, wanted, documents = packed_row(tokens, labels, lengths, multiple=self._multiple, pad_id=self._pad_id)
        return MicroBatch(row, wanted, _extras(batch, pairs), documents)

    @property
    def wants_entropy(self) -> bool:
        """No preference loss is one of entropies."""
        return False

    def loss(self, logprobs: Tensor, micro: MicroBatch, besides: Tensor | None = None, /) -> LossSums:  # noqa: ARG002
        """Loss and metrics summed over the micro-batch's pairs."""
        sums = pair_sums(logprobs, micro)
        loss, metrics = self._loss(sums)
        count = metrics.pop("pairs")
        return loss, count, metrics | _drift(sums)

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the pairs, and how closely the margin follows the difference in length."""
        pairs = sums["count"]
        means = {name: value / pairs for name, value in sums.items() if name != "count"}
        ratio, length = means.pop("ratio"), means["length_difference"]
        covariance = means.pop("ratio_length") - ratio * length
        variances = means.pop("ratio_squared") - ratio**2, means.pop("length_squared") - length**2
        means["length_margin_correlation"] = _correlation(covariance, *variances)
        return means


def pair_sums(logprobs: Tensor, micro: MicroBatch) -> PairSums:
    """From log-probabilities of tokens [b, s] to those of the micro-batch's responses."""
    reference = sent(micro.extras["reference"], logprobs.device)
    responses = len(reference)
    counted = sent(micro.labels != IGNORED_LABEL, logprobs.device)
    # A packed row may end with a document of padding.
    chosen, rejected = sequence_sums(logprobs, micro)[:responses].chunk(2)
    chosen_tokens, rejected_tokens = sequence_sums(counted, micro)[:responses].chunk(2)
    ref_chosen, ref_rejected = reference.chunk(2)
    return PairSums(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)


def _both(batch: Mapping[str, Tensor], pairs: Tensor, name: str) -> Tensor:
    return torch.cat([batch[name.format(side)][pairs] for side in ("chosen", "rejected")])


def _extras(batch: Mapping[str, Tensor], pairs: Tensor) -> dict[str, Tensor]:
    if "ref_policy_log_probs_chosen" not in batch:
        return {"pairs": pairs}
    return {"pairs": pairs, "reference": _both(batch, pairs, "ref_policy_log_probs_{}")}


@torch.no_grad()
def _drift(s: PairSums) -> dict[str, Tensor]:
    """Sums over pairs that tell how far the policy has gone from the reference, and whether it prefers length.

    With the log-ratios r of a pair's responses (nats):

    - `kl_to_reference`: -(r_w + r_l) / 2, nats a response. The pairs' responses are the reference's own rollouts, so
      its mean estimates KL(reference || policy) on them; selected as they are, it may be negative.
    - `chosen_shift`: r_w / |w|, nats a token: below 0 the policy takes probability from the chosen responses.
    - `length_difference`: |w| - |l|, tokens.
    - moments of r_w - r_l and of the length difference, for their correlation.
    """
    ratio_chosen, ratio_rejected = (s.chosen - s.ref_chosen).double(), (s.rejected - s.ref_rejected).double()
    ratio, length = ratio_chosen - ratio_rejected, (s.chosen_tokens - s.rejected_tokens).double()
    return {
        "kl_to_reference": -(ratio_chosen + ratio_rejected).sum() / 2,
        "chosen_shift": (ratio_chosen / s.chosen_tokens).sum(),
        "length_difference": length.sum(),
        "ratio": ratio.sum(),
        "ratio_squared": ratio.square().sum(),
        "length_squared": length.square().sum(),
        "ratio_length": (ratio * length).sum(),
    }


def _correlation(covariance: float, first_variance: float, second_variance: float) -> float:
    """Pearson's r; 0 where one of the two does not vary."""
    spreads = math.sqrt(max(first_variance, 0.0)), math.sqrt(max(second_variance, 0.0))
    return covariance / (spreads[0] * spreads[1]) if min(spreads) > MIN_SPREAD else 0.0
