"""What every stage's typed configuration shares: frozen dataclasses, filled from YAML and `key=value` overrides.

A field without a default must stand in the YAML file: the numbers of the recipe live in conf/, with
their source, and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import (
    AboveOne,
    AboveZero,
    AtLeastZero,
    Decay,
    Name,
    NonNegative,
    Place,
    Positive,
    Seed,
    Share,
)
from phimr_nemo.process.memory import GIBIBYTE

Dtype = Literal["fp32", "bf16", "fp16"]
OutputFormat = Literal["own", "fp32", "fp8"]
"""Of the output layer: all in the format of its matrix; logits in float32; products in 8 bits."""
LongRopePolicy = Literal["long_when_max_length_exceeds_original", "per_sequence", "always_short"]
Fp8Recipe = Literal["delayed", "current"]
Recompute = Literal["none", "selective", "mlp", "full"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]


@config
class RunConfig:
    """Where a run writes and what seeds it.

    Attributes:
        output: the run's directory; the same one continues the run.
        seed: what its data order, sampling and new weights follow from.
        log_every: steps between two logged ones.
    """

    output: Place
    seed: Seed
    log_every: Positive = 1


@config
class ShardConfig:
    """Which part of a data step this process does: shards `index`, `index + count`, ..."""

    index: NonNegative = 0
    count: Positive = 1

    def __post_init__(self) -> None:
        if self.index >= self.count:
            raise RuleBroken(
                f"{AT}index={self.index} with {AT}count={self.count}",
                rule=f"{AT}index counts from 0 and is below {AT}count",
                remedy=f"use {AT}index={self.count - 1} or less, or raise {AT}count",
            )


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
        timeout_minutes: how long the processes exchange tensors before the job ends, because one of them has died or
            hangs. Work that may take them unequal times (sampling, grading, writing) is waited for without it.
    """

    tensor: Positive = 1
    pipeline: Positive = 1
    data: Positive = 1
    sequence: bool = False
    context: Positive = 1
    virtual: Positive = 1
    nodes: Positive | None = None
    timeout_minutes: AboveZero = 30.0

    def __post_init__(self) -> None:
        if self.virtual > 1 and self.pipeline == 1:
            raise RuleBroken(
                f"{AT}virtual={self.virtual} with {AT}pipeline=1",
                rule=f"virtual pipelining splits the layers of a pipeline: {AT}pipeline is at least 2",
                remedy=f"set {AT}virtual=1, or {AT}pipeline to 2 or more",
            )
        if self.sequence and self.tensor == 1:
            raise RuleBroken(
                f"{AT}sequence=true with {AT}tensor=1",
                rule="sequence parallelism splits over the tensor-parallel group",
                remedy=f"set {AT}sequence=false, or {AT}tensor to 2 or more",
            )

    @property
    def world_size(self) -> int:
        """Processes that the layout needs."""
        return self.tensor * self.pipeline * self.context * self.data


@config
class ModelConfig:
    """How the model is computed; its shape comes from the base directory's config.json.

    Attributes:
        dtype: of weights and activations; in fp16 the loss is scaled, and a step that overflows is left out.
        fp32_output: log-probabilities from logits in float32, whatever the dtype (ScaleRL, arXiv 2510.13786): what
            the output layer's products add up to is not rounded to 16 bits. It costs room and traffic in memory; the
            products are as fast as without where Transformer Engine multiplies.
        fp8: 8-bit matrix products in Transformer Engine's hybrid format, by its recipe; None = none.
        fp8_output: the output layer's products in that format too, always with current scaling. The layers' recipes
            leave it in bf16, because it decides every probability.
        logits_gib: what a chunk of logits may take on each process where log-probabilities are computed (GiB). A
            micro-batch that is one chunk keeps its logits for the backward pass; of longer ones all but a chunk are
            computed again, which is one product of four of the output layer.
        recompute: activations that are computed again in the backward pass instead of being kept: those of the
            attention core ("selective", which frees next to nothing, as no attention here keeps its scores), of the
            feed-forward part ("mlp", most of what a layer keeps), or of whole layers ("full").
        deterministic: the same bits on a GPU every time, in one layout on one kind of machine: slower kernels without
            atomic additions, in torch, cuBLAS, NCCL, Megatron and Transformer Engine. A CPU needs no such kernels.
    """

    dtype: Dtype
    fp8: Fp8Recipe | None = None
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    recompute: Recompute = "none"
    fp32_output: bool = False
    fp8_output: bool = False
    logits_gib: AboveZero = 0.75
    deterministic: bool = False

    @property
    def output_format(self) -> OutputFormat:
        """See :mod:`phimr_nemo.losses.products`."""
        return "fp32" if self.fp32_output else "fp8" if self.fp8_output else "own"

    @property
    def logits_bytes(self) -> int:
        """``logits_gib`` in bytes."""
        return int(self.logits_gib * GIBIBYTE)

    def __post_init__(self) -> None:
        if self.fp8_output and (self.fp8 is None or self.fp32_output):
            other = f"{AT}fp8=null" if self.fp8 is None else f"{AT}fp32_output=true"
            raise RuleBroken(
                f"{AT}fp8_output=true with {other}",
                rule="the output layer computes in one format, and in 8 bits only where the layers do",
                remedy=f"set {AT}fp8_output=false",
            )
        if self.fp8 is not None and self.dtype != "bf16":
            raise RuleBroken(
                f"{AT}fp8={self.fp8} with {AT}dtype={self.dtype}",
                rule="8-bit products are a part of bf16 training",
                remedy=f"set {AT}dtype=bf16, or {AT}fp8=null",
            )


@config
class LoRAConfig:
    """Low-rank adapters beside every matrix of the layers, the only weights that are trained then.

    The export has them merged in; they are also written by themselves (:mod:`phimr_nemo.training.adapters.peft`).

    Attributes:
        rank: of the update to a matrix.
        alpha: the update is multiplied by alpha / rank.
        dropout: share of an adapter's inputs that a step leaves out.
    """

    rank: Positive
    alpha: AboveZero
    dropout: Decay = 0.0


def no_best_of_adapters(lora: LoRAConfig | None, checkpoint: CheckpointConfig) -> None:
    """An earlier checkpoint's weights are exported from its file, which has adapters apart from the matrices.

    Raises:
        RuleBroken: the best checkpoint of adapters is asked for.
    """
    if lora is not None and checkpoint.best:
        raise RuleBroken(
            f"{AT}checkpoint.best=true with {AT}lora.rank={lora.rank}",
            rule="with adapters the last step is exported",
            remedy=f"set {AT}checkpoint.best=false, or {AT}lora=null",
        )


@config
class OptimConfig:
    """AdamW and its learning-rate schedule (:func:`phimr_nemo.training.schedule.learning_rate`).

    Attributes:
        warmup_fraction: share of the steps in which the rate rises linearly to `lr`.
        schedule: what follows: no decay, a linear or a cosine decay to `min_lr`, or warm-up/stable/decay.
        decay_fraction: share of the steps, the last ones, in which `wsd` decays; belongs to it alone.
        clip_grad: largest norm of the gradient; 0 = any.
        distributed: Megatron's distributed optimizer (states sharded over the data-parallel ranks).
    """

    lr: AtLeastZero
    min_lr: AtLeastZero
    warmup_fraction: Share
    schedule: Schedule
    weight_decay: AtLeastZero
    beta1: Decay
    beta2: Decay
    eps: AboveZero
    clip_grad: AtLeastZero
    distributed: bool
    decay_fraction: Share | None = None

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise RuleBroken(
                f"{AT}min_lr={self.min_lr} with {AT}lr={self.lr}",
                rule=f"0 <= {AT}min_lr <= {AT}lr",
                remedy=f"set {AT}min_lr={self.lr} or less, or raise {AT}lr",
            )
        if (self.schedule == "wsd") != (self.decay_fraction is not None):
            raise RuleBroken(
                f"{AT}schedule={self.schedule} with {AT}decay_fraction={self.decay_fraction}",
                rule=f"wsd decays over the share {AT}decay_fraction of the steps; no other schedule has one",
                remedy=f"set {AT}schedule=wsd {AT}decay_fraction=0.2, or "
                f"{AT}decay_fraction=null with another schedule",
            )
        if self.warmup_fraction + (self.decay_fraction or 0.0) > 1.0:
            raise RuleBroken(
                f"{AT}warmup_fraction={self.warmup_fraction} with {AT}decay_fraction={self.decay_fraction}",
                rule="warm-up and decay are shares of the same steps: together at most 1",
                remedy=f"use {AT}warmup_fraction=0.0, or a smaller {AT}decay_fraction",
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

    def __post_init__(self) -> None:
        if self.spike_factor is None and self.on_spike != "warn":
            raise RuleBroken(
                f"{AT}on_spike={self.on_spike} without {AT}spike_factor",
                rule=f"a spike is a value above {AT}spike_factor times the median of those before it",
                remedy=f"set {AT}spike_factor=3.0, or {AT}on_spike=warn",
            )


@config
class EarlyStoppingConfig:
    """Training ends when the stage's measure, `checkpoint.metric`, gets no better.

    Attributes:
        patience: measurements in a row without progress that end training.
        min_delta: progress is a measurement better than the best one by more than this, in the metric's unit.
    """

    patience: Positive
    min_delta: AtLeastZero


@config
class WandbConfig:
    """Weights & Biases; the key comes from its own environment variable or login.

    Attributes:
        project: name of the project there.
        mode: "offline" writes to the run directory, for `wandb sync`.
        name: of the run; the run directory's name when None.
    """

    project: Name
    mode: Literal["online", "offline"]
    name: str | None = None


@config
class TrackingConfig:
    """Where metrics go besides metrics.jsonl and TensorBoard."""

    wandb: WandbConfig | None = None


def is_measured(
    checkpoint: Any,
    early_stopping: EarlyStoppingConfig | None,
    needs: Mapping[str, tuple[str, bool]],
    otherwise: str = "loss",
) -> None:
    """What a run is judged by is measured.

    Args:
        checkpoint: with the stage's `metric`.
        early_stopping: goes by it too.
        needs: metric -> the key that it is measured for, and whether that is set; other metrics always are.
        otherwise: one of those.

    Raises:
        RuleBroken: it is not.
    """
    key, is_set = needs.get(checkpoint.metric, ("", True))
    if (checkpoint.best or early_stopping is not None) and not is_set:
        raise RuleBroken(
            f"{AT}checkpoint.metric={checkpoint.metric} is never measured, and {AT}checkpoint.best or "
            f"{AT}early_stopping goes by it",
            rule=f"{checkpoint.metric} needs {AT}{key}",
            remedy=f"use {AT}checkpoint.metric={otherwise}, or set {AT}{key}, or leave {AT}checkpoint.best and "
            f"{AT}early_stopping out",
        )


def batches_fit(micro_batch: int, global_batch: int, data: int) -> None:
    """The data-parallel ranks share a global batch in whole micro-batches.

    Raises:
        RuleBroken: they cannot.
    """
    share = micro_batch * data
    if global_batch % share:
        raise RuleBroken(
            f"{AT}global_batch={global_batch} with {AT}micro_batch={micro_batch} and {AT}parallel.data={data}",
            rule=f"{AT}global_batch is a multiple of {AT}micro_batch x {AT}parallel.data = {share}",
            remedy=f"use {AT}global_batch={max(1, round(global_batch / share)) * share}",
        )


def stops_on_nan() -> GuardConfig:
    """Return the guard of a stage that skips no batch by default."""
    return GuardConfig(on_nan="stop")
