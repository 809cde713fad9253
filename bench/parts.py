"""Where the time of training steps goes, from torch's profiler: shares of the wall time by part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

ATTENTION, MATMUL, LOSS = "attention", "matrix products", "loss, without its products"
OPTIMIZER, DATA, OTHER = "optimizer and clipping", "data", "norms, rotary, activations, copies"
COMMUNICATION, FRAMEWORK = "communication", "framework: outside of torch's operators"
PARTS = (MATMUL, ATTENTION, LOSS, OTHER, OPTIMIZER, COMMUNICATION, DATA, FRAMEWORK)
SCOPES = {
    "part: loss": LOSS,
    "part: optimizer": OPTIMIZER,
    "Optimizer.step#": OPTIMIZER,
    "enumerate(DataLoader)#": DATA,
    "autograd::engine::evaluate_function: _TokenLogprobsBackward": LOSS,
}
"""Beginnings of the names of profiled ranges -> part."""
OPERATORS = {
    "scaled_dot_product": ATTENTION,
    "_flash_attention": ATTENTION,
    "FusedAttn": ATTENTION,
    "aten::mm": MATMUL,
    "aten::addmm": MATMUL,
    "aten::bmm": MATMUL,
    "aten::baddbmm": MATMUL,
    "general_gemm": MATMUL,
    "log_softmax": LOSS,
    "nll_loss": LOSS,
    "cross_entropy": LOSS,
    "clip_grad": OPTIMIZER,
    "foreach_norm": OPTIMIZER,
    "_fused_adam": OPTIMIZER,
    "gloo:": COMMUNICATION,
    "nccl:": COMMUNICATION,
    "c10d::": COMMUNICATION,
}
"""What stands in an operator's name -> part."""
MICROSECONDS = 1e6


def part_of(names: Sequence[str]) -> str:
    """The part that an operator's own time belongs to.

    Args:
        names: its name, then those of the ranges around it, innermost first.
    """
    for text, part in OPERATORS.items():
        if text in names[0]:
            return part
    for name in names:
        for beginning, part in SCOPES.items():
            if name.startswith(beginning):
                return part
    # Attention's operators call plain ones; so does the loss on some devices.
    for name in names[1:]:
        for text, part in OPERATORS.items():
            if text in name and part in (ATTENTION, LOSS):
                return part
    return OTHER


def shares(events: Iterable[Any], seconds: float, *, on_gpu: bool = False) -> dict[str, float]:
    """Part -> share of the wall time.

    Args:
        events: the profiler's function events.
        seconds: wall time of the profiled steps.
        on_gpu: count the time of the kernels that an operator started; the rest is then the GPU's idle time.
    """
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its operator has its time
        names, parent = [event.name], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        found[part_of(names)] += getattr(event, time) / MICROSECONDS
    found[FRAMEWORK] = max(seconds - sum(found.values()), 0.0)
    total = max(seconds, sum(found.values()))
    return {name: value / total for name, value in found.items()}


def length_variance_between_rows(rows: Sequence[Sequence[int]]) -> float:
    """Share of the variance of the documents' log lengths that lies between rows: 1 = a row holds one length only.

    The nearer to 1, the fewer kinds of documents an update sees, and the slower a model learns from as many updates.

    Args:
        rows: the lengths of each row's documents.
    """
    logs = [[math.log(length) for length in row] for row in rows]
    every = [value for row in logs for value in row]
    mean = statistics.fmean(every)
    between = sum(len(row) * (statistics.fmean(row) - mean) ** 2 for row in logs)
    return between / sum((value - mean) ** 2 for value in every)


@contextmanager
def scopes() -> Iterator[None]:
    """Name the loss and Megatron's optimizer step in the profile."""
    from megatron.core.optimizer import optimizer as megatron

    from phimr_nemo.model.megatron import gpt as model

    def named(owner: Any, function: str, label: str) -> Any:
        real = getattr(owner, function)

        def inside(*arguments: Any, **options: Any) -> Any:
            with torch.profiler.record_function(label):
                return real(*arguments, **options)

        return mock.patch.object(owner, function, inside)

    with ExitStack() as stack:
        stack.enter_context(named(model, "token_logprobs", "part: loss"))
        for kind in (megatron.ChainedOptimizer, megatron.FP32Optimizer, megatron.MixedPrecisionOptimizer):
            stack.enter_context(named(kind, "step", "part: optimizer"))
        yield


def table(sides: dict[str, dict[str, float]]) -> str:
    """A markdown table of the shares, a column a side."""
    lines = [f"| part of the time | {' | '.join(sides)} |", "|---|" + "---:|" * len(sides)]
    lines += [f"| {part} | {' | '.join(f'{found[part]:.1%}' for found in sides.values())} |" for part in PARTS]
    return "\n".join(lines)
