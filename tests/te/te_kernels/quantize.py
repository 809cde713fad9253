"""FP8 with one scale a tensor, delayed or current: rounding by torch's float8 types, saturating as the GPU does.

A quantiser and an FP8 tensor are Transformer Engine's own objects; read here by their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .names import TORCH_DTYPES, DType


def is_float8(value: Any) -> bool:
    """Whether it is an FP8 tensor of Transformer Engine's."""
    return hasattr(value, "_fp8_dtype")


def is_current_scaling(quantizer: Any) -> bool:
    """Whether the quantiser takes a tensor's scale from the tensor itself."""
    return hasattr(quantizer, "with_amax_reduction")


def to_float8(x: Tensor, scale: Tensor, dtype: DType) -> Tensor:
    """x times scale in FP8, to the nearest (ties to even), at most the largest number; its bytes."""
    kind = TORCH_DTYPES[dtype]
    largest = torch.finfo(kind).max
    return (x.float() * scale).clamp(-largest, largest).to(kind).view(torch.uint8)


def scale_of(amax: Tensor, scale: Tensor, dtype: DType, margin: int = 0) -> Tensor:
    """The scale that puts `amax` at FP8's largest number, less `margin` powers of two; the old one where there is no
    largest value or none that is finite."""
    found = torch.finfo(TORCH_DTYPES[dtype]).max / amax / 2.0**margin
    found = torch.where(torch.isinf(found), torch.finfo(torch.float32).max, found)
    return torch.where((amax > 0) & torch.isfinite(amax), found, scale)


def compute_amax(x: Tensor, amax: Tensor) -> None:
    """The largest magnitude."""
    amax.copy_(x.float().abs().max() if x.numel() else torch.zeros(()))


def _current_scale(x: Tensor, quantizer: Any) -> None:
    if quantizer.force_pow_2_scales:
        raise NotImplementedError("scales that are powers of two")
    compute_amax(x, quantizer.amax)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            quantizer.amax, op=torch.distributed.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group()
        )
    amax = quantizer.amax.clamp(min=quantizer.amax_epsilon)
    quantizer.scale.copy_(scale_of(amax, torch.ones_like(amax), quantizer.dtype))


def _empty(x: Tensor, quantizer: Any, fake_dtype: torch.dtype) -> Any:
    if not quantizer.internal:
        return quantizer.make_empty(x.shape, dtype=fake_dtype, device=x.device)
    from transformer_engine.pytorch.tensor._internal.float8_tensor_base import Float8TensorBase

    transposed = torch.empty(x.shape[-1], x.numel() // x.shape[-1], dtype=torch.uint8)
    return Float8TensorBase(
        data=torch.empty(x.shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        fp8_scale_inv=torch.empty(1),
        fp8_dtype=quantizer.dtype,
        data_transpose=transposed if quantizer.columnwise_usage else None,
        quantizer=quantizer,
    )


def quantize(
    x: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None, *, fake_dtype: torch.dtype | None = None
) -> Any:
    """x in FP8, by rows, by columns (a transposed copy) or both, as the quantiser is set.

    Args:
        x: [..., columns].
        quantizer: its `amax` is raised to x's largest magnitude (delayed) or set to it (current).
        out: an FP8 tensor to write to.
        noop: a flag; where it is 1, `out` stays as it is.
        fake_dtype: what a new tensor says that its format is; x's by default.
    """
    if out is None:
        out = _empty(x, quantizer, fake_dtype or x.dtype)
    if noop is not None and noop.numel() and bool(noop.reshape(-1)[0] == 1):
        return out
    if is_current_scaling(quantizer):
        _current_scale(x, quantizer)
    else:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, x.float().abs().max()))
    values = to_float8(x, quantizer.scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(values.reshape(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(values.reshape(-1, x.shape[-1]).t())
        out._transpose_invalid = False
    out._scale_inv.copy_(1.0 / quantizer.scale)
    out._fp8_dtype = quantizer.dtype
    return out


def dequantized(x: Any, *, columnwise: bool) -> Tensor:
    """float32 [rows, columns] of an FP8 tensor, from its plain or its transposed bytes.

    Raises:
        RuntimeError: they are not there.
    """
    kept = x._transpose if columnwise else x._data
    if kept is None or (columnwise and x._transpose_invalid):
        raise RuntimeError(f"an FP8 tensor without its {'columnwise' if columnwise else 'rowwise'} data")
    matrix = kept.reshape(-1, kept.shape[-1]).view(TORCH_DTYPES[x._fp8_dtype]).float() * x._scale_inv
    return matrix.t() if columnwise else matrix


def dequantize(x: Any, dtype: DType) -> Tensor:
    """A plain tensor."""
    return dequantized(x, columnwise=False).reshape(x._data.shape).to(TORCH_DTYPES[dtype])


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Sum over rows (a bias' gradient), and the gradient in FP8."""
    return gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype), quantize(gradient, quantizer)


def fp8_transpose(data: Tensor, dtype: DType, *, out: Tensor | None = None) -> Tensor:
    """Bytes [..., columns] -> [columns, rows]."""
    del dtype
    turned = data.reshape(-1, data.shape[-1]).t().contiguous()
    return turned if out is None else out.copy_(turned)


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: DType, margin: int
) -> None:
    """The step of delayed scaling: new scales from the histories, whose oldest entry makes room.

    Args:
        amaxes: the last step's, over all processes, of all tensors one after another.
        histories: float32 [entries, tensors] of each module; the first row is the last step's.
        scales: float32 [tensors] of each module.
        algorithm: "max" over the history, or the "most_recent".
    """
    if sum(scale.numel() for scale in scales) != amaxes.numel():
        raise ValueError(f"{amaxes.numel()} largest values for {[scale.numel() for scale in scales]} scales")
    parts = amaxes.split([scale.numel() for scale in scales])
    for amax, history, scale in zip(parts, histories, scales, strict=True):
        history[0] = amax
        chosen = history.amax(0) if algorithm == "max" else amax
        scale.copy_(scale_of(chosen, scale, dtype, margin))
        history.copy_(history.roll(-1, 0))
        history[0] = 0.0
    if algorithm not in ("max", "most_recent") or not math.isfinite(margin):
        raise ValueError(f"algorithm {algorithm}")
