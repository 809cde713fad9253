"""How long a GPU takes to sample responses token by token, and what it holds for that.

A decoding step reads every weight once and the keys and values of every sequence in it, so it is bound by the memory
(Pope et al. 2022, arXiv 2211.05102, section 2). The efficiency is that of a tuned engine with CUDA graphs and paged
keys and values; the built-in engine is not one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from phimr_nemo.config.engine import COLOCATED_SHARE, ServerEngine, TrainedEngine
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.flops import matmul_parameters
from phimr_nemo.plan.hardware import (
    DECODE_EFFICIENCY,
    HOST_EFFICIENCY,
    NODE_EFFICIENCY,
    SLEEPING_BYTES,
    Gpu,
    matmul_rate,
)
from phimr_nemo.plan.timing import OPERATIONS
from phimr_nemo.plan.weights import BYTES_PER_NUMBER
from phimr_nemo.plan.workload import Lengths


@dataclass(frozen=True)
class SamplingTime:
    """Sampling on one GPU.

    Attributes:
        seconds: for all its sequences.
        tokens_a_second: of one GPU.
        at_once: sequences whose keys and values fit.
        cache_bytes: keys and values of that many sequences of mean length.
    """

    seconds: float
    tokens_a_second: float
    at_once: int
    cache_bytes: float


def cache_bytes_a_token(arch: Architecture, dtype: str) -> int:
    """Keys and values of one token in all layers."""
    return 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * BYTES_PER_NUMBER[dtype]


def sampling_time(
    arch: Architecture, gpu: Gpu, dtype: str, *, sequences: int, lengths: Lengths, free_bytes: float
) -> SamplingTime | None:
    """Seconds in which one GPU samples its share of a round.

    Args:
        arch: the model, whole on the GPU.
        gpu: which.
        dtype: of weights, keys and values.
        sequences: to sample.
        lengths: of sequences; the longest is sampled to its end whatever the others do.
        free_bytes: for keys and values.

    Returns:
        None when not even the longest sequence's keys and values fit.
    """
    a_token = cache_bytes_a_token(arch, dtype)
    if free_bytes < lengths.limit * a_token:
        return None
    at_once = min(sequences, int(free_bytes // (lengths.mean * a_token)))
    tokens = sequences * lengths.mean
    # New sequences take the places of finished ones; at the end the longest runs alone.
    steps = max(float(lengths.limit), tokens / at_once)
    weights = steps * arch.num_parameters * BYTES_PER_NUMBER[dtype]
    # At each of its L steps a sequence reads what it has so far: L^2 / 2 tokens.
    cache = tokens * lengths.weighted / 2 * a_token
    seconds = (weights + cache) / (gpu.memory_bandwidth * DECODE_EFFICIENCY)
    seconds = max(seconds, tokens * OPERATIONS * matmul_parameters(arch) / matmul_rate(gpu, "bf16"))
    return SamplingTime(
        seconds=seconds,
        tokens_a_second=tokens / seconds,
        at_once=at_once,
        cache_bytes=math.ceil(at_once * lengths.mean) * a_token,
    )


@dataclass(frozen=True)
class Turn:
    """What a colocated server meets on the trainer's GPU while it samples.

    Attributes:
        free_bytes: for keys and values, beside its weights.
        seconds: in which the trainer makes room and takes it back; nothing is computed meanwhile.
    """

    free_bytes: float
    seconds: float


def colocated_turn(
    gpu: Gpu, share: float | None, *, usable: float, stays: float, moves: float, weights: float
) -> Turn:
    """A round's turn of a server on one GPU.

    Args:
        gpu: which.
        share: of its memory, for the server; None = what `phimr serve --colocated` takes.
        usable: bytes of the GPU without head-room.
        stays: bytes that the trainer keeps there.
        moves: bytes that it sends to the host's memory and gets back.
        weights: bytes of the server's.
    """
    room = min((COLOCATED_SHARE if share is None else share) * gpu.memory, usable - stays)
    return Turn(
        free_bytes=room - weights - SLEEPING_BYTES,
        seconds=2 * moves / (gpu.host_bandwidth * HOST_EFFICIENCY),
    )


def sync_time(
    arch: Architecture, gpu: Gpu, dtype: str, *, engine: TrainedEngine, gpus: int, bytes_a_second: float | None
) -> float:
    """Seconds in which a round's weights reach what samples with them.

    Process 0 sends them to every host of rollout servers, one after the other, or writes them once to a directory
    that all of them read. An engine in the trainer's processes gathers what its GPU does not hold from the others of
    its node.

    Args:
        arch: the model.
        gpu: which; servers are on as many nodes as the GPUs fill.
        dtype: of the weights.
        engine: what samples.
        gpus: how many sample.
        bytes_a_second: measured for one host of servers, or through files; unused elsewhere.
    """
    size = arch.num_parameters * BYTES_PER_NUMBER[dtype]
    if not isinstance(engine, ServerEngine):
        return size / (gpu.node_bandwidth * NODE_EFFICIENCY)
    if bytes_a_second is None:
        raise UserError(
            f"no sync_bytes_a_second, and {engine.kind} samples",
            rule="weights that go to rollout servers take time",
            remedy="sync_bytes_a_second=2.4e8, which bench/weight_sync.py measured over HTTP, or your own figure",
        )
    is_once = engine.directory is not None or engine.transfer == "nccl"
    times = 1 if is_once else math.ceil(gpus / gpu.node_size)
    return times * size / bytes_a_second
