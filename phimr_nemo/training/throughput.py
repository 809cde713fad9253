"""How fast a run is: tokens and model FLOPs per second and GPU, and the memory that it takes."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from phimr_nemo.losses.device import sent
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.flops import model_flops, peak_flops
from phimr_nemo.process.memory import GIBIBYTE
from phimr_nemo.training import platform

WORK: Final = "work"
"""Name, in a batch, of its document tokens and its causal (query, key) pairs: int64 [2]."""

TERA: Final = 1e12


@dataclass(frozen=True)
class Work:
    """What some steps did, all data-parallel ranks together.

    Attributes:
        slots: places computed, padding included.
        tokens: tokens of documents.
        valid: tokens that are predicted, the ones the loss is the mean over.
        pairs: causal (query, key) pairs.
    """

    slots: float
    tokens: float
    valid: float
    pairs: float


class WorkCounter:
    """Counts the micro-batches that this rank trains on.

    Args:
        chunks: virtual pipeline stages a rank: each one is given every micro-batch.
    """

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks
        self._sums = torch.zeros(4, dtype=torch.float64, device=platform.device())

    def add(self, batch: dict[str, torch.Tensor]) -> None:
        """Count a micro-batch; nothing waits for the GPU."""
        tokens, pairs = batch[WORK].to(torch.float64)
        valid = batch["loss_mask"].sum(dtype=torch.float64)
        slots = torch.full_like(valid, batch["tokens"].numel())
        self._sums += torch.stack([slots, tokens, valid, pairs]).to(self._sums.device)

    def add_counts(self, work: Work) -> None:
        """Count a micro-batch by its numbers, of this rank."""
        sums = torch.tensor([work.slots, work.tokens, work.valid, work.pairs], dtype=torch.float64)
        self._sums += sent(sums, self._sums.device)

    def take(self) -> Work:
        """Everything since the last call, over all data-parallel ranks (collective)."""
        sums = self._sums / self._chunks
        self._sums = torch.zeros_like(self._sums)
        # Ranks of one model replica compute the same documents; those of the context group share them.
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        slots, tokens, valid, pairs = sums.tolist()
        return Work(slots, tokens, valid, pairs)


def rates(work: Work, seconds: float, processes: int, arch: Architecture, fp8: bool) -> dict[str, float]:
    """Metrics of some steps.

    Args:
        work: what they did.
        seconds: that they took.
        processes: of the run; on a GPU machine one has one GPU.
        arch: the model.
        fp8: whether matrix products run in 8 bits, which doubles what the GPU can do.

    Returns:
        `tokens_per_second_per_gpu` (documents), `valid_tokens_per_second_per_gpu` (predicted),
        `slots_per_second_per_gpu` (with padding), `model_tflops_per_gpu`, and `mfu` on a GPU whose peak is known.
    """
    share = seconds * processes
    flops = model_flops(arch, work.tokens, work.pairs) / share
    found = {
        "tokens_per_second_per_gpu": work.tokens / share,
        "valid_tokens_per_second_per_gpu": work.valid / share,
        "slots_per_second_per_gpu": work.slots / share,
        "model_tflops_per_gpu": flops / TERA,
    }
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is not None:
        found["mfu"] = flops / (2 * peak if fp8 else peak)
    return found


class Speed:
    """The metrics of throughput and memory of one run.

    Args:
        counter: what this rank has computed.
        processes: of the run.
        architecture: the model, for its FLOPs.
        fp8: whether matrix products run in 8 bits.
    """

    def __init__(self, counter: WorkCounter, *, processes: int, architecture: Architecture, fp8: bool) -> None:
        self.counter = counter
        self._processes, self._architecture, self._fp8 = processes, architecture, fp8

    def __call__(self, seconds: float) -> dict[str, float]:
        """Return the metrics of everything since the last call, which took so many seconds (collective)."""
        found = rates(self.counter.take(), seconds, self._processes, self._architecture, self._fp8)
        return {**found, "memory_gib": peak_memory_gib()}


def peak_memory_gib() -> float:
    """The most memory so far, of the rank that took most (collective): allocated on the GPU, resident on a CPU."""
    if torch.cuda.is_available():
        used = torch.cuda.max_memory_allocated()
    else:
        # Linux counts in KiB, macOS in bytes.
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    most = torch.tensor([float(used)], dtype=torch.float64, device=platform.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most.item()) / GIBIBYTE


def counted(collate: Any) -> Any:
    """A collate function whose batches also say what work they are."""
    return _Counted(collate)


class _Counted:
    """A class, because worker processes may be sent it."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = self._collate(rows)
        lengths = [int(length) for row in rows for length in row.document_lengths]
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return {**batch, WORK: torch.tensor([sum(lengths), pairs])}
