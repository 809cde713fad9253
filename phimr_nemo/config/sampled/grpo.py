"""Settings of stage 4: GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field

from phimr_nemo.config.common import is_measured
from phimr_nemo.config.engine import FunctionName
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.sampled.rounds import RoundsCheckpointConfig, RoundsConfig
from phimr_nemo.config.values import (
    AboveZero,
    AtLeastZero,
    IsNumber,
    NonNegative,
    Number,
    Positive,
    PositiveShare,
    Share,
)

SMALLEST_GROUP: Final = 2
"""A response is compared with the others of its group."""
GroupSize = Annotated[int, Field(ge=SMALLEST_GROUP), IsNumber]


@config
class PolicyLossConfig:
    """A policy-gradient loss (see :mod:`phimr_nemo.losses.grpo`); `dr_grpo` takes advantages that are only centred.

    Attributes:
        kind: how tokens and responses are weighed.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; it is a token's, with `gspo` a whole
            response's, which wants a range some hundred times narrower. With `cispo` they bound a weight, and
            clip_low=1 is no lower bound.
    """

    kind: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
    clip_low: Share
    clip_high: AtLeastZero

    def __post_init__(self) -> None:
        if self.clip_low == 1.0 and self.kind != "cispo":
            raise RuleBroken(
                f"{AT}clip_low={self.clip_low} with {AT}kind={self.kind}",
                rule=f"a ratio is clipped below at 1 - {AT}clip_low, which is above 0",
                remedy=f"use {AT}clip_low=0.2, or {AT}kind=cispo",
            )


@config
class RebalanceConfig:
    """Reward rebalancing: all positives, equally many random negatives; drop prompts that are too easy.

    Attributes:
        enabled: False keeps every rollout of every group, and the rest of the section is ignored.
        drop_above: prompts whose group accuracy is above this are dropped.
        oversample_hard: how many times a hard prompt appears in an epoch of prompts.
        refill_rounds: how often a step may sample further prompts in the place of dropped ones; 0 = never.
    """

    enabled: bool
    drop_above: Share
    oversample_hard: Positive
    refill_rounds: NonNegative


@config
class PromptOptimizationConfig:
    """Prompt optimisation: keep prompts whose responses are uniform in length.

    Attributes:
        enabled: False keeps every prompt.
        max_length_spread: largest coefficient of variation of the response lengths.
    """

    enabled: bool
    max_length_spread: AtLeastZero


@config
class CurriculumConfig:
    """Prompts that are solved are not sampled again; the next one in the epoch's order takes their place.

    Attributes:
        solved_from: a prompt is solved when this share of its group was right the last time; None = none is.
    """

    solved_from: PositiveShare | None = None


@config
class RewardConfig:
    """What a response is worth: see :mod:`phimr_nemo.align.grpo.rewards`. Weights of 0 leave a part out.

    Attributes:
        correct, wrong: for the grader's verdict; +1 and -1 in the paper.
        format: weight of a finished response with closed thinking and one boxed answer (0 or 1).
        length: weight of the share of `max_new_tokens` that a response leaves unused (0 to 1).
        functions: MODULE:FUNCTION -> weight, of functions of one :class:`phimr_nemo.align.grpo.rewards.Graded`.
    """

    correct: Number
    wrong: Number
    format: Number = 0.0
    length: Number = 0.0
    functions: Mapping[FunctionName, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_flat = self.correct == self.wrong and not (self.format or self.length or any(self.functions.values()))
        if self.correct < self.wrong or is_flat:
            raise RuleBroken(
                f"{AT}correct={self.correct} with {AT}wrong={self.wrong}",
                rule="a correct response is worth more than a wrong one; otherwise nothing, or the wrong, is learnt",
                remedy=f"use {AT}correct=1.0 {AT}wrong=-1.0",
            )


@config
class GRPOCheckpointConfig(RoundsCheckpointConfig):
    """Checkpoints of stage 4.

    Attributes:
        metric: what `best` and early stopping go by: pass@1 on held-out questions, or a mean between two
            checkpoints over the responses that are trained on.
    """

    metric: Literal["pass_rate", "reward", "pass1"] = "pass_rate"


@config
class KeptOverlong:
    """A response that hit the length limit is graded like any other: unanswered, so most often wrong."""

    kind: Literal["keep"]


@config
class MaskedOverlong:
    """A response that hit the length limit is not trained on (DAPO's overlong filtering)."""

    kind: Literal["mask"]


@config
class SoftOverlong:
    """Responses lose reward as they near the length limit (DAPO's soft overlong punishment).

    Attributes:
        buffer: tokens before the limit in which the loss of reward grows from 0 to `penalty`.
        penalty: what a response of the full length loses.
    """

    kind: Literal["soft"]
    buffer: Positive
    penalty: AboveZero


OverlongResponses = Annotated[KeptOverlong | MaskedOverlong | SoftOverlong, Field(discriminator="kind")]


@config
class GRPOConfig(RoundsConfig):
    """Stage 4: GRPO with a verifiable reward.

    Attributes:
        loss: which policy-gradient loss.
        advantage_scale: what a reward's distance from its group's mean is divided by: the spread of the group's
            rewards, of the whole batch's, or nothing; None = nothing for dr_grpo, else the group's.
        entropy_bonus: weight of the policy's entropy at each token, which the loss then raises; 0 = off.
        kl: weight of the KL penalty to the starting model; 0 = off.
        kl_estimator: what the penalty's gradient is unbiased of (see :func:`phimr_nemo.losses.grpo.k3_kl`).
        overlong: what becomes of responses that near or hit the length limit.
        reward: what a response is worth.
    """

    group_size: GroupSize
    verify_workers: Positive
    loss: PolicyLossConfig
    advantage_scale: Literal["group", "batch", "none"] | None = None
    entropy_bonus: AtLeastZero = 0.0
    kl: AtLeastZero
    kl_estimator: Literal["k3", "importance_weighted_k3"] = "k3"
    overlong: OverlongResponses
    reward: RewardConfig
    rebalance: RebalanceConfig
    prompt_optimization: PromptOptimizationConfig
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    checkpoint: GRPOCheckpointConfig

    @property
    def refills(self) -> int:
        """Further rounds of prompts that a step may sample in the place of dropped ones."""
        return self.rebalance.refill_rounds if self.rebalance.enabled else 0

    @property
    def has_second_model(self) -> bool:
        """Whether there is a KL penalty to the starting model."""
        return self.kl > 0

    def __post_init__(self) -> None:
        self._check_rounds()
        self._check_overlong()
        needs = {"pass1": ("evaluation", self.evaluation is not None)}
        is_measured(self.checkpoint, self.early_stopping, needs, otherwise="pass_rate")
        if self.guard.spike_factor is not None and self.guard.spike_of == "loss":
            raise RuleBroken(
                f"{AT}guard.spike_factor={self.guard.spike_factor} with {AT}guard.spike_of=loss",
                rule="a policy gradient's loss lies around 0: its median says nothing about spikes",
                remedy=f"set {AT}guard.spike_of=grad_norm, or {AT}guard.spike_factor=null",
            )

    def _check_overlong(self) -> None:
        if isinstance(self.overlong, SoftOverlong) and self.overlong.buffer > self.max_new_tokens:
            raise RuleBroken(
                f"{AT}overlong.buffer={self.overlong.buffer} with {AT}max_new_tokens={self.max_new_tokens}",
                rule="the buffer is the end of the longest response",
                remedy=f"use {AT}overlong.buffer={self.max_new_tokens} or less",
            )
