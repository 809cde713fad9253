"""What every stage's typed configuration shares: frozen dataclasses, filled from YAML and `key=value` overrides.

A field without a default must stand in the YAML file: the numbers of the recipe live in conf/, with
their source, and not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field
from typing_extensions import dataclass_transform

from phimr_nemo.errors import UserError

T = TypeVar("T")

Dtype = Literal["fp32", "bf16"]
LongRopePolicy = Literal["long_when_max_length_exceeds_original", "per_sequence", "always_short"]
Fp8Recipe = Literal["delayed", "current"]
Recompute = Literal["none", "selective", "full"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
AboveOne = Annotated[float, Field(gt=1.0)]
NonNegativeNumber = Annotated[float, Field(ge=0.0)]


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
    """The parallel layout. The world size is tensor x pipeline x context x data.

    Attributes:
        tensor: processes that share every matrix.
        pipeline: processes that share the layers.
        data: replicas of the model, each with its part of the batch.
        sequence: whether the tensor ranks share the tokens between the matrices as well.
        context: processes that share the tokens of every sequence.
        virtual: parts of the model in each pipeline process, taken in turn so that it waits less.
    """

    tensor: Positive = 1
    pipeline: Positive = 1
    data: Positive = 1
    sequence: bool = False
    context: Positive = 1
    virtual: Positive = 1

    @property
    def world_size(self) -> int:
        """Processes that the layout needs."""
        return self.tensor * self.pipeline * self.context * self.data


@config
class ModelConfig:
    """How the model is computed; its shape comes from the base directory's config.json.

    Attributes:
        dtype: of weights and activations.
        fp8: 8-bit matrix products in Transformer Engine's hybrid format, by its recipe; None = none.
        recompute: activations that are computed again in the backward pass instead of being kept: those of
            attention only ("selective"), or of whole layers ("full").
    """

    dtype: Dtype
    fp8: Fp8Recipe | None = None
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    recompute: Recompute = "none"


@config
class OptimConfig:
    """AdamW and its learning-rate schedule (:func:`phimr_nemo.training.schedule.learning_rate`).

    Attributes:
        warmup_fraction: share of the steps in which the rate rises linearly to `lr`.
        schedule: what follows: no decay, a linear or a cosine decay to `min_lr`, or warm-up/stable/decay.
        decay_fraction: share of the steps, the last ones, in which `wsd` decays; belongs to it alone.
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
    decay_fraction: Share | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_lr <= self.lr:
            raise UserError(
                f"optim.min_lr={self.min_lr} with optim.lr={self.lr}",
                rule="0 <= min_lr <= lr",
                remedy="lower optim.min_lr or raise optim.lr",
            )
        if (self.schedule == "wsd") != (self.decay_fraction is not None):
            raise UserError(
                f"optim.schedule={self.schedule} with optim.decay_fraction={self.decay_fraction}",
                rule="wsd decays over the share decay_fraction of the steps; no other schedule has one",
                remedy="set both optim.schedule=wsd and optim.decay_fraction=0.2, or leave decay_fraction out",
            )
        if self.warmup_fraction + (self.decay_fraction or 0.0) > 1.0:
            raise UserError(
                f"optim.warmup_fraction={self.warmup_fraction} with optim.decay_fraction={self.decay_fraction}",
                rule="warm-up and decay are shares of the same steps: together at most 1",
                remedy="lower one of the two",
            )


@config
class CheckpointConfig:
    """Native checkpoints, which serve resume, and the best of them the export.

    Attributes:
        every: steps between checkpoints; another is written when the run is told to stop.
        keep: how many of the newest are kept.
        best: also keep the best one by the stage's `metric`, whatever its age, and export it in the end.
        asynchronous: a process of its own writes while training goes on.
    """

    every: Positive
    keep: Positive = 1
    best: bool = False
    asynchronous: bool = False


@config
class GuardConfig:
    """What happens to a batch that would do harm. A skipped batch changes no weight and no optimizer state.

    Attributes:
        on_nan: loss or gradient is not finite.
        spike_factor: a value is a spike above this many times the median of the last `spike_window` accepted ones,
            once there are that many; None = no such rule.
        spike_window: see `spike_factor`.
        spike_of: which value; a policy gradient's loss lies around 0 and has no spikes in this sense.
        on_spike: what then; "warn" trains on the batch all the same.
    """

    on_nan: Literal["skip", "stop"]
    spike_factor: AboveOne | None = None
    spike_window: Positive = 32
    spike_of: Literal["loss", "grad_norm"] = "loss"
    on_spike: Literal["skip", "stop", "warn"] = "warn"


@config
class EarlyStoppingConfig:
    """Training ends when the stage's measure, `checkpoint.metric`, gets no better.

    Attributes:
        patience: measurements in a row without progress that end training.
        min_delta: progress is a measurement better than the best one by more than this, in the metric's unit.
    """

    patience: Positive
    min_delta: NonNegativeNumber


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
