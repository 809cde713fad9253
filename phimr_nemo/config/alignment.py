"""Settings of stages 3 and 4: rollout DPO and GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import (
    CheckpointConfig,
    EarlyStoppingConfig,
    GuardConfig,
    ModelConfig,
    NonNegative,
    OptimConfig,
    ParallelConfig,
    Positive,
    RunConfig,
    Share,
    TrackingConfig,
    config,
)
from phimr_nemo.config.sampler import OverlongResponses, RolloutSampler, Stale
from phimr_nemo.errors import UserError

AboveZero = Annotated[float, Field(gt=0.0)]


@config
class PlainLoss:
    """A preference loss that `beta` alone describes (see :mod:`phimr_nemo.losses.dpo`)."""

    kind: Literal["dpo", "ipo", "length_normalized_dpo", "length_normalized_ipo"]


@config
class SmoothedLoss:
    """DPO on pairs of which the share `label_smoothing` may be labelled the wrong way round."""

    kind: Literal["label_smoothed_dpo"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)]


@config
class RPOLoss:
    """DPO and `nll_weight` times the chosen response's negative log-likelihood a token."""

    kind: Literal["rpo"]
    nll_weight: AboveZero


PreferenceLoss = Annotated[PlainLoss | SmoothedLoss | RPOLoss, Field(discriminator="kind")]


@config
class StoredReference:
    """Reference log-probabilities computed once, before the first step: training holds one model.

    Attributes:
        path: a file that an earlier run with the same base and pairs has written; None = this run's own.
    """

    kind: Literal["stored"]
    path: Path | None = None


@config
class OnlineReference:
    """Reference log-probabilities computed in every step by a second copy of the weights."""

    kind: Literal["online"]


DPOReference = Annotated[StoredReference | OnlineReference, Field(discriminator="kind")]
Overlong = Literal["drop", "truncate", "error"]


def _stops() -> GuardConfig:
    return GuardConfig(on_nan="stop")


@config
class DPOCheckpointConfig(CheckpointConfig):
    """Checkpoints of stage 3.

    Attributes:
        metric: what `best` and early stopping go by, as its mean between two checkpoints.
    """

    metric: Literal["loss", "accuracy", "margin"] = "loss"


@config
class DPOConfig:
    """Stage 3: rollout DPO.

    Attributes:
        pairs: `pairs` record directory.
        sequence_length: longest question with one of its responses, in tokens.
        overlong: what happens to a pair with a longer side: left out, cut off at its end, or refused.
        beta: strength of the implied KL penalty.
        loss: which preference loss.
        reference: where the reference log-probabilities come from.
        micro_batch, global_batch: in pairs.
        packed: several pairs end to end in one row of up to 2 x micro_batch x sequence_length tokens, the
            memory of a padded micro-batch; the same pairs a step and the same gradient as unpacked.
    """

    run: RunConfig
    base: Path
    pairs: Path
    sequence_length: Positive
    overlong: Overlong
    beta: AboveZero
    loss: PreferenceLoss
    reference: DPOReference
    packed: bool
    epochs: Positive
    micro_batch: Positive
    global_batch: Positive
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: DPOCheckpointConfig
    guard: GuardConfig = field(default_factory=_stops)
    early_stopping: EarlyStoppingConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    max_steps: NonNegative = 0


@config
class PolicyLossConfig:
    """A policy-gradient loss (see :mod:`phimr_nemo.losses.grpo`); `dr_grpo` takes advantages that are only centred.

    Attributes:
        kind: how tokens and responses are weighed.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; it is a token's, with `gspo` a whole
            response's, which wants a range some hundred times narrower.
    """

    kind: Literal["grpo", "dr_grpo", "dapo", "gspo"]
    clip_low: Annotated[float, Field(ge=0.0, lt=1.0)]
    clip_high: Annotated[float, Field(ge=0.0)]


@config
class NoCorrection:
    """The sampler's log-probabilities are taken for the trainer's."""

    kind: Literal["none"]


@config
class TruncatedCorrection:
    """Truncated importance sampling: a token weighs min(trainer / sampler probability, `cap`)."""

    kind: Literal["truncated"]
    cap: AboveZero


SamplerCorrection = Annotated[NoCorrection | TruncatedCorrection, Field(discriminator="kind")]


@config
class TemperatureConfig:
    """Temperature annealing: linear from `start` to `end` over `fraction` of the steps, then `end`."""

    start: float
    end: float
    fraction: Share


@config
class RebalanceConfig:
    """Reward rebalancing: all positives, equally many random negatives; drop prompts that are too easy.

    Attributes:
        enabled: False keeps every rollout of every group, and the rest of the section has no say.
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
    max_length_spread: float


@config
class RewardConfig:
    """What a response is worth: see :mod:`phimr_nemo.align.grpo.rewards`. Weights of 0 leave a part out.

    Attributes:
        correct, wrong: for the grader's verdict; +1 and -1 in the paper.
        format: weight of a finished response with closed thinking and one boxed answer (0 or 1).
        length: weight of the share of `max_new_tokens` that a response leaves unused (0 to 1).
        functions: MODULE:FUNCTION -> weight, of functions of one :class:`phimr_nemo.align.grpo.rewards.Graded`.
    """

    correct: float
    wrong: float
    format: float = 0.0
    length: float = 0.0
    functions: Mapping[str, float] = field(default_factory=dict)


@config
class MonitorConfig:
    """What is watched while GRPO runs, and when a warning says that it collapses: `align.grpo.collapse`.

    Attributes:
        dashboard_every: steps between two versions of the picture `grpo.png`.
        window: a rule looks at means over as many steps.
        repetitive_rise: by how much the share of responses that mostly repeat themselves may rise above the lowest
            that the run has had.
        overlong_rise: by how much the share of cut-off responses may rise above the lowest that the run has had.
        entropy_share: smallest healthy entropy, as a share of the highest that the run has had.
        solved_pass_rate: from here on low entropy is no fault.
        max_entropy: largest healthy entropy of a sampled token, in nats.
        pass_rate_drop: by how much the pass rate may fall below the best that the run has had.
        ungraded_warning: a warning where the grader gave up on a larger share of a round's responses.
        ungraded_stop: the run stops where it gave up on a larger share than this.
    """

    dashboard_every: Positive
    window: Positive
    repetitive_rise: Share
    overlong_rise: Share
    entropy_share: Share
    solved_pass_rate: Share
    max_entropy: AboveZero
    pass_rate_drop: Share
    ungraded_warning: Share
    ungraded_stop: Share


@config
class GRPOCheckpointConfig(CheckpointConfig):
    """Checkpoints of stage 4.

    Attributes:
        metric: what `best` and early stopping go by, as its mean between two checkpoints.
    """

    metric: Literal["pass_rate", "reward"] = "pass_rate"


@config
class GRPOConfig:
    """Stage 4: GRPO with a verifiable reward.

    Attributes:
        prompts: `prompts` record directory.
        sequence_length: longest prompt + response.
        max_new_tokens: longest response.
        steps: optimisation rounds.
        prompts_per_step, group_size: a round samples their product.
        loss: which policy-gradient loss.
        correction: what is done about the difference between sampler and trainer.
        kl: weight of the k3 KL penalty to the starting model; 0 = off.
        inner_batches: optimizer steps a round.
        micro_batch: in sequences.
        packed: sequences end to end in rows of up to micro_batch x sequence_length tokens, the memory of a padded
            micro-batch; the same gradient as unpacked.
        sampler: what samples the responses.
        ahead: 1 samples the next round while a step trains, with weights one step old; wants a correction.
        stale: whether responses of older weights than asked for are sampled again or kept; that wants one too.
        overlong: what becomes of responses that near or hit the length limit.
        reward: what a response is worth.
        verify_workers: grader processes on each data-parallel rank.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
    """

    run: RunConfig
    base: Path
    prompts: Path
    sequence_length: Positive
    max_new_tokens: Positive
    steps: Positive
    prompts_per_step: Positive
    group_size: Positive
    loss: PolicyLossConfig
    correction: SamplerCorrection
    kl: float
    inner_batches: Positive
    micro_batch: Positive
    packed: bool
    sampler: RolloutSampler
    ahead: Literal[0, 1]
    stale: Stale
    overlong: OverlongResponses
    reward: RewardConfig
    verify_workers: Positive
    grader: str | None = None
    temperature: TemperatureConfig
    rebalance: RebalanceConfig
    prompt_optimization: PromptOptimizationConfig
    monitor: MonitorConfig
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: GRPOCheckpointConfig
    guard: GuardConfig = field(default_factory=_stops)
    early_stopping: EarlyStoppingConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.guard.spike_factor is not None and self.guard.spike_of == "loss":
            raise UserError(
                f"guard.spike_factor={self.guard.spike_factor} with guard.spike_of=loss",
                rule="a policy gradient's loss lies around 0: its median says nothing about spikes",
                remedy="set guard.spike_of=grad_norm",
            )
