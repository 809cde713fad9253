"""Packed documents under context parallelism: a rank has two parts of every document, one after the other here.

Of the three kinds of steps between ranks one needs all of the queries and the first parts of the keys, one the second
parts of the queries and all keys. These kernels take the parts out and put their results back.
"""

from __future__ import annotations

import torch
from torch import Tensor

SECOND = 1


def _halves(boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in the first, and in the second part of every document."""
    if boundaries.dtype != torch.int32:
        raise TypeError(f"boundaries in {boundaries.dtype}")
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        if (end - start) % 2:
            raise ValueError(f"a rank's {end - start} tokens of a document are no two equal parts")
        first, second = torch.arange(start, end).chunk(2) if end > start else (torch.arange(0),) * 2
        parts[0].append(first)
        parts[1].append(second)
    return torch.cat(parts[0]), torch.cat(parts[1])


def _token_dim(x: Tensor) -> int:
    """[t, heads, d], or keys and values together [2, t, heads, d]."""
    return x.dim() - 3


def thd_read_half_tensor(x: Tensor, boundaries: Tensor, half: int) -> Tensor:
    """One part of every document."""
    return x.index_select(_token_dim(x), _halves(boundaries)[half]).contiguous()


def _packed_only(packed: bool) -> None:
    if not packed:
        raise NotImplementedError("log-sums of exponentials by document; cuDNN from 9.6 packs them")


def thd_read_second_half_lse(lse: Tensor, boundaries: Tensor, packed: bool, tokens: int) -> Tensor:
    """float32 [heads, t] -> [heads, t / 2]."""
    _packed_only(packed)
    found = lse.index_select(1, _halves(boundaries)[SECOND]).contiguous()
    if found.shape[1] != tokens:
        raise ValueError(f"{found.shape[1]} tokens in second parts, {tokens} expected")
    return found


def thd_second_half_lse_correction(lse: Tensor, step: Tensor, boundaries: Tensor, packed: bool) -> None:
    """Add a step's sums [heads, t / 2] to those of the second parts."""
    _packed_only(packed)
    second = _halves(boundaries)[SECOND]
    lse[:, second] = torch.logaddexp(lse[:, second], step.reshape(lse.shape[0], -1))


def thd_out_correction(
    out: Tensor, step: Tensor, lse: Tensor, step_lse: Tensor, boundaries: Tensor, only_second: bool, packed: bool
) -> None:
    """Add a step's output [t or t / 2, heads, d], with its share of the softmax."""
    _packed_only(packed)
    tokens = _halves(boundaries)[SECOND] if only_second else torch.arange(out.shape[0])
    share = (step_lse.reshape(lse.shape[0], -1) - lse[:, tokens]).exp().t()[..., None]
    part = step.reshape(tokens.numel(), *out.shape[1:]).float() * share
    out[tokens] = (out[tokens].float() + part).to(out.dtype)


def thd_grad_correction(gradient: Tensor, step: Tensor, boundaries: Tensor, first: str, second: str) -> None:
    """Put a step's gradient into a whole one, in place.

    Args:
        first, second: what is done to the parts: "copy", "add", or "none", the step has only the others then.
    """
    dim = _token_dim(gradient)
    halves = _halves(boundaries)
    for number, (action, tokens) in enumerate(zip((first, second), halves, strict=True)):
        if action == "none":
            continue
        part = step.index_select(dim, halves[number]) if "none" not in (first, second) else step
        part = part.reshape(gradient.index_select(dim, tokens).shape).to(gradient.dtype)
        if action == "add":
            gradient.index_add_(dim, tokens, part)
        elif action == "copy":
            gradient.index_copy_(dim, tokens, part)
        else:
            raise ValueError(f"action {action}")
