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

T = TypeVar("T")

Dtype = Literal["fp32", "bf16"]
LongRopePolicy = Literal["long_when_max_length_exceeds_original", "per_sequence", "always_short"]
Fp8Recipe = Literal["delayed", "current"]
Recompute = Literal["none", "selective", "full"]
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
    """The parallel layout. The world size is tensor x pipeline x context x data.

    Attributes:
        tensor: processes that share every matrix.
        pipeline: processes that share the layers.
        data: replicas of the model, each with its part of the batch.
        sequence: whether the tensor ranks share the tokens between the matrices as well.
        context: processes that share the tokens of every sequence.
        virtual: parts of the model in each pipeline process, taken in turn so that it waits less.
        nodes: machines that a job of this layout asks for; None = what its script says.
    """

    tensor: Positive = 1
    pipeline: Positive = 1
    data: Positive = 1
    sequence: bool = False
    context: Positive = 1
    virtual: Positive = 1
    nodes: Positive | None = None

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
