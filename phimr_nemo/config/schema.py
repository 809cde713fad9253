"""The typed configuration of every stage: frozen dataclasses, filled from YAML and `key=value` overrides.

A field without a default must stand in the YAML file: the numbers of the recipe live in conf/, with
their source, and not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field
from typing_extensions import dataclass_transform

from phimr_nemo.records import Difficulty

T = TypeVar("T")

Dtype = Literal["fp32", "bf16"]
LongRopePolicy = Literal["long_when_max_length_exceeds_original", "per_sequence", "always_short"]
Schedule = Literal["cosine", "linear", "constant"]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass in which an unknown key is an error."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@config
class RunConfig:
    """Where a run writes and what seeds it."""

    output: Path
    seed: NonNegative
    log_every: Positive = 1


@config
class ShardConfig:
    """Which part of a data step this process does: shards `index`, `index + count`, ..."""

    index: NonNegative = 0
    count: Positive = 1


@config
class ParallelConfig:
    """The parallel layout. The world size is tensor x pipeline x data."""

    tensor: Positive = 1
    pipeline: Positive = 1
    data: Positive = 1
    sequence: bool = False

    @property
    def world_size(self) -> int:
        """Processes that the layout needs."""
        return self.tensor * self.pipeline * self.data


@config
class ModelConfig:
    """How the model is computed; its shape comes from the base directory's config.json."""

    dtype: Dtype
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    recompute: bool = False


@config
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        warmup_fraction: share of the steps in which the rate rises linearly from 0 to `lr`.
        distributed: Megatron's distributed optimizer (states sharded over the data-parallel ranks).
    """

    lr: float
    min_lr: float
    warmup_fraction: Share
    schedule: Schedule
    weight_decay: float
    beta1: Share
    beta2: Share
    eps: float
    clip_grad: float
    distributed: bool


@config
class CheckpointConfig:
    """Native checkpoints, which serve resume only.

    Attributes:
        every: steps between checkpoints; another is written when the run is told to stop.
        keep: how many of the newest are kept.
    """

    every: Positive
    keep: Positive = 1


@config
class SupervisedConfig:
    """Stages 1 and 2.

    Attributes:
        base: Hugging Face directory to start from.
        data: `rows` (mid-training) or `conversations` (SFT) record directory.
        sequence_length: the longest sequence, in tokens.
        epochs: passes over the data.
        validation_rows: rows kept out of training to measure the validation loss.
        validate_every: steps between two measurements.
        max_steps: stop earlier than `epochs` says; 0 = do not.
    """

    run: RunConfig
    base: Path
    data: Path
    sequence_length: Positive
    epochs: Positive
    micro_batch: Positive
    global_batch: Positive
    validation_rows: NonNegative
    validate_every: Positive
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig
    max_steps: NonNegative = 0


@config
class MidtrainConfig(SupervisedConfig):
    """Stage 1: packed next-token prediction on the full verified set."""


@config
class SFTConfig(SupervisedConfig):
    """Stage 2: unpacked conversations, loss on the response only."""


@config
class DPOConfig:
    """Stage 3: rollout DPO.

    Attributes:
        pairs: `pairs` record directory.
        beta: strength of the implied KL penalty.
        micro_batch, global_batch: in pairs.
    """

    run: RunConfig
    base: Path
    pairs: Path
    sequence_length: Positive
    beta: float
    epochs: Positive
    micro_batch: Positive
    global_batch: Positive
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig
    max_steps: NonNegative = 0


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
        enabled: False keeps every rollout of every group.
        drop_above: prompts whose group accuracy is above this are dropped.
        oversample_hard: how many times a hard prompt appears in an epoch of prompts.
    """

    enabled: bool
    drop_above: Share
    oversample_hard: Positive


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
class GRPOConfig:
    """Stage 4: GRPO with a verifiable reward.

    Attributes:
        prompts: `prompts` record directory.
        sequence_length: longest prompt + response.
        max_new_tokens: longest response.
        steps: optimisation rounds.
        prompts_per_step, group_size: a round samples their product.
        clip_low, clip_high: the surrogate's ratio stays in [1 - clip_low, 1 + clip_high].
        kl: weight of the k3 KL penalty to the starting model; 0 = off.
        inner_batches: optimizer steps a round.
        micro_batch: in sequences.
        reward_correct, reward_wrong: +1 and -1 in the paper.
        verify_workers: grader processes on each data-parallel rank.
    """

    run: RunConfig
    base: Path
    prompts: Path
    sequence_length: Positive
    max_new_tokens: Positive
    steps: Positive
    prompts_per_step: Positive
    group_size: Positive
    clip_low: float
    clip_high: float
    kl: float
    inner_batches: Positive
    micro_batch: Positive
    reward_correct: float
    reward_wrong: float
    verify_workers: Positive
    temperature: TemperatureConfig
    rebalance: RebalanceConfig
    prompt_optimization: PromptOptimizationConfig
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig


@config
class SyntheticProblems:
    """Problems that the project generates by seed.

    Attributes:
        count: how many.
        split: which side of the split by construction.
    """

    kind: Literal["synthetic"]
    count: Positive
    split: Literal["train", "heldout"]


@config
class FileProblems:
    """Problems from the user's file (JSON, JSONL, parquet, .gz, .zst).

    Attributes:
        path: the file.
        question, answer, solution: column names; found by themselves when None.
        limit: read only the first rows; 0 = all.
    """

    kind: Literal["file"]
    path: Path
    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    limit: NonNegative = 0


Problems = Annotated[SyntheticProblems | FileProblems, Field(discriminator="kind")]


@config
class ProgrammaticTeacher:
    """Writes step-by-step solutions of synthetic problems and makes mistakes at a set rate."""

    kind: Literal["programmatic"]
    mistake_rate: Share


@config
class RecordedTeacher:
    """Recorded solutions instead of a live teacher.

    Attributes:
        path: a file of questions with their recorded solutions, right and wrong.
        question, answer: column names; found by themselves when None.
        response: column of the solution; None also finds nested ones (one object a model).
        limit: read only the first rows; 0 = all.
    """

    kind: Literal["recorded"]
    path: Path
    question: str | None = None
    answer: str | None = None
    response: str | None = None
    limit: NonNegative = 0


@config
class ModelTeacher:
    """A model in a Hugging Face directory, sampled in this process."""

    kind: Literal["model"]
    path: Path
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    max_batch: Positive = 256


Teacher = Annotated[ProgrammaticTeacher | RecordedTeacher | ModelTeacher, Field(discriminator="kind")]


@config
class GenerateConfig:
    """Problems -> rollouts.

    Attributes:
        problems: what is asked; a recorded teacher brings its own questions and needs none.
        rollouts_per_problem: samples a question; a recorded teacher gives what it has.
        shard_size: problems (recorded: rollouts) a shard.
    """

    run: RunConfig
    problems: Problems | None = None
    teacher: Teacher
    rollouts_per_problem: Positive
    shard_size: Positive
    shard: ShardConfig = field(default_factory=ShardConfig)


@config
class VerifyConfig:
    """Rollouts -> verdicts.

    Attributes:
        workers: grader processes.
        deadline_seconds: an answer that takes longer is a timeout.
    """

    run: RunConfig
    rollouts: Path
    workers: Positive
    deadline_seconds: float
    shard: ShardConfig = field(default_factory=ShardConfig)


@config
class MidtrainSet:
    """The full verified set."""

    max_per_problem: Positive


@config
class SFTSet:
    """The harder high-quality subset."""

    difficulties: tuple[Difficulty, ...]
    max_per_problem: Positive


@config
class PairSet:
    """Preference pairs from rollouts of one question."""

    mode: Literal["near_miss", "random"]
    max_per_problem: Positive


@config
class PromptSet:
    """Prompts for reinforcement learning."""

    min_pass: float
    max_pass: float
    hard_below: Share


@config
class CurateConfig:
    """Verdicts -> training sets, each in its own directory of the output; a set that is None is not made."""

    run: RunConfig
    verdicts: Path
    midtrain: MidtrainSet | None = None
    sft: SFTSet | None = None
    pairs: PairSet | None = None
    prompts: PromptSet | None = None


@config
class PackConfig:
    """Conversations -> packed rows.

    Attributes:
        tokenizer: directory with the tokenizer.
        sequence_length: tokens a row.
    """

    run: RunConfig
    conversations: Path
    tokenizer: Path
    sequence_length: Positive


@config
class EvaluateConfig:
    """pass@1 of a model on problems.

    Attributes:
        model: Hugging Face directory.
        samples: answers a question.
        prompt: the user's turn; `{question}` stands in it once.
    """

    run: RunConfig
    model: Path
    problems: Problems
    samples: Positive
    prompt: str
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    max_batch: Positive = 256
    workers: Positive = 1


@config
class ExportConfig:
    """A trained directory -> a release directory.

    Attributes:
        model: Hugging Face directory of the last stage.
        base_model: what it was trained from, for the model card.
        licence: its identifier on the hub.
        stages: stage name -> run directory, for the model card.
        evaluations: row name -> directory of an evaluation, for the model card's table.
    """

    run: RunConfig
    model: Path
    base_model: str
    licence: str
    stages: dict[str, Path] = field(default_factory=dict)
    evaluations: dict[str, Path] = field(default_factory=dict)


@config
class BaseConfig:
    """A randomly initialised model of the Phi-4-mini architecture with a tokenizer of its own.

    Attributes:
        vocab_size: of the tokenizer that is trained on the synthetic problems.
        system_prompt: what the chat template puts before every conversation.
    """

    run: RunConfig
    vocab_size: Positive
    system_prompt: str
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: Positive
    original_max_position_embeddings: Positive
    long_factor_growth: float
    initializer_range: float


@config
class QuickstartConfig:
    """The whole recipe on a tiny model: one preset a step, and the sizes that are the quickstart's own."""

    run: RunConfig
    train_problems: Positive
    heldout_problems: Positive
    rl_problems: Positive
    evaluation_samples: Positive


STAGES: dict[str, type] = {
    "base": BaseConfig,
    "generate": GenerateConfig,
    "verify": VerifyConfig,
    "curate": CurateConfig,
    "pack": PackConfig,
    "midtrain": MidtrainConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "grpo": GRPOConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
