"""Norm, SwiGLU and rotary embedding with backward passes of their own: fewer passes over memory than autograd's.

On a CPU these element-wise parts cost what they move. Autograd would differentiate every elementary operation by
itself; the closed forms below need about half of the passes, keep less, and write gradients where they belong instead
of concatenating them. Statistics and sums are float32 whatever the number format, and every result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Args:
        hidden: [..., h].
        weight: [h].
        eps: added to the mean of the squares.

    Returns:
        [..., h] in the number format of ``hidden``, to which x / sqrt(...) is rounded before the weight, as in
        transformers.
    """
    normalised: Tensor = _RMSNorm.apply(hidden, weight, eps)
    return normalised


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and t = g x: dx = r g w - x r^3 (t . w) / h, dw = sum over tokens of r t.

    Both sums are products of t with a vector, so that each is one pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        norms = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=_statistics(hidden))
        scale = norms.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return torch.mul(hidden, scale, out=torch.empty_like(hidden)).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        size = hidden.shape[-1]
        x, g = (values.reshape(-1, size).to(scale.dtype) for values in (hidden, gradient))
        w, r = weight.to(scale.dtype), scale.reshape(-1, 1)
        product = x * g
        of_weight = torch.mv(product.t(), r[:, 0])
        along = torch.mv(product, w)[:, None].mul_(r.pow(3)).div_(-size)
        of_hidden = torch.mul(g, w, out=product).mul_(r).addcmul_(x, along)
        return of_hidden.to(hidden.dtype).view_as(hidden), of_weight.to(weight.dtype), None


def _statistics(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202).

    Args:
        gate_and_up: [..., 2 f], the gate first.

    Returns:
        [..., f].
    """
    product: Tensor = _SwiGLU.apply(gate_and_up)
    return product


class _SwiGLU(torch.autograd.Function):
    """Both gradients are written into the halves of one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        gradients = torch.empty_like(gate_and_up)
        of_gate, of_up = gradients.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_up)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return gradients


def rotary_tables(angles: Tensor, head_dim: int, factor: float, dtype: torch.dtype) -> Tensor:
    """What :func:`rotate` multiplies with, made once for all layers.

    Args:
        angles: float32 [t, ..., rotary_dim], radians; both halves alike.
        head_dim: of the heads; dimensions past ``rotary_dim`` are not turned.
        factor: multiplies the turned dimensions (LongRoPE's attention factor).
        dtype: of the heads; cosines and sines are rounded to it, as in transformers.

    Returns:
        [2, t, ..., head_dim]: what a head is multiplied with, and what the other halves of the turned dimensions are.
    """
    rotary_dim = angles.shape[-1]
    half = rotary_dim // 2
    tables = torch.zeros((2, *angles.shape[:-1], head_dim), dtype=dtype, device=angles.device)
    cosines, sines = tables
    cosines[..., :rotary_dim] = angles.cos() * factor
    cosines[..., rotary_dim:] = 1.0
    sines[..., :rotary_dim] = angles.sin() * factor
    sines[..., :half].neg_()
    return tables


def rotate(heads: Tensor, turned: int, tables: Tensor, rotary_dim: int, *, back: bool = False) -> Tensor:
    """Turn the first heads of every group by its token's angles.

    Args:
        heads: [s, b, groups, heads of a group, head_dim].
        turned: how many heads of a group; the others are copied.
        tables: of :func:`rotary_tables`, [2, s, 1, 1, head_dim].
        rotary_dim: dimensions that are turned; 0: none are, whatever the tables say.
        back: by the negative angles, which is the gradient of turning.

    Returns:
        A new tensor shaped like ``heads``; where nothing is turned the heads themselves.
    """
    if rotary_dim == 0:
        return heads
    half = rotary_dim // 2
    cosines, sines = tables.unsqueeze(-2)
    result = heads.clone(memory_format=torch.contiguous_format)
    before, after = heads[..., :turned, :], result[..., :turned, :]
    after[..., :half] = before[..., half:rotary_dim]
    after[..., half:rotary_dim] = before[..., :half]
    after.mul_(-sines if back else sines).addcmul_(before, cosines)
    return result
