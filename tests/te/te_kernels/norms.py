"""RMSNorm and LayerNorm with float32 statistics; the result may be FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .names import TORCH_DTYPES, DType
from .quantize import is_current_scaling, quantize


def _weights(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()


def _finish(result: Tensor, out: Any, quantizer: Any, dtype: DType) -> Any:
    """The float32 result in its final format. Delayed scaling is fused with the norm; current scaling has to see all
    of the result first, which is rounded to the plain format in between."""
    if quantizer is None:
        rounded = result.to(TORCH_DTYPES[dtype])
        return rounded if out is None else out.copy_(rounded)
    if is_current_scaling(quantizer):
        result = result.to(TORCH_DTYPES[dtype])
    return quantize(result, quantizer, out, fake_dtype=TORCH_DTYPES[dtype])


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous() or weight.shape != x.shape[1:]:
        raise ValueError(f"a norm of {tuple(x.shape)} with a weight of {tuple(weight.shape)}")


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: DType,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """[n, h] -> the same, nothing, and float32 [n], one over the root mean square."""
    del sm_margin
    _check(x, weight)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    result = wide * inverse[:, None] * _weights(weight, zero_centered)
    return _finish(result, out, quantizer, dtype), None, inverse


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    del sm_margin
    _check(x, weight)
    unit = x.float() * inverse[:, None]
    wide = gradient.reshape(x.shape).float()
    inner = wide * _weights(weight, zero_centered)
    dx = inverse[:, None] * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    return dx.to(x.dtype), (wide * unit).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: DType,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, Tensor, Tensor]:
    """[n, h] -> the same, and float32 [n]: mean, one over the standard deviation."""
    del sm_margin
    _check(x, weight)
    wide = x.float()
    mean = wide.mean(-1)
    centred = wide - mean[:, None]
    inverse = torch.rsqrt(centred.square().mean(-1) + eps)
    result = centred * inverse[:, None] * _weights(weight, zero_centered) + bias.float()
    return _finish(result, out, quantizer, dtype), mean, inverse


def layernorm_bwd(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    del sm_margin
    _check(x, weight)
    unit = (x.float() - mean[:, None]) * inverse[:, None]
    wide = gradient.reshape(x.shape).float()
    inner = wide * _weights(weight, zero_centered)
    centred = inner - inner.mean(-1, keepdim=True) - unit * (inner * unit).mean(-1, keepdim=True)
    dx = inverse[:, None] * centred
    return dx.to(x.dtype), (wide * unit).sum(0).to(weight.dtype), wide.sum(0).to(weight.dtype)
