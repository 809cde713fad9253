"""Settings of stages 1 and 2: mid-training and supervised fine-tuning."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

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
from phimr_nemo.config.generation import Problems
from phimr_nemo.errors import UserError


@config
class SupervisedCheckpointConfig(CheckpointConfig):
    """Checkpoints of stages 1 and 2.

    Attributes:
        metric: what `best` and early stopping go by: validation loss, pass@1, or mean loss between two checkpoints.
    """

    metric: Literal["val_loss", "pass1", "loss"] = "val_loss"


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

    def __post_init__(self) -> None:
        metric = self.checkpoint.metric
        measured = {
            "val_loss": self.validation_rows > 0,
            "pass1": self.evaluation is not None,
            "loss": True,
        }
        if (self.checkpoint.best or self.early_stopping is not None) and not measured[metric]:
            raise UserError(
                f"checkpoint.metric={metric} is never measured, and checkpoint.best or early_stopping goes by it",
                rule="val_loss needs validation_rows above 0, pass1 needs evaluation",
                remedy="set what it needs, choose another checkpoint.metric, or leave best and early_stopping out",
            )


@config
class MidtrainConfig(SupervisedConfig):
    """Stage 1: packed next-token prediction on the full verified set."""


@config
class SFTConfig(SupervisedConfig):
    """Stage 2: unpacked conversations, loss on the response only."""
