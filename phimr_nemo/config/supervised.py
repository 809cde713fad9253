"""Settings of stages 1 and 2: mid-training and supervised fine-tuning."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import (
    CheckpointConfig,
    ModelConfig,
    NonNegative,
    OptimConfig,
    ParallelConfig,
    Positive,
    RunConfig,
    Share,
    config,
)
from phimr_nemo.config.generation import Problems

AboveOne = Annotated[float, Field(gt=1.0)]
NonNegativeNumber = Annotated[float, Field(ge=0.0)]


@config
class SupervisedCheckpointConfig(CheckpointConfig):
    """Native checkpoints of stages 1 and 2.

    Attributes:
        best: also keep the one with the lowest validation loss, whatever its age.
        asynchronous: a process of its own writes while training goes on.
    """

    best: bool = False
    asynchronous: bool = False


@config
class GuardConfig:
    """What happens to a batch that would do harm. A skipped batch changes no weight and no optimizer state.

    Attributes:
        on_nan: loss or gradient is not finite.
        spike_factor: the loss is a spike above this many times the median of the last `spike_window` accepted
            losses, once there are that many; None = no such rule.
        spike_window: see `spike_factor`.
        on_spike: what then; "warn" trains on the batch all the same.
    """

    on_nan: Literal["skip", "stop"]
    spike_factor: AboveOne | None = None
    spike_window: Positive = 32
    on_spike: Literal["skip", "stop", "warn"] = "warn"


@config
class EarlyStoppingConfig:
    """Training ends when the validation loss no longer falls ("until validation saturates").

    Attributes:
        patience: measurements in a row without progress that end training.
        min_delta: progress is a validation loss lower than the best one by more than this (nats a token).
    """

    patience: Positive
    min_delta: NonNegativeNumber


@config
class TrainingEvaluationConfig:
    """A small pass@1 while training; the current weights are sampled in the first process.

    Attributes:
        every: steps between two evaluations.
        samples: answers a question.
        prompt: the user's turn; `{question}` stands in it once.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
    """

    every: Positive
    problems: Problems
    samples: Positive
    prompt: str
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    max_batch: Positive = 256
    workers: Positive = 1
    grader: str | None = None


@config
class WandbConfig:
    """Weights & Biases; the key comes from its own environment variable or login.

    Attributes:
        project: name of the project there.
        mode: "offline" writes to the run directory, for `wandb sync`.
        name: of the run; the run directory's name when None.
    """

    project: str
    mode: Literal["online", "offline"]
    name: str | None = None


@config
class TrackingConfig:
    """Where metrics go besides metrics.jsonl and TensorBoard."""

    wandb: WandbConfig | None = None


@config
class OverlapConfig:
    """Communication that runs beside computation.

    Attributes:
        grad_reduce: gradients are reduced while the backward pass goes on.
        param_gather: the distributed optimizer's weights are gathered while the forward pass goes on.
        tensor: tensor-parallel exchange inside Transformer Engine's layers (needs it, and `parallel.sequence`).
    """

    grad_reduce: bool = False
    param_gather: bool = False
    tensor: bool = False


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
        loss_on: "response" leaves the prompt's tokens out of the loss, "all" predicts them as well.
        data_workers: processes a rank that prepare batches ahead; 0 = none.
        early_stopping: None = train to the end.
        evaluation: None = no pass@1 while training.
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
    loss_on: Literal["response", "all"]
    data_workers: NonNegative = 0
    model: ModelConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    checkpoint: SupervisedCheckpointConfig
    guard: GuardConfig
    early_stopping: EarlyStoppingConfig | None = None
    evaluation: TrainingEvaluationConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    max_steps: NonNegative = 0


@config
class MidtrainConfig(SupervisedConfig):
    """Stage 1: packed next-token prediction on the full verified set."""


@config
class SFTConfig(SupervisedConfig):
    """Stage 2: unpacked conversations, loss on the response only."""
