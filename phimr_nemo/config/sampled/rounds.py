"""What the stages have in common that sample their own responses, round after round: GRPO and distillation."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field

from phimr_nemo.config.common import (
    CheckpointConfig,
    EarlyStoppingConfig,
    GuardConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    no_best_of_adapters,
    stops_on_nan,
)
from phimr_nemo.config.engine import (
    QUESTION,
    GraderName,
    LocalEngine,
    Prompt,
    ServerEngine,
    TrainedEngine,
    samples_as_trained,
)
from phimr_nemo.config.evaluation import HeldOutConfig, MonitorConfig
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.supervised import no_supervised_options
from phimr_nemo.config.values import AboveZero, AtLeastOne, Name, NonNegative, Place, Positive, Share

Stale = Literal["resample", "keep"]
MOST_AHEAD: Final = 8
"""Steps; as far as the dial `stale` of the ablations goes, which measures what age does."""


@config
class NoCorrection:
    """The sampler's log-probabilities are taken for the trainer's."""

    kind: Literal["none"]


@config
class TruncatedCorrection:
    """Truncated importance sampling: a token weighs min(trainer / sampler probability, `cap`)."""

    kind: Literal["truncated"]
    cap: AboveZero


@config
class MaskedCorrection:
    """Masked importance sampling: outside of the bounds a ratio of trainer to sampler probability weighs nothing.

    Attributes:
        kind: "masked": a token's ratio (IcePop); "sequence_masked": that of the whole response.
        low, high: the bounds.
    """

    kind: Literal["masked", "sequence_masked"]
    low: Share
    high: AtLeastOne


SamplerCorrection = Annotated[NoCorrection | TruncatedCorrection | MaskedCorrection, Field(discriminator="kind")]


@config
class TemperatureConfig:
    """Temperature annealing: linear from `start` to `end` over `fraction` of the steps, then `end`."""

    start: AboveZero
    end: AboveZero
    fraction: Share


@config
class RoundsCheckpointConfig(CheckpointConfig):
    """Checkpoints of a run of rounds.

    Attributes:
        metric: what `best` and early stopping go by.
    """

    metric: Name


@config
class RoundsConfig:
    """A run of rounds: responses are sampled with the weights of their step, which then trains on them.

    Attributes:
        prompts: `prompts` record directory.
        sequence_length: longest prompt + response.
        max_new_tokens: longest response; a prompt has the rest of `sequence_length`.
        steps: optimisation rounds.
        prompts_per_step, group_size: a round samples their product.
        correction: what is done about the difference between sampler and trainer.
        inner_batches: parts that a round's responses are trained on in, an optimizer step each.
        passes: how many times a round's responses are trained on.
        micro_batch: in sequences.
        packed: sequences end to end in rows of up to micro_batch x sequence_length tokens, the memory of a padded
            micro-batch; the same gradient as unpacked.
        engine: what samples the responses, by `model.longrope` as it is trained.
        prompt: the user's turn, with `{question}` in it once.
        ahead: rounds that are sampled while steps train, by weights at most so many steps older than those that train
            on them, up to 8; wants a correction. 0 = a round is sampled before its step.
        partial_rollouts: what new weights do to what is sampled ahead: "wait" for all rounds that were begun, each
            whole by the weights that it was begun with; or interrupt it, and "continue" it with them, a response of
            several versions (the built-in engine and vLLM servers).
        max_concurrent_rollouts: responses under way at once with partial_rollouts=continue, over all processes;
            None = as many as the engine takes.
        stale: whether responses of older weights than asked for are sampled again or kept; that wants one too.
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
    group_size: Positive
    correction: SamplerCorrection
    inner_batches: Positive
    passes: Positive = 1
    micro_batch: Positive
    packed: bool
    engine: TrainedEngine
    prompt: Prompt = QUESTION
    ahead: NonNegative
    partial_rollouts: Literal["wait", "continue"] = "wait"
    max_concurrent_rollouts: Positive | None = None
    stale: Stale
    verify_workers: NonNegative
    grader: GraderName | None = None
    temperature: TemperatureConfig
    monitor: MonitorConfig
    checkpoint: RoundsCheckpointConfig
    model: ModelConfig
    lora: LoRAConfig | None = None
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=stops_on_nan)
    early_stopping: EarlyStoppingConfig | None = None
    evaluation: HeldOutConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def updates(self) -> int:
        """Optimizer steps per round."""
        return self.inner_batches * self.passes

    @property
    def refills(self) -> int:
        """Further rounds of prompts that a step may sample."""
        return 0

    @property
    def has_second_model(self) -> bool:
        """Whether another model than the policy says what it thinks of the responses."""
        return False

    @property
    def weighs_tokens(self) -> bool:
        """Whether what a sampled token is worth depends on how probable it was."""
        return True

    def _check_rounds(self) -> None:
        no_supervised_options(self.model, self.parallel)
        no_best_of_adapters(self.lora, self.checkpoint)
        self._check_lengths()
        self._check_batches()
        self._check_sampling()
        self._check_ahead()
        self._check_turns()
        self._check_questions()

    def _check_questions(self) -> None:
        """Held-out questions are answered by the run's own engine, which is open for `sequence_length` tokens."""
        asked = self.evaluation
        if asked is None:
            return
        temperature = {"evaluation.temperature": asked.temperature}
        samples_as_trained(temperature, asked.top_p, self.engine, place="evaluation.")
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

    def _check_turns(self) -> None:
        """Colocated servers sleep while a step trains."""
        if self.ahead and isinstance(self.engine, ServerEngine) and self.engine.colocated:
            raise RuleBroken(
                f"{AT}ahead={self.ahead} with {AT}engine.colocated=true",
                rule="a round is sampled ahead while a step trains, and colocated servers sleep then: they have the "
                "trainer's GPUs",
                remedy=f"use {AT}ahead=0, or {AT}engine.colocated=false with servers on other GPUs",
            )

    def _check_sampling(self) -> None:
        """Responses of another policy are not trained on as if they were the policy's own."""
        asked = {"temperature.start": self.temperature.start, "temperature.end": self.temperature.end}
        samples_as_trained(asked, 1.0, self.engine)
        dtype = self.engine.dtype
        used = [f"{AT}ahead={self.ahead}"] if self.ahead else []
        used += [f"{AT}stale=keep"] if self.stale == "keep" else []
        used += [f"{AT}engine.dtype={dtype}"] if dtype not in (None, self.model.dtype) else []
        if used and self.weighs_tokens and self.correction.kind == "none":
            raise RuleBroken(
                f"{' and '.join(used)} with {AT}correction.kind=none",
                rule="responses of older weights, or of another precision, are weighed by how probable the trained "
                "weights find them",
                remedy=f"use {AT}correction.kind=truncated {AT}correction.cap=2, or {AT}ahead=0 {AT}stale=resample "
                f"{AT}engine.dtype=null",
            )

    def _check_ahead(self) -> None:
        """Responses are not older than what is known, and are interrupted where that can be done."""
        if self.ahead > MOST_AHEAD:
            raise RuleBroken(
                f"{AT}ahead={self.ahead}",
                rule=f"a round is trained on at most {MOST_AHEAD} steps after the weights that sampled it",
                remedy=f"use {AT}ahead={MOST_AHEAD} or fewer",
            )
        cap, processes = self.max_concurrent_rollouts, self.parallel.world_size
        if self.partial_rollouts == "wait":
            if cap is not None:
                raise RuleBroken(
                    f"{AT}max_concurrent_rollouts={cap} with {AT}partial_rollouts=wait",
                    rule="rounds that are not interrupted are sampled one after the other",
                    remedy=f"set {AT}partial_rollouts=continue, or limit engine.max_batch or engine.in_flight",
                )
            return
        if not self.ahead:
            raise RuleBroken(
                f"{AT}partial_rollouts=continue with {AT}ahead=0",
                rule="new weights interrupt what is sampled while a step trains",
                remedy=f"set {AT}partial_rollouts=wait, or {AT}ahead to 1 or more",
            )
        if not isinstance(self.engine, LocalEngine) and self.engine.kind != "vllm_server":
            raise RuleBroken(
                f"{AT}partial_rollouts=continue with {AT}engine.kind={self.engine.kind}",
                rule="the built-in engine and vLLM servers give what there is of an interrupted response",
                remedy=f"set {AT}partial_rollouts=wait, or {AT}engine.kind=vllm_server",
            )
        if cap is not None and cap < processes:
            raise RuleBroken(
                f"{AT}max_concurrent_rollouts={cap} with {processes} processes",
                rule="every process of the trainer has at least one response under way",
                remedy=f"use {AT}max_concurrent_rollouts={processes} or more",
            )
