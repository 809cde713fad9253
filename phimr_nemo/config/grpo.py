"""Settings of stage 4: GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field

from phimr_nemo.config.common import (
    AboveZero,
    AtLeastZero,
    CheckpointConfig,
    Decay,
    EarlyStoppingConfig,
    GuardConfig,
    IsNumber,
    ModelConfig,
    NonNegative,
    Number,
    OptimConfig,
    ParallelConfig,
    Place,
    Positive,
    RunConfig,
    Share,
    TrackingConfig,
    is_measured,
    no_supervised_options,
    stops_on_nan,
)
from phimr_nemo.config.engine import (
    QUESTION,
    FunctionName,
    GraderName,
    Prompt,
    TrainedEngine,
    samples_as_trained,
)
from phimr_nemo.config.evaluation import HeldOutConfig
from phimr_nemo.config.rules import AT, RuleBroken, config

SMALLEST_GROUP: Final = 2
"""A response is compared with the others of its group."""
Stale = Literal["resample", "keep"]
GroupSize = Annotated[int, Field(ge=SMALLEST_GROUP), IsNumber]


@config
class PolicyLossConfig:
    """A policy-gradient loss (see :mod:`phimr_nemo.losses.grpo`); `dr_grpo` takes advantages that are only centred.

    Attributes:
        kind: how tokens and responses are weighed.
        clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high]; it is a token's, with `gspo` a whole
            response's, which wants a range some hundred times narrower.
    """

    kind: Literal["grpo", "dr_grpo", "dapo", "gspo"]
    clip_low: Decay
    clip_high: AtLeastZero


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

    start: AboveZero
    end: AboveZero
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
    max_length_spread: AtLeastZero


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
        responses_every: steps between two samples of responses, with their prompts, rewards and verdicts, that are
            kept for people (`phimr responses`); 0 = none.
        responses: how many are kept of such a step, whole groups of them, one at least.
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
    responses_every: NonNegative = 10
    responses: Positive = 64


@config
class GRPOCheckpointConfig(CheckpointConfig):
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
class GRPOConfig:
    """Stage 4: GRPO with a verifiable reward.

    Attributes:
        prompts: `prompts` record directory.
        sequence_length: longest prompt + response.
        max_new_tokens: longest response; a prompt has the rest of `sequence_length`.
        steps: optimisation rounds.
        prompts_per_step, group_size: a round samples their product.
        loss: which policy-gradient loss.
        correction: what is done about the difference between sampler and trainer.
        kl: weight of the k3 KL penalty to the starting model; 0 = off.
        inner_batches: optimizer steps a round.
        micro_batch: in sequences.
        packed: sequences end to end in rows of up to micro_batch x sequence_length tokens, the memory of a padded
            micro-batch; the same gradient as unpacked.
        engine: what samples the responses, by `model.longrope` as it is trained.
        prompt: the user's turn, with `{question}` in it once.
        ahead: 1 samples the next round while a step trains, with weights one step old; wants a correction.
        stale: whether responses of older weights than asked for are sampled again or kept; that wants one too.
        overlong: what becomes of responses that near or hit the length limit.
        reward: what a response is worth.
        evaluation: None = no pass@1 on held-out questions; the responses come from `engine`.
        verify_workers: grader processes on each data-parallel rank.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
    """

    run: RunConfig
    base: Place
    prompts: Place
    sequence_length: Positive
    max_new_tokens: Positive
    steps: Positive
    prompts_per_step: Positive
    group_size: GroupSize
    loss: PolicyLossConfig
    correction: SamplerCorrection
    kl: AtLeastZero
    inner_batches: Positive
    micro_batch: Positive
    packed: bool
    engine: TrainedEngine
    prompt: Prompt = QUESTION
    ahead: Literal[0, 1]
    stale: Stale
    overlong: OverlongResponses
    reward: RewardConfig
    verify_workers: Positive
    grader: GraderName | None = None
    temperature: TemperatureConfig
    rebalance: RebalanceConfig
    prompt_optimization: PromptOptimizationConfig
    monitor: MonitorConfig
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: GRPOCheckpointConfig
    guard: GuardConfig = field(default_factory=stops_on_nan)
    early_stopping: EarlyStoppingConfig | None = None
    evaluation: HeldOutConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        no_supervised_options(self.model, self.parallel)
        self._check_lengths()
        self._check_batches()
        self._check_sampling()
        self._check_evaluation()
        if self.guard.spike_factor is not None and self.guard.spike_of == "loss":
            raise RuleBroken(
                f"{AT}guard.spike_factor={self.guard.spike_factor} with {AT}guard.spike_of=loss",
                rule="a policy gradient's loss lies around 0: its median says nothing about spikes",
                remedy=f"set {AT}guard.spike_of=grad_norm, or {AT}guard.spike_factor=null",
            )

    def _check_evaluation(self) -> None:
        """Held-out questions are answered by the run's own engine, which is open for `sequence_length` tokens."""
        needs = {"pass1": ("evaluation", self.evaluation is not None)}
        is_measured(self.checkpoint, self.early_stopping, needs, otherwise="pass_rate")
        asked = self.evaluation
        if asked is None:
            return
        samples_as_trained({"evaluation.temperature": asked.temperature}, asked.top_p, self.engine)
        if asked.max_new_tokens >= self.sequence_length:
            raise RuleBroken(
                f"{AT}evaluation.max_new_tokens={asked.max_new_tokens} with "
                f"{AT}sequence_length={self.sequence_length}",
                rule=f"{AT}sequence_length holds prompt and response",
                remedy=f"use {AT}evaluation.max_new_tokens={self.max_new_tokens}",
            )

    def _check_lengths(self) -> None:
        if self.max_new_tokens >= self.sequence_length:
            raise RuleBroken(
                f"{AT}max_new_tokens={self.max_new_tokens} with {AT}sequence_length={self.sequence_length}",
                rule=f"{AT}sequence_length holds prompt and response",
                remedy=f"raise {AT}sequence_length above {AT}max_new_tokens by the longest prompt, "
                f"for example {AT}sequence_length={2 * self.max_new_tokens}",
            )
        if isinstance(self.overlong, SoftOverlong) and self.overlong.buffer > self.max_new_tokens:
            raise RuleBroken(
                f"{AT}overlong.buffer={self.overlong.buffer} with {AT}max_new_tokens={self.max_new_tokens}",
                rule="the buffer is the end of the longest response",
                remedy=f"use {AT}overlong.buffer={self.max_new_tokens} or less",
            )

    def _check_batches(self) -> None:
        data = self.parallel.data
        if self.prompts_per_step % data:
            raise RuleBroken(
                f"{AT}prompts_per_step={self.prompts_per_step} with {AT}parallel.data={data}",
                rule=f"{AT}parallel.data divides {AT}prompts_per_step",
                remedy=f"use {AT}prompts_per_step={-(-self.prompts_per_step // data) * data}",
            )
        rollouts, shares = self.prompts_per_step * self.group_size, self.inner_batches * data
        if rollouts % shares:
            raise RuleBroken(
                f"{AT}prompts_per_step={self.prompts_per_step} x {AT}group_size={self.group_size} rollouts per "
                f"round for {AT}inner_batches={self.inner_batches} and {AT}parallel.data={data}",
                rule=f"{AT}inner_batches x {AT}parallel.data divides {AT}prompts_per_step x {AT}group_size",
                remedy=f"use {AT}inner_batches=1, or a {AT}prompts_per_step that is a multiple of {shares}",
            )

    def _check_sampling(self) -> None:
        """Responses of another policy are not trained on as if they were the policy's own."""
        asked = {"temperature.start": self.temperature.start, "temperature.end": self.temperature.end}
        samples_as_trained(asked, 1.0, self.engine)
        dtype = self.engine.dtype
        used = [f"{AT}ahead=1"] if self.ahead else []
        used += [f"{AT}stale=keep"] if self.stale == "keep" else []
        used += [f"{AT}engine.dtype={dtype}"] if dtype not in (None, self.model.dtype) else []
        if used and self.correction.kind == "none":
            raise RuleBroken(
                f"{' and '.join(used)} with {AT}correction.kind=none",
                rule="responses of older weights, or of another precision, are weighed by how probable the trained "
                "weights find them",
                remedy=f"use {AT}correction.kind=truncated {AT}correction.cap=2, or {AT}ahead=0 {AT}stale=resample "
                f"{AT}engine.dtype=null",
            )
