"""Settings of stages 1 and 2: mid-training and supervised fine-tuning."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from phimr_nemo.config.common import (
    CheckpointConfig,
    ModelConfig,
    NonNegative,
    OptimConfig,
    ParallelConfig,
    Positive,
    RunConfig,
    config,
)


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
