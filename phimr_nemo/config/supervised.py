"""Settings of stages 1 and 2, mid-training and supervised fine-tuning, and of their packed rows."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from phimr_nemo.config.common import (
    CheckpointConfig,
    EarlyStoppingConfig,
    GuardConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ShardConfig,
    TrackingConfig,
    batches_fit,
    is_measured,
    no_best_of_adapters,
)
from phimr_nemo.config.evaluation import TrainingEvaluationConfig
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import NonNegative, Place, Positive


def no_supervised_options(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Alignment has neither 8-bit products nor virtual pipelining.

    Raises:
        RuleBroken: one of them is asked for.
    """
    if model.fp8 is not None or parallel.virtual > 1:
        raise RuleBroken(
            f"{AT}model.fp8={model.fp8}, {AT}parallel.virtual={parallel.virtual} in an alignment stage",
            rule="8-bit products and virtual pipelining are for mid-training and SFT",
            remedy=f"set {AT}model.fp8=null {AT}parallel.virtual=1",
        )


@config
class PackConfig:
    """Conversations -> packed rows.

    Attributes:
        tokenizer: directory with the tokenizer.
        sequence_length: tokens per row.
        placement: which documents share a row: those that fill it best by length, or short ones at random.
        workers: processes that tokenise; with 1 the tokenizer's own threads use all cores.
        shard: this process's share of the conversations' shards.
    """

    run: RunConfig
    conversations: Place
    tokenizer: Place
    sequence_length: Positive
    placement: Literal["length", "mixed"]
    workers: Positive
    shard: ShardConfig = field(default_factory=ShardConfig)


@config
class SupervisedCheckpointConfig(CheckpointConfig):
    """Checkpoints of stages 1 and 2.

    Attributes:
        metric: what `best` and early stopping go by: validation loss, pass@1, or mean loss between two checkpoints.
    """

    metric: Literal["val_loss", "pass1", "loss"] = "val_loss"


@config
class OverlapConfig:
    """Communication that runs beside computation.

    Attributes:
        grad_reduce: gradients are reduced while the backward pass goes on.
        param_gather: the distributed optimizer's weights are gathered while the forward pass goes on.
        tensor: tensor-parallel exchange inside Transformer Engine's layers (needs it, and `parallel.sequence`), in
            buffers of one size: SFT then pads every row to `sequence_length`.
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
        validation_rows: rows held out of training to measure the validation loss.
        validate_every: steps between two measurements.
        loss_on: "response" leaves the prompt's tokens out of the loss, "all" predicts them as well.
        data_workers: processes per rank that prepare batches ahead; 0 = none.
        early_stopping: None = train to the end.
        evaluation: None = no pass@1 while training.
        max_steps: stop earlier than `epochs` says; 0 = do not.
    """

    run: RunConfig
    base: Place
    data: Place
    sequence_length: Positive
    epochs: Positive
    micro_batch: Positive
    global_batch: Positive
    validation_rows: NonNegative
    validate_every: Positive
    loss_on: Literal["response", "all"]
    data_workers: NonNegative = 0
    model: ModelConfig
    lora: LoRAConfig | None = None
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
        batches_fit(self.micro_batch, self.global_batch, self.parallel.data)
        no_best_of_adapters(self.lora, self.checkpoint)
        self._check_validation()
        self._check_overlap()
        micro_batches = self.global_batch // (self.micro_batch * self.parallel.data)
        if self.parallel.virtual > 1 and micro_batches % self.parallel.pipeline:
            raise RuleBroken(
                f"{micro_batches} micro-batches a step with {AT}parallel.pipeline={self.parallel.pipeline} and "
                f"{AT}parallel.virtual={self.parallel.virtual}",
                rule=f"with virtual pipelining {AT}parallel.pipeline divides the micro-batches of a step",
                remedy=f"set {AT}parallel.virtual=1, or change {AT}micro_batch, {AT}global_batch or "
                f"{AT}parallel.data",
            )

    def _check_validation(self) -> None:
        if self.validation_rows % self.global_batch:
            raise RuleBroken(
                f"{AT}validation_rows={self.validation_rows} with {AT}global_batch={self.global_batch}",
                rule="the validation rows are a whole number of global batches (0 = no validation)",
                remedy=f"use {AT}validation_rows={-(-self.validation_rows // self.global_batch) * self.global_batch}",
            )
        needs = {
            "val_loss": ("validation_rows", self.validation_rows > 0),
            "pass1": ("evaluation", self.evaluation is not None),
        }
        is_measured(self.checkpoint, self.early_stopping, needs)

    def _check_overlap(self) -> None:
        if self.overlap.param_gather and not (self.optim.distributed and self.overlap.grad_reduce):
            raise RuleBroken(
                f"{AT}overlap.param_gather=true with {AT}optim.distributed={self.optim.distributed} and "
                f"{AT}overlap.grad_reduce={self.overlap.grad_reduce}",
                rule="the distributed optimizer gathers weights ahead, and only where gradients are reduced ahead",
                remedy=f"set {AT}optim.distributed=true {AT}overlap.grad_reduce=true, or "
                f"{AT}overlap.param_gather=false",
            )
        if self.overlap.tensor and not self.parallel.sequence:
            raise RuleBroken(
                f"{AT}overlap.tensor=true with {AT}parallel.sequence=false",
                rule="tensor-parallel exchange is overlapped under sequence parallelism only",
                remedy=f"set {AT}overlap.tensor=false, or {AT}parallel.sequence=true",
            )
        if self.overlap.tensor and self.parallel.context > 1:
            raise RuleBroken(
                f"{AT}overlap.tensor=true with {AT}parallel.context={self.parallel.context}",
                rule="tensor-parallel exchange is overlapped in buffers of one size, and what a context rank has of "
                "a row follows from its documents",
                remedy=f"set {AT}overlap.tensor=false, or {AT}parallel.context=1",
            )
        whole = self.sequence_length // self.parallel.tensor * self.parallel.tensor
        if self.overlap.tensor and self.sequence_length != whole:
            raise RuleBroken(
                f"{AT}overlap.tensor=true with {AT}sequence_length={self.sequence_length} and "
                f"{AT}parallel.tensor={self.parallel.tensor}",
                rule="tensor-parallel ranks share the buffers of overlapped exchange, which hold a whole sequence",
                remedy=f"set {AT}sequence_length={whole}, or {AT}overlap.tensor=false",
            )


@config
class MidtrainConfig(SupervisedConfig):
    """Stage 1: packed next-token prediction on the full verified set."""


@config
class SFTConfig(SupervisedConfig):
    """Stage 2: unpacked conversations, loss on the response only."""
