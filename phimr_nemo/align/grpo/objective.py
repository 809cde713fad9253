"""What stage 4 optimises: a policy-gradient loss over the rows of a round, padded or packed, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from phimr_nemo.align.microbatch import (
    MicroBatch,
    by_sequence,
    chunks_by_length,
    cut,
    packed_row,
    trimmed_width,
    used_lengths,
)
from phimr_nemo.align.policy import LossSums
from phimr_nemo.config import GRPOConfig, RoundsConfig
from phimr_nemo.config.sampled.rounds import MaskedCorrection, SamplerCorrection, TruncatedCorrection
from phimr_nemo.data.packing import pack
from phimr_nemo.losses import (
    IGNORED_LABEL,
    PolicyBatch,
    PolicyLoss,
    batch_advantages,
    centered_advantages,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    masked_importance_weights,
    sequence_masked_weights,
    truncated_importance_weights,
)
from phimr_nemo.losses.device import sent

TOKEN_EXTRAS = ("sampler_logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs")

Advantages = Callable[[Tensor, Tensor], Tensor]


def policy_loss(config: GRPOConfig) -> Callable[..., PolicyLoss]:
    """The configured function of :mod:`phimr_nemo.losses.grpo`, with its clip range and KL weight."""
    functions: Mapping[str, Callable[..., PolicyLoss]] = {
        "grpo": grpo_loss,
        "dr_grpo": partial(dr_grpo_loss, max_new_tokens=config.max_new_tokens),
        "dapo": dapo_loss,
        "gspo": gspo_loss,
        "cispo": cispo_loss,
    }
    loss = config.loss
    return partial(
        functions[loss.kind],
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        kl_coefficient=config.kl,
        weighted_kl=config.kl_estimator == "importance_weighted_k3",
        entropy_bonus=config.entropy_bonus,
    )


def advantages_of(config: GRPOConfig) -> Advantages:
    """What the loss takes as advantages: rewards [S] and groups [S] -> [S]."""
    scale = config.advantage_scale or ("none" if config.loss.kind == "dr_grpo" else "group")
    scales: Mapping[str, Advantages] = {
        "group": group_advantages,
        "batch": batch_advantages,
        "none": centered_advantages,
    }
    return scales[scale]


def importance_weights(
    correction: SamplerCorrection, trainer: Tensor, sampler: Tensor, mask: Tensor
) -> Tensor | None:
    """Weights [S, T] from log-probabilities [S, T] of the two engines, or None for no correction."""
    if isinstance(correction, MaskedCorrection):
        bounds = {"low": correction.low, "high": correction.high}
        if correction.kind == "masked":
            return masked_importance_weights(trainer, sampler, **bounds)
        return sequence_masked_weights(trainer, sampler, mask, **bounds)
    if isinstance(correction, TruncatedCorrection):
        return truncated_importance_weights(trainer, sampler, correction.cap)
    return None


class SampledTokens(NamedTuple):
    """What a loss is of: S responses of a micro-batch.

    Attributes:
        logprobs: [S, T] of the policy (nats), with gradient.
        old_logprobs: [S, T] from before the round's updates; in its first one `logprobs` without gradient.
        mask: bool [S, T], response tokens.
        weights: [S, T] of the correction, or None.
        besides: [S, T] entropies or divergences with gradient, where the loss wants them.
        extras: what the batch brings besides, by name.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    weights: Tensor | None
    besides: Tensor | None
    extras: Mapping[str, Tensor]


class RoundsObjective:
    """A loss of sampled tokens, divided once by its denominator over the optimizer step's global batch.

    Args:
        config: correction, micro-batch and packing.
        multiple: sequence lengths are multiples of this.
        pad_id: token of the padding.
    """

    def __init__(self, config: RoundsConfig, *, multiple: int, pad_id: int) -> None:
        self._correction = config.correction
        self._packed, self._size = config.packed, config.micro_batch
        self._capacity = config.micro_batch * config.sequence_length
        self._multiple, self._pad_id = multiple, pad_id

    def micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Rows of like length together in padded rows, or as many in a packed row as it holds.

        Rows without labels are left out, but one stays if there are no others. `extras` have the numbers of the
        micro-batch's rows in the batch, `rows` [n], and what the loss needs with one row a sequence.

        Args:
            batch: `response_tokens`, `labels` int64 [n, s], `advantages` float32 [n], `sampler_logprobs` and, where
                they are known, `old_logprobs`, `reference_logprobs` and `teacher_logprobs` float32 [n, s].
        """
        lengths = used_lengths(batch["labels"])
        # Megatron's schedule wants a micro-batch even from a rank that has nothing to give.
        rows = torch.nonzero(lengths).squeeze(1) if bool(lengths.any()) else torch.zeros(1, dtype=torch.int64)
        if self._packed:
            parts = pack(lengths[rows].clamp(min=1).numpy(), self._capacity)
            return [self._packed_micro_batch(batch, rows[torch.from_numpy(part)], lengths) for part in parts]
        chunks = chunks_by_length(lengths[rows], self._size)
        return [self._padded_micro_batch(batch, rows[chunk], lengths) for chunk in chunks]

    def _padded_micro_batch(self, batch: Mapping[str, Tensor], rows: Tensor, lengths: Tensor) -> MicroBatch:
        width = trimmed_width(lengths[rows], batch["labels"].shape[1], self._multiple)
        tokens = cut(batch["response_tokens"][rows], width, self._pad_id)
        return MicroBatch(tokens, cut(batch["labels"][rows], width, IGNORED_LABEL), _extras(batch, rows, width))

    def _packed_micro_batch(self, batch: Mapping[str, Tensor], rows: Tensor, lengths: Tensor) -> MicroBatch:
        used = lengths[rows].clamp(min=1).tolist()
        tokens, labels, documents = packed_row(
            batch["response_tokens"][rows],
            batch["labels"][rows],
            used,
            multiple=self._multiple,
            pad_id=self._pad_id,
        )
        return MicroBatch(tokens, labels, _extras(batch, rows, max(used)), documents)

    @property
    def wants_entropy(self) -> bool:
        """Whether the loss is one of entropies too."""
        return False

    def _loss_of(self, tokens: SampledTokens) -> PolicyLoss:
        """The stage's loss."""
        raise NotImplementedError

    def loss(self, logprobs: Tensor, micro: MicroBatch, besides: Tensor | None = None, /) -> LossSums:
        """Loss and metrics summed over the micro-batch; what it is divided by depends on the loss."""
        extras = {name: sent(value, logprobs.device) for name, value in micro.extras.items()}
        sequences = len(extras["rows"])
        logprobs = by_sequence(logprobs, micro, sequences)
        mask = by_sequence(sent(micro.labels != IGNORED_LABEL, logprobs.device), micro, sequences)
        # Without a value from before the round's updates this is the first update: the ratio is 1.
        old, sampler = extras.get("old_logprobs", logprobs.detach()), extras["sampler_logprobs"]
        weights = importance_weights(self._correction, old, sampler, mask)
        beside = None if besides is None else by_sequence(besides, micro, sequences)
        result = self._loss_of(SampledTokens(logprobs, old, mask, weights, beside, extras))
        sums = {**result.metrics, "logprob_gap": torch.where(mask, (old - sampler).abs(), 0.0).sum()}
        if weights is not None:
            sums["sampler_weight"] = torch.where(mask, weights, 0.0).sum()
            sums["sampler_masked"] = (mask & (weights == 0)).sum()
        return result.loss_sum, result.denominator, sums

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss over its denominator, and means over the tokens."""
        tokens = max(sums["tokens"], 1.0)
        names = (
            "ratio",
            "clipped_low",
            "clipped_high",
            "kl_to_old",
            "reverse_kl",
            "logprob_gap",
            "sampler_weight",
            "sampler_masked",
        )
        means = {"loss": sums["loss"] / max(sums["count"], 1.0)}
        means |= {name: sums[name] / tokens for name in names if name in sums}
        if "entropy" in sums:
            means["policy_entropy"] = sums["entropy"] / tokens
        if "kl_to_reference" in sums:
            means["kl"] = sums["kl_to_reference"] / tokens
        if "clipped_low" in sums:
            means["clipped"] = means["clipped_low"] + means["clipped_high"]
        return means | {"trained_tokens": sums["tokens"]}


class GRPOObjective(RoundsObjective):
    """A policy-gradient loss of advantages, with what is added to it.

    Args:
        config: of the stage.
        layout: as for :class:`RoundsObjective`.
    """

    def __init__(self, config: GRPOConfig, **layout: int) -> None:
        super().__init__(config, **layout)
        self._loss, self._entropy_bonus = policy_loss(config), config.entropy_bonus

    @property
    def wants_entropy(self) -> bool:
        """Whether there is a bonus for it."""
        return self._entropy_bonus > 0

    def _loss_of(self, tokens: SampledTokens) -> PolicyLoss:
        return self._loss(
            PolicyBatch(
                tokens.logprobs,
                tokens.old_logprobs,
                tokens.extras["advantages"],
                tokens.mask,
                tokens.extras.get("reference_logprobs"),
                tokens.weights,
                tokens.besides,
            )
        )


def _extras(batch: Mapping[str, Tensor], rows: Tensor, width: int) -> dict[str, Tensor]:
    tokens = {name: cut(batch[name][rows], width, 0) for name in TOKEN_EXTRAS if name in batch}
    return {"rows": rows, "advantages": batch["advantages"][rows], **tokens}
