"""Tensors on their way to a GPU, whose queue of work nothing is to wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the CPU without waiting until the device is done with what it was given before.

    A copy from ordinary memory can wait, so it starts from pinned memory.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")
