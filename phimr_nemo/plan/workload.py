"""What a training stage's configuration asks of a step: its micro-batches, their tokens, how evenly they fall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from phimr_nemo.config import DPOConfig, GRPOConfig, MidtrainConfig, SFTConfig, TrainingPlanConfig
from phimr_nemo.config.alignment import OnlineReference
from phimr_nemo.plan.memory import MicroBatch

StageConfig = MidtrainConfig | SFTConfig | DPOConfig | GRPOConfig

Rows = Literal["full", "padded", "joined"]
"""Rows packed to one length before; sequences padded to the longest of their micro-batch; sequences end to end."""

LENGTH_DRAWS: Final = 100
"""Simulated steps behind the mean of the slowest rank."""

EXPONENTIAL_SQUARES: Final = 2
"""Mean square of exponentially distributed lengths over the square of their mean."""


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
        mean_length: tokens of a sequence, or of every row.
        tokens: real tokens of a step.
        attention_length: sum of squared document lengths over sum of lengths (tokens).
        forward_only: passes without a backward pass for each with one.
        updates: optimizer updates of a step.
        steps: of the run.
        reference: a second copy of the weights is kept.
        overlaps: gradients are reduced and weights gathered while others are computed.
    """

    samples: int
    sides: int
    dealt: int
    whole: bool
    rows: Rows
    length: int
    mean_length: float
    tokens: float
    attention_length: float
    forward_only: float
    updates: int
    steps: float
    reference: bool
    overlaps: bool

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
            lengths = rng.exponential(self.mean_length, size=(ranks, count, size * self.sides)).clip(1, self.length)
            computed = lengths.sum(axis=2) if self.rows == "joined" else lengths.max(axis=2) * size * self.sides
            most.append(float(computed.sum(axis=1).max()))
        tokens = sum(most) / len(most)
        if self.rows == "joined":
            count = math.ceil(tokens / room)
        return count, tokens / count


def attention_length(mean_tokens: float, limit: int) -> float:
    """Sum of squared lengths over sum of lengths of exponentially distributed documents of at most `limit` tokens."""
    return min(EXPONENTIAL_SQUARES * mean_tokens, float(limit))


def training_workload(plan: TrainingPlanConfig, config: StageConfig) -> Workload:
    """The run that a stage's configuration and the planner's assumptions describe."""
    mean = float(min(plan.mean_tokens, config.sequence_length))
    attention = attention_length(mean, config.sequence_length)
    if isinstance(config, MidtrainConfig):
        return _supervised(plan, config, attention, config.sequence_length, "full")
    if isinstance(config, SFTConfig):
        return _supervised(plan, config, attention, mean, "padded")
    if isinstance(config, DPOConfig):
        return _preference(plan, config, attention, mean)
    return _reinforcement(plan, config, attention, mean)


def _steps(planned: float, config: MidtrainConfig | SFTConfig | DPOConfig) -> float:
    return min(planned, config.max_steps) if config.max_steps else planned


def _supervised(
    plan: TrainingPlanConfig, config: MidtrainConfig | SFTConfig, attention: float, mean: float, rows: Rows
) -> Workload:
    tokens = config.global_batch * mean
    return Workload(
        samples=config.global_batch,
        sides=1,
        dealt=config.global_batch,
        whole=True,
        rows=rows,
        length=config.sequence_length,
        mean_length=mean,
        tokens=tokens,
        attention_length=attention,
        forward_only=0.0,
        updates=1,
        steps=_steps((plan.samples or 0) * plan.mean_tokens * config.epochs / tokens, config),
        reference=False,
        overlaps=True,
    )


def _preference(plan: TrainingPlanConfig, config: DPOConfig, attention: float, mean: float) -> Workload:
    online = isinstance(config.reference, OnlineReference)
    return Workload(
        samples=config.global_batch,
        sides=2,
        dealt=config.global_batch,
        whole=True,
        rows="joined" if config.packed else "padded",
        length=config.sequence_length,
        mean_length=mean,
        tokens=2 * config.global_batch * mean,
        attention_length=attention,
        # Stored reference log-probabilities cost one pass over the data, online ones a pass in every step.
        forward_only=1.0 if online else 1.0 / config.epochs,
        updates=1,
        steps=_steps((plan.samples or 0) * config.epochs / config.global_batch, config),
        reference=online,
        overlaps=False,
    )


def _reinforcement(plan: TrainingPlanConfig, config: GRPOConfig, attention: float, mean: float) -> Workload:
    trained = max(1, round(config.prompts_per_step * config.group_size * plan.trained_share))
    return Workload(
        samples=trained,
        sides=1,
        dealt=config.prompts_per_step,
        whole=False,
        rows="padded",
        length=config.sequence_length,
        mean_length=mean,
        tokens=trained * mean,
        attention_length=attention,
        # The old policy's log-probabilities, and the reference's for a KL penalty.
        forward_only=1.0 + (config.kl > 0),
        updates=config.inner_batches,
        steps=config.steps,
        reference=config.kl > 0,
        overlaps=False,
    )
