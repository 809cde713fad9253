"""What one optimizer step of a stage does, counted: products, operators, bytes and Python calls, not seconds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from floor_worker import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Work = dict[str, int]

STEPS = 3
"""The first one makes what later ones find; in the second Python's calls are counted, in the third torch's work,
because counting the one makes more of the other."""
FUSED_MULTIPLY_ADD = 2
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
"""An attention operator's products like that of queries and keys, b * heads * length^2 * head_dim multiplications."""


class Counter(TorchDispatchMode):
    """Counts what reaches torch's kernels; views move nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = {"flops": 0, "operators": 0, "bytes": 0, "python_calls": 0}
        self.updates = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = func._schema.returns
        if outputs and all(output.alias_info is not None and not output.alias_info.is_write for output in outputs):
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.work["operators"] += 1
        self.work["bytes"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.work["flops"] += _flops(func.overloadpacket.__name__, args, result)
        return result

    def called(self, _frame: Any, event: str, _argument: Any) -> None:
        """The interpreter's profile hook."""
        if event == "call":
            self.work["python_calls"] += 1

    def updated(self) -> None:
        """An update of the optimizer has ended."""
        self.updates += 1
        if self.updates == 1:
            sys.setprofile(self.called)
        elif self.updates == STEPS - 1:
            sys.setprofile(None)
            self.__enter__()
        elif self.updates == STEPS:
            self.__exit__(None, None, None)


def _flops(name: str, args: Any, result: Any) -> int:
    if name in ATTENTION:
        query = args[0]
        return ATTENTION[name] * FUSED_MULTIPLY_ADD * query.numel() * query.shape[-2]
    factors = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
    if name not in factors:
        return 0
    return FUSED_MULTIPLY_ADD * int(result.numel()) * int(args[factors[name]].shape[-1])


@contextlib.contextmanager
def counted() -> Iterator[Work]:
    """Count from the end of one update of the optimizer to the end of the next."""
    from phimr_nemo.training.adam import FusedFormAdam

    real, counter = FusedFormAdam.step, Counter()

    def step(self: Any, closure: None = None) -> None:
        real(self, closure)
        counter.updated()

    with mock.patch.object(FusedFormAdam, "step", step):
        yield counter.work


@contextlib.contextmanager
def copying(is_planted: bool) -> Iterator[None]:
    """The planted fault: attention makes another copy of what it is given, as an innocent `.contiguous()` would."""
    from phimr_nemo.model.megatron import cpu_layers

    real = cpu_layers.attend

    def attend(heads: torch.Tensor, *more: Any) -> torch.Tensor:
        return real(heads.clone(), *more).clone()

    with mock.patch.object(cpu_layers, "attend", attend) if is_planted else contextlib.nullcontext():
        yield


def count(stage: str, overrides: Sequence[str], is_planted: bool) -> Work:
    """Run a stage and count one of its steps."""
    with copying(is_planted), counted() as work:
        run(stage, overrides)
    return work
