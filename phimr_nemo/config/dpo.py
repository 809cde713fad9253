"""Settings of stage 3: rollout DPO."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

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
    batches_fit,
    is_measured,
    no_best_of_adapters,
    stops_on_nan,
)
from phimr_nemo.config.evaluation import TrainingEvaluationConfig
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.supervised import no_supervised_options
from phimr_nemo.config.values import AboveZero, IsNumber, NonNegative, Place, Positive

Smoothing = Annotated[float, Field(ge=0.0, lt=0.5), IsNumber]


@config
class PlainLoss:
    """A preference loss that `beta` alone describes (see :mod:`phimr_nemo.losses.dpo`)."""

    kind: Literal["dpo", "ipo", "length_normalized_dpo", "length_normalized_ipo", "apo_zero", "apo_down"]


@config
class SmoothedLoss:
    """DPO on pairs of which the share `label_smoothing` may be labelled the wrong way round."""

    kind: Literal["label_smoothed_dpo"]
    label_smoothing: Smoothing


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
    path: Place | None = None


@config
class OnlineReference:
    """Reference log-probabilities computed in every step by a second copy of the weights."""

    kind: Literal["online"]


DPOReference = Annotated[StoredReference | OnlineReference, Field(discriminator="kind")]
Overlong = Literal["drop", "truncate", "error"]


@config
class DPOCheckpointConfig(CheckpointConfig):
    """Checkpoints of stage 3.

    Attributes:
        metric: what `best` and early stopping go by: on the validation pairs, pass@1, or a training metric's mean
            between two checkpoints.
    """

    metric: Literal["loss", "accuracy", "margin", "val_loss", "val_accuracy", "pass1"] = "loss"


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
        validation_pairs: at least so many pairs are held out of training, with all pairs of their questions.
        validate_every: steps between two measurements of loss and accuracy on them; the last step has one as well.
        evaluation: None = no pass@1 while training.
        packed: several pairs end to end in one row of up to 2 x micro_batch x sequence_length tokens, the
            memory of a padded micro-batch; the same pairs per step and the same gradient as unpacked.
    """

    run: RunConfig
    base: Place
    pairs: Place
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
    lora: LoRAConfig | None = None
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: DPOCheckpointConfig
    guard: GuardConfig = field(default_factory=stops_on_nan)
    early_stopping: EarlyStoppingConfig | None = None
    validation_pairs: NonNegative = 0
    validate_every: Positive = 50
    evaluation: TrainingEvaluationConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    max_steps: NonNegative = 0

    def __post_init__(self) -> None:
        batches_fit(self.micro_batch, self.global_batch, self.parallel.data)
        no_supervised_options(self.model, self.parallel)
        no_best_of_adapters(self.lora, self.checkpoint)
        if 0 < self.validation_pairs < self.parallel.data:
            raise RuleBroken(
                f"{AT}validation_pairs={self.validation_pairs} with {AT}parallel.data={self.parallel.data}",
                rule="every data-parallel rank has a validation pair (0 = no validation)",
                remedy=f"use {AT}validation_pairs={self.parallel.data} or more",
            )
        needs = {
            "val_loss": ("validation_pairs", self.validation_pairs > 0),
            "val_accuracy": ("validation_pairs", self.validation_pairs > 0),
            "pass1": ("evaluation", self.evaluation is not None),
        }
        is_measured(self.checkpoint, self.early_stopping, needs)
