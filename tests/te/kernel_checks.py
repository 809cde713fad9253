"""What the tests of the lane's kernels share: inputs, errors, and formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import te_kernels as tex
import torch
from torch import Tensor

SINGLE = 1e-5
"""Relative error of float32 sums over up to 64 terms."""
FAULT = 0.02
"""A planted fault is at least this far away."""
WORKSPACE = torch.empty(16, dtype=torch.uint8)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], outer: Tensor) -> list[Tensor]:
    """By autograd, in float64."""
    wide = [x.double().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*wide), wide, outer.double()))


def gemm(a: Any, b: Any, layout: str, **changes: Any) -> tuple[Tensor, Tensor | None]:
    values = {"out": None, "dtype": None, "bias": None, "grad": False, "accumulate": False, **changes}
    result, bias, _, _ = tex.generic_gemm(
        a,
        layout[0] == "T",
        b,
        layout[1] == "T",
        values["out"],
        None,
        values["dtype"],
        values["bias"],
        tex.DType.kBFloat16,
        False,
        None,
        values["grad"],
        WORKSPACE,
        WORKSPACE.numel(),
        values["accumulate"],
        True,
    )
    return result, bias


def own_positions(length: int, ranks: int, rank: int) -> list[int]:
    """A context rank's tokens of a sequence: its part from the front and from the back."""
    if ranks == 1:
        return list(range(length))
    part = length // (2 * ranks)
    return [*range(rank * part, (rank + 1) * part), *range(length - (rank + 1) * part, length - rank * part)]
