"""What stage 4 optimises: a policy-gradient loss over the rows of a round, in micro-batches, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from phimr_nemo.align.microbatch import MicroBatch, chunks_by_length, cut, trimmed_width, used_lengths
from phimr_nemo.align.policy import LossSums
from phimr_nemo.config import GRPOConfig
from phimr_nemo.losses import IGNORED_LABEL, dapo_loss

ROW_EXTRAS = ("advantages",)
TOKEN_EXTRAS = ("sampler_logprobs", "old_logprobs", "reference_logprobs")


class GRPOObjective:
    """The clipped surrogate with the mean over all tokens of the optimizer step's global batch.

    Args:
        config: clip range and KL weight.
        multiple: sequence lengths are multiples of this.
        pad_id: token of the padding.
    """

    def __init__(self, config: GRPOConfig, *, multiple: int, pad_id: int) -> None:
        self._config, self._multiple, self._pad_id = config, multiple, pad_id

    def micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Rows of like length together. Rows without labels are left out, but one stays if there are no others."""
        lengths = used_lengths(batch["labels"])
        # Megatron's schedule wants a micro-batch even from a rank that has nothing to give.
        rows = torch.nonzero(lengths).squeeze(1) if bool(lengths.any()) else torch.zeros(1, dtype=torch.int64)
        micros = []
        for chunk in chunks_by_length(lengths[rows], self._config.micro_batch):
            chosen = rows[chunk]
            width = trimmed_width(lengths[chosen], batch["labels"].shape[1], self._multiple)
            extras = {name: batch[name][chosen] for name in ROW_EXTRAS}
            extras |= {name: cut(batch[name][chosen], width, 0) for name in TOKEN_EXTRAS if name in batch}
            tokens = cut(batch["response_tokens"][chosen], width, self._pad_id)
            micros.append(MicroBatch(tokens, cut(batch["labels"][chosen], width, IGNORED_LABEL), extras))
        return micros

    def loss(self, logprobs: Tensor, micro: MicroBatch) -> LossSums:
        """Loss and metrics summed over the micro-batch's response tokens."""
        extras = {name: value.to(logprobs.device) for name, value in micro.extras.items()}
        mask = (micro.labels != IGNORED_LABEL).to(logprobs.device)
        # Without a value from before the round's updates this is the first update: the ratio is 1.
        old = extras.get("old_logprobs", logprobs.detach())
        result = dapo_loss(
            logprobs,
            old,
            extras["advantages"],
            mask,
            clip_low=self._config.clip_low,
            clip_high=self._config.clip_high,
            ref_logprobs=extras.get("reference_logprobs"),
            kl_coefficient=self._config.kl,
        )
        gap = torch.where(mask, (old - extras["sampler_logprobs"]).abs(), 0.0).sum()
        return result.loss_sum, result.denominator, {**result.metrics, "logprob_gap": gap}

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the tokens."""
        tokens = max(sums["count"], 1.0)
        names = ("loss", "ratio", "clipped_low", "clipped_high", "kl_to_old", "logprob_gap")
        means = {name: sums[name] / tokens for name in names}
        if "kl_to_reference" in sums:
            means["kl"] = sums["kl_to_reference"] / tokens
        return means | {"clipped": means["clipped_low"] + means["clipped_high"], "trained_tokens": sums["count"]}
