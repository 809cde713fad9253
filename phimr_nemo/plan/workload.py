"""What a training stage's configuration asks of a step: its micro-batches, their tokens, how evenly they fall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from phimr_nemo.config import DPOConfig, MidtrainConfig, RoundsConfig, SFTConfig, TrainingPlanConfig
from phimr_nemo.config.dpo import OnlineReference
from phimr_nemo.plan.memory import MicroBatch

StageConfig = MidtrainConfig | SFTConfig | DPOConfig | RoundsConfig

Rows = Literal["full", "padded", "joined"]
"""Rows packed to one length before; sequences padded to the longest of their micro-batch; sequences end to end."""

LENGTH_DRAWS: Final = 100
"""Simulated steps behind the mean of the slowest rank."""

SCALE_STEPS: Final = 60
"""Halvings of the interval in which a scale is looked for: more than a double has bits."""


@dataclass(frozen=True)
class Lengths:
    """Exponentially distributed lengths, those above `limit` cut to it (tokens): the planner's assumption.

    Attributes:
        scale: mean that they would have without the limit; infinite when all are `limit`.
    """

    scale: float
    limit: int

    @property
    def mean(self) -> float:
        """E[min(X, limit)]."""
        if math.isinf(self.scale):
            return float(self.limit)
        return -self.scale * math.expm1(-self.limit / self.scale)

    @property
    def weighted(self) -> float:
        """Sum of squares over sum: what attention's cost a token is proportional to."""
        if math.isinf(self.scale):
            return float(self.limit)
        rest = math.exp(-self.limit / self.scale)
        squares = 2 * self.scale**2 * (1 - rest) - 2 * self.scale * self.limit * rest
        return squares / self.mean

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Random lengths, at least 1."""
        if math.isinf(self.scale):
            return np.full(shape, float(self.limit))
        return rng.exponential(self.scale, size=shape).clip(1, self.limit)


def lengths_with_mean(mean: float, limit: int) -> Lengths:
    """Lengths whose mean, after the cut, is `mean` tokens; all are `limit` when that is not possible."""
    if mean >= limit:
        return Lengths(math.inf, limit)
    low, high = mean, mean
    while Lengths(high, limit).mean < mean:
        high *= 2
    for _ in range(SCALE_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if Lengths(middle, limit).mean < mean else (low, middle)
    return Lengths(high, limit)


@dataclass(frozen=True)
class Workload:
    """A training run, whatever the layout.

    Attributes:
        samples: rows, conversations, pairs or responses of a step.
        sides: sequences of a sample that share a micro-batch: 2 for a pair.
        dealt: what the data-parallel ranks share evenly: the samples, or the prompts that they come from.
        whole: `dealt` falls into whole micro-batches on every rank.
        rows: how sequences become a micro-batch.
        length: tokens of the longest sequence, or of every row.
        lengths: of documents; of sequences too unless they are full rows.
        tokens: real tokens of a step.
        forward_only: passes without a backward pass for each with one.
        updates: optimizer updates of a step.
        steps: of the run.
        reference: a second copy of the weights is kept.
        hides_gradients, hides_weights: they are reduced and gathered while layers are computed.
    """

    samples: int
    sides: int
    dealt: int
    whole: bool
    rows: Rows
    length: int
    lengths: Lengths
    tokens: float
    forward_only: float
    updates: int
    steps: float
    reference: bool
    hides_gradients: bool
    hides_weights: bool

    def largest(self, size: int) -> MicroBatch:
        """The largest micro-batch of `size` samples."""
        return MicroBatch(sequences=size * self.sides, length=self.length, packed=self.rows != "padded")

    def is_even(self, size: int, ranks: int) -> bool:
        """Whether the ranks can share a step in micro-batches of `size` samples."""
        return self.dealt % (ranks * (size if self.whole else 1)) == 0

    def slowest_rank(self, size: int, ranks: int) -> tuple[int, float]:
        """Micro-batches of the slowest data-parallel rank's step, and tokens in each with padding.

        Full rows are all alike. Other lengths are random, and a step lasts until the rank with most tokens is done:
        the mean of simulated steps.

        Args:
            size: samples a micro-batch.
            ranks: data-parallel ranks.
        """
        mine = math.ceil(self.samples / ranks)
        count = math.ceil(mine / size)
        if self.rows == "full":
            return count, float(size * self.length)
        rng = np.random.Generator(np.random.Philox(key=0))
        room = size * self.sides * self.length
        most = []
        for _ in range(LENGTH_DRAWS):
            lengths = self.lengths.draw(rng, (ranks, count, size * self.sides))
            computed = lengths.sum(axis=2) if self.rows == "joined" else lengths.max(axis=2) * size * self.sides
            most.append(float(computed.sum(axis=1).max()))
        tokens = sum(most) / len(most)
        if self.rows == "joined":
            count = math.ceil(tokens / room)
        return count, tokens / count


def training_workload(plan: TrainingPlanConfig, config: StageConfig) -> Workload:
    """The run that a stage's configuration and the planner's assumptions describe."""
    lengths = lengths_with_mean(plan.mean_tokens, config.sequence_length)
    if isinstance(config, MidtrainConfig):
        return _supervised(plan, config, lengths, config.sequence_length, "full")
    if isinstance(config, SFTConfig):
        return _supervised(plan, config, lengths, lengths.mean, "padded")
    if isinstance(config, DPOConfig):
        return _preference(plan, config, lengths)
    return _reinforcement(plan, config, lengths)


def _steps(planned: float, config: MidtrainConfig | SFTConfig | DPOConfig) -> float:
    return min(planned, config.max_steps) if config.max_steps else planned


def _supervised(
    plan: TrainingPlanConfig, config: MidtrainConfig | SFTConfig, lengths: Lengths, a_sample: float, rows: Rows
) -> Workload:
    tokens = config.global_batch * a_sample
    return Workload(
        samples=config.global_batch,
        sides=1,
        dealt=config.global_batch,
        whole=True,
        rows=rows,
        length=config.sequence_length,
        lengths=lengths,
        tokens=tokens,
        forward_only=0.0,
        updates=1,
        steps=_steps((plan.samples or 0) * plan.mean_tokens * config.epochs / tokens, config),
        reference=False,
        hides_gradients=config.overlap.grad_reduce,
        hides_weights=config.overlap.param_gather,
    )


def _preference(plan: TrainingPlanConfig, config: DPOConfig, lengths: Lengths) -> Workload:
    online = isinstance(config.reference, OnlineReference)
    return Workload(
        samples=config.global_batch,
        sides=2,
        dealt=config.global_batch,
        whole=True,
        rows="joined" if config.packed else "padded",
        length=config.sequence_length,
        lengths=lengths,
        tokens=2 * config.global_batch * lengths.mean,
        # Stored reference log-probabilities cost one pass over the data, online ones a pass in every step.
        forward_only=1.0 if online else 1.0 / config.epochs,
        updates=1,
        steps=_steps((plan.samples or 0) * config.epochs / config.global_batch, config),
        reference=online,
        hides_gradients=False,
        hides_weights=False,
    )


def _reinforcement(plan: TrainingPlanConfig, config: RoundsConfig, lengths: Lengths) -> Workload:
    trained = max(1, round(config.prompts_per_step * config.group_size * plan.trained_share))
    return Workload(
        samples=trained,
        sides=1,
        dealt=config.prompts_per_step,
        whole=False,
        rows="padded",
        length=config.sequence_length,
        lengths=lengths,
        tokens=trained * lengths.mean,
        # The old policy's log-probabilities, which the first update's own forward pass gives; the reference's for a
        # KL penalty, or the teacher's, counted as one of the student's size.
        forward_only=float(config.updates > 1 and config.weighs_tokens) + config.has_second_model,
        updates=config.updates,
        steps=config.steps,
        reference=config.has_second_model,
        hides_gradients=False,
        hides_weights=False,
    )
