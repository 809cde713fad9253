"""What only an update needs waits in the host's memory while others sample on the trainer's GPU.

Storages are emptied and filled again under tensors that stay the same ones: Megatron's optimizers, its gradient
buffers and their views all hold on to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """Tensors that can be put away. Both methods do nothing the second time.

    Args:
        copied: tells those that have their values again when they come back, bit for bit. It is asked every time: an
            optimizer makes its moments in its first step.
        zeroed: tells those that have zeros then; they take no room in the host.
    """

    def __init__(self, copied: Callable[[], Iterable[Tensor]], zeroed: Callable[[], Iterable[Tensor]]) -> None:
        self._to_copy, self._to_zero = copied, zeroed
        self._copied: list[Tensor] = []
        self._zeroed: list[Tensor] = []
        # Kept from round to round: pinned memory is slow to get.
        self._hosts: list[Tensor] = []
        self._is_away = False

    def put_away(self) -> int:
        """Free the device's memory; the bytes of it that were freed."""
        if self._is_away:
            return 0
        self._copied, self._zeroed = _whole_storages(self._to_copy()), _whole_storages(self._to_zero())
        if [host.numel() for host in self._hosts] != [whole.numel() for whole in self._copied]:
            self._hosts = [
                torch.empty(whole.numel(), dtype=torch.uint8, device="cpu", pin_memory=whole.is_cuda)
                for whole in self._copied
            ]
        for whole, host in zip(self._copied, self._hosts, strict=True):
            host.copy_(whole)
        freed = sum(whole.numel() for whole in (*self._copied, *self._zeroed))
        for whole in (*self._copied, *self._zeroed):
            whole.untyped_storage().resize_(0)
        if torch.cuda.is_available():
            # Else it is this process's all the same.
            torch.cuda.empty_cache()
        self._is_away = True
        return freed

    def bring_back(self) -> None:
        """Take the memory, and the values."""
        if not self._is_away:
            return
        for whole in (*self._copied, *self._zeroed):
            whole.untyped_storage().resize_(whole.numel())
        for whole, host in zip(self._copied, self._hosts, strict=True):
            whole.copy_(host)
        for whole in self._zeroed:
            whole.zero_()
        self._is_away = False


def optimizer_tensors(megatron: Any, model: Any) -> Iterator[Tensor]:
    """Master weights and moments of Megatron's optimizer; not the weights themselves, where it updates those.

    Args:
        megatron: a chain of optimizers, each around one of PyTorch's kind.
        model: what they update.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for part in megatron.chained_optimizers:
        inner = part.optimizer
        held = [parameter for group in inner.param_groups for parameter in group["params"]]
        held += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        yield from (tensor for tensor in held if tensor.untyped_storage().data_ptr() not in own)


def gradient_tensors(model: Any) -> Iterator[Tensor]:
    """Megatron's gradient buffers; not one that holds the weights as well.

    Args:
        model: in Megatron's DistributedDataParallel.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for buffer in (*model.buffers, *model.expert_parallel_buffers):
        if buffer.grad_data.untyped_storage().data_ptr() not in own:
            yield buffer.grad_data


def _whole_storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The storages under tensors, each once, as bytes."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            found.setdefault(storage.data_ptr(), whole)
    return list(found.values())
