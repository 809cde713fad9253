"""Kernels over lists of tensors: Adam, scaling, norms. Their lists are pairwise of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


def _check(lists: Lists, expected: Sequence[int]) -> None:
    if len(lists) not in expected or len({len(tensors) for tensors in lists}) != 1:
        raise ValueError(f"{len(lists)} lists of {[len(tensors) for tensors in lists]} tensors")
    for together in zip(*lists, strict=True):
        if len({tensor.numel() for tensor in together}) != 1:
            raise ValueError(f"tensors of {[tensor.numel() for tensor in together]} numbers")


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float) -> None:
    """lists[1] = lists[0] x scale; raises the flag where a number is not finite."""
    del chunk
    _check(lists, (2,))
    for source, target in zip(*lists, strict=True):
        scaled = source.float() * float(scale)
        if not bool(torch.isfinite(source.float()).all()):
            noop.fill_(1)
        target.copy_(scaled)


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: Lists, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """float32 [1], the norm over all tensors, and [tensors] each one's norm, where asked for."""
    del chunk, noop
    _check(lists, (1,))
    each = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return each.norm().reshape(1), each if per_tensor else torch.empty(0)


def multi_tensor_unscale_l2norm(
    chunk: int, noop: Tensor, lists: Lists, inverse_scale: Tensor, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The same of the tensors times a number."""
    total, each = multi_tensor_l2norm(chunk, noop, lists, per_tensor)
    return total * inverse_scale, each * inverse_scale


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of Adam, or with `decoupled` of AdamW (arXiv 1711.05101), in float32.

    Args:
        lists: gradients, parameters, both moments, and where there are any the float32 copies of the parameters,
            which are then what is updated; the parameters are rounded from them.
    """
    del chunk, noop
    _check(lists, (4, 5))
    correction1 = 1.0 - beta1**step if bias_correction else 1.0
    correction2 = 1.0 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second, *main in zip(*lists, strict=True):
        held = main[0] if main else parameter
        value, slope = held.float(), gradient.float().view(held.shape)
        if not decoupled:
            slope = slope + weight_decay * value
        first.lerp_(slope.to(first.dtype).view(first.shape), 1.0 - beta1)
        second.mul_(beta2).add_(slope.square().to(second.dtype).view(second.shape), alpha=1.0 - beta2)
        change = (first / correction1) / ((second / correction2).sqrt() + eps)
        if decoupled:
            change = change + weight_decay * value.view(change.shape)
        held.copy_(value - lr * change.view(held.shape))
        if main:
            parameter.copy_(held.view(parameter.shape))
