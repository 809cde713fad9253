"""All layouts of a training stage on a number of GPUs: impossible, too large, or ranked by speed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from phimr_nemo.config import MidtrainConfig, ParallelConfig, RoundsConfig, SFTConfig, TrainingPlanConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.flops import model_flops
from phimr_nemo.model.layout import check_layout
from phimr_nemo.plan.hardware import FRAGMENTATION, FRAMEWORK_BYTES, Gpu, MatmulDtype, find_gpu
from phimr_nemo.plan.memory import RankMemory, Recompute, largest_rank, logits_chunk
from phimr_nemo.plan.rounds import Held, Round, planned_round
from phimr_nemo.plan.timing import StepTime, Work, step_time
from phimr_nemo.plan.weights import layer_parameters
from phimr_nemo.plan.workload import StageConfig, Workload, training_workload

MICRO_BATCHES: Final = (1, 2, 4, 8)
MAX_CONTEXT: Final = 16
VIRTUAL: Final = (1, 2, 4)
FP8_COPIES: Final = 2
"""Bytes for each weight of the layers that FP8 keeps beside bf16: a cast and its transpose."""

SECONDS_A_DAY: Final = 86_400
EQUAL_SPEED: Final = 0.01
"""Relative difference of step times that the model cannot tell apart."""


@dataclass(frozen=True)
class Candidate:
    """One way of running a stage."""

    parallel: ParallelConfig
    micro_batch: int
    recompute: Recompute


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU.

    Attributes:
        rank: what training holds.
        reference: a second copy of the weights.
        sampler: the sampler's weights; of a colocated server, which sleeps while a step trains, what it keeps;
            of servers on GPUs of their own nothing.
        copies: weights in FP8.
        fragmentation: what the allocator cannot use.
        framework: CUDA, NCCL and library workspaces.
    """

    rank: RankMemory
    reference: float
    sampler: float
    copies: float
    fragmentation: float
    framework: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        others = self.reference + self.sampler + self.copies + self.fragmentation + self.framework
        return self.rank.total + others

    def parts(self) -> dict[str, float]:
        """Bytes by part, without the empty ones; they add up to `total`."""
        rank = self.rank
        parts = {
            "weights": rank.state.weights,
            "gradients (fp32)": rank.state.gradients,
            "optimizer": rank.state.optimizer,
            "activations": rank.activations,
            "widest backward phase": rank.backward,
            "pipeline buffers": rank.pipeline,
            "reference weights": self.reference,
            "sampler": self.sampler,
            "FP8 weights": self.copies,
            "fragmentation": self.fragmentation,
            "framework": self.framework,
        }
        return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True)
class Fitting:
    """A layout that fits, with its speed.

    Attributes:
        micro_batches: of a step on each data-parallel rank.
        step: of training, one optimizer update.
        updates: of them in a step.
        training: seconds of all of its updates.
        rollouts: of the step; None where none are sampled.
        waiting: share of the training time that the mean data-parallel rank waits for the slowest.
        seconds: of a whole step.
        tokens_a_gpu_second: real tokens trained on, by the trainer's GPUs and those of servers together.
        mfu: model FLOPs of those tokens over the bf16 peak of the same GPUs.
        days: of the run.
    """

    candidate: Candidate
    memory: Memory
    micro_batches: int
    step: StepTime
    updates: int
    training: float
    rollouts: Round | None
    waiting: float
    seconds: float
    tokens_a_gpu_second: float
    mfu: float
    days: float


@dataclass(frozen=True)
class Refused:
    """A layout that does not fit.

    Attributes:
        excess: bytes beyond what may be used.
    """

    candidate: Candidate
    memory: Memory
    excess: float


@dataclass(frozen=True)
class TrainingPlan:
    """Layouts of a stage.

    Attributes:
        usable: bytes of a GPU without the head-room.
        fitting: fastest first.
        refused: smallest excess first.
        impossible: number of layouts that the model or the batch cannot be split into.
    """

    usable: float
    workload: Workload
    fitting: Sequence[Fitting]
    refused: Sequence[Refused]
    impossible: int


def plan_training(
    plan: TrainingPlanConfig, config: StageConfig, arch: Architecture, pinned: frozenset[str]
) -> TrainingPlan:
    """Look at every layout.

    Args:
        plan: GPUs, data, head-room.
        config: the stage's configuration.
        arch: the model.
        pinned: keys of `config` that stay as they are: `parallel.tensor`, `micro_batch`, `model.recompute`, ...

    Raises:
        UserError: an unknown GPU, or no layout is possible at all.
    """
    gpu = find_gpu(plan.gpu)
    workload = training_workload(plan, config)
    usable = gpu.memory * (1 - plan.head_room)
    fitting: list[Fitting] = []
    refused: list[Refused] = []
    impossible = 0
    slowest: dict[tuple[int, int], tuple[int, float]] = {}
    for candidate in candidates(config, plan.gpus, pinned):
        if not _is_possible(arch, workload, candidate):
            impossible += 1
            continue
        shared = (candidate.micro_batch, candidate.parallel.data)
        if shared not in slowest:
            slowest[shared] = workload.slowest_rank(*shared)
        outcome = _judge(plan, config, arch, gpu, workload, usable, candidate, *slowest[shared])
        if isinstance(outcome, Fitting):
            fitting.append(outcome)
        else:
            refused.append(outcome)
    if not fitting and not refused:
        raise UserError(
            f"none of {impossible} layouts of {plan.gpus} GPUs is possible",
            rule="tensor x pipeline x context x data = gpus; they divide heads, layers and batch",
            remedy="change gpus, the batch size or the keys that you fixed",
        )
    return TrainingPlan(
        usable=usable,
        workload=workload,
        fitting=sorted(fitting, key=_rank),
        refused=sorted(refused, key=lambda option: option.excess),
        impossible=impossible,
    )


def _rank(option: Fitting) -> tuple[float, ...]:
    """Fastest first; what is equal to a hundredth in the order of fewer splits and smaller micro-batches."""
    parallel = option.candidate.parallel
    speed = round(math.log(option.seconds) / math.log1p(EQUAL_SPEED))
    splits = parallel.tensor * parallel.pipeline * parallel.context
    return (speed, splits, option.candidate.micro_batch, option.seconds)


def candidates(config: StageConfig, gpus: int, pinned: frozenset[str]) -> Iterator[Candidate]:
    """Every combination of tensor, pipeline, context and data parallelism, micro-batch and recomputation.

    Sequence parallelism goes with tensor parallelism: it moves as many bytes and keeps fewer.
    """
    fixed = config.parallel

    def sizes(name: str, given: int, most: int) -> list[int]:
        if f"parallel.{name}" in pinned:
            return [given]
        return [size for size in range(1, most + 1) if gpus % size == 0]

    micro_batches = (config.micro_batch,) if "micro_batch" in pinned else MICRO_BATCHES
    recomputes: tuple[Recompute, ...] = ("none", "mlp", "full")
    if "model.recompute" in pinned:
        recomputes = (config.model.recompute,)
    for tensor in sizes("tensor", fixed.tensor, gpus):
        for pipeline in sizes("pipeline", fixed.pipeline, gpus // tensor):
            for context in sizes("context", fixed.context, min(MAX_CONTEXT, gpus // (tensor * pipeline))):
                data, rest = divmod(gpus, tensor * pipeline * context)
                if rest or ("parallel.data" in pinned and data != fixed.data):
                    continue
                sequence = fixed.sequence if "parallel.sequence" in pinned else tensor > 1
                # Alignment has no virtual pipelining.
                is_supervised = isinstance(config, MidtrainConfig | SFTConfig)
                virtuals = VIRTUAL if pipeline > 1 and is_supervised else (1,)
                if "parallel.virtual" in pinned:
                    virtuals = (fixed.virtual,)
                if (sequence and tensor == 1) or (max(virtuals) > 1 and pipeline == 1):
                    continue
                for virtual, micro_batch, recompute in itertools.product(virtuals, micro_batches, recomputes):
                    parallel = ParallelConfig(
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        data=data,
                        sequence=sequence,
                        virtual=virtual,
                    )
                    yield Candidate(parallel, micro_batch, recompute)


def _is_possible(arch: Architecture, workload: Workload, candidate: Candidate) -> bool:
    try:
        check_layout(arch, candidate.parallel)
    except UserError:
        return False
    if not workload.is_even(candidate.micro_batch, candidate.parallel.data):
        return False
    if candidate.parallel.virtual == 1:
        return True
    # Megatron's interleaved schedule takes micro-batches in groups as large as the pipeline, the same on every rank.
    per_rank, rest = divmod(workload.samples, candidate.parallel.data * candidate.micro_batch)
    return workload.rows != "joined" and rest == 0 and per_rank % candidate.parallel.pipeline == 0


def _judge(
    plan: TrainingPlanConfig,
    config: StageConfig,
    arch: Architecture,
    gpu: Gpu,
    workload: Workload,
    usable: float,
    candidate: Candidate,
    count: int,
    tokens: float,
) -> Fitting | Refused:
    parallel, dtype = candidate.parallel, config.model.dtype
    memory = _training_memory(config, arch, workload, candidate, count)
    rollouts = None
    if isinstance(config, RoundsConfig):
        state = memory.rank.state
        held = Held(
            # Training's activations are not there while the sampler works.
            by_engine=memory.total - memory.rank.moving - memory.fragmentation,
            # Gradients are given up, the rest moves.
            by_server=state.weights + memory.copies + memory.framework,
            moved=state.optimizer + memory.reference,
        )
        rollouts = planned_round(plan, config, arch, gpu, workload.lengths, usable=usable, held=held)
        # What is needed at least: keys and values of one sequence of mean length beside the training step.
        memory = dataclasses.replace(memory, sampler=rollouts.kept)
    if memory.total > usable or (rollouts is not None and rollouts.sampling is None):
        return Refused(candidate, memory, max(memory.total - usable, 0.0))
    # A GPU's 16-bit formats are equally fast.
    matmul: MatmulDtype = "fp8" if config.model.fp8 is not None else "fp32" if dtype == "fp32" else "bf16"
    work = Work(
        tokens=tokens,
        attention_length=workload.lengths.weighted,
        micro_batches=count,
        forward_only=workload.forward_only,
        hides_gradients=workload.hides_gradients,
        hides_weights=workload.hides_weights,
    )
    step = step_time(
        arch,
        parallel,
        gpu,
        dtype,
        candidate.recompute,
        work,
        distributed=config.optim.distributed,
        matmul=matmul,
        output_format=config.model.output_format,
        logits_bytes=config.model.logits_bytes,
    )
    # Every further update of a step costs its communication and its optimizer once more.
    training = step.total + (workload.updates - 1) * (step.data + step.optimizer)
    seconds = training if rollouts is None else rollouts.seconds(training)
    gpus = plan.gpus + (rollouts.servers if rollouts else 0)
    # A token sees half of its document on average.
    flops = model_flops(arch, workload.tokens, workload.tokens * workload.lengths.weighted / 2)
    return Fitting(
        candidate=candidate,
        memory=memory,
        micro_batches=count,
        step=step,
        updates=workload.updates,
        training=training,
        rollouts=rollouts,
        waiting=1 - workload.tokens / (tokens * count * parallel.data),
        seconds=seconds,
        tokens_a_gpu_second=workload.tokens / seconds / gpus,
        mfu=flops / (seconds * gpus * gpu.peak["bf16"]),
        days=seconds * workload.steps / SECONDS_A_DAY,
    )


def _training_memory(
    config: StageConfig, arch: Architecture, workload: Workload, candidate: Candidate, count: int
) -> Memory:
    parallel, dtype = candidate.parallel, config.model.dtype
    rank = largest_rank(
        arch,
        parallel,
        dtype,
        "transformer_engine",
        candidate.recompute,
        workload.largest(candidate.micro_batch),
        micro_batches=count,
        distributed=config.optim.distributed,
        logits_bytes=config.model.logits_bytes,
        output_format=config.model.output_format,
    )
    copies = 0.0
    if config.model.fp8 is not None:
        layers = arch.num_hidden_layers / parallel.pipeline
        copies = FP8_COPIES * layers * layer_parameters(arch, parallel.tensor)
    if config.model.fp8_output:
        # The output matrix, and a chunk's gradient.
        tokens = workload.largest(candidate.micro_batch).tokens / parallel.context
        chunk = logits_chunk(arch, parallel, dtype, tokens, "transformer_engine", config.model.logits_bytes, "fp8")
        copies += FP8_COPIES * (arch.hidden_size + chunk) * arch.vocab_size / parallel.tensor
    return Memory(
        rank=rank,
        reference=rank.state.weights if workload.reference else 0.0,
        sampler=0.0,
        copies=copies,
        fragmentation=FRAGMENTATION * rank.moving,
        framework=FRAMEWORK_BYTES,
    )
