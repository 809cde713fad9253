"""Matrix products as cuBLASLt does them for Transformer Engine: summed in float32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .names import TORCH_DTYPES, DType
from .quantize import dequantized, is_float8


def _operand(matrix: Any, *, columnwise: bool) -> Tensor:
    """float32 [rows, columns] of an operand. Hopper's FP8 products read a transposed copy where a plain one would be
    read by columns; a tensor that was quantised without it cannot take part."""
    if is_float8(matrix):
        return dequantized(matrix, columnwise=columnwise)
    if not matrix.is_floating_point():
        raise TypeError(f"a product of {matrix.dtype}")
    return matrix.reshape(-1, matrix.shape[-1]).float()


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
    """op(b) @ op(a), row-major: ``TN`` is x W^T, ``NN`` is dy W, ``NT`` is dy^T x.

    Args:
        a, b: [..., columns], plain or FP8.
        out: written to, or added to with `accumulate`, in its own format.
        out_dtype: of a new result.
        bias: added to every row; with `grad` its gradient is asked for, the sum over `b`'s rows.

    Returns:
        Result, bias' gradient, nothing (GELU's input), `extra_output`.
    """
    del bias_dtype, use_split_accumulator, comm_type
    if quantizer is not None or gelu or gelu_in is not None or comm_overlap is not None or bulk_overlap:
        raise NotImplementedError("a product with FP8 output, GELU or overlapped communication")
    if workspace.dtype != torch.uint8 or workspace_size > workspace.numel():
        raise ValueError(f"a workspace of {workspace.numel()} x {workspace.dtype} for {workspace_size} bytes")
    if is_float8(a) != is_float8(b):
        raise TypeError("a product of an FP8 with a plain matrix")
    if not is_float8(a) and a.dtype != b.dtype:
        raise TypeError(f"a product of {a.dtype} and {b.dtype}")
    # Row-wise data of `a` serve a transposed, of `b` a plain operand.
    left, right = _operand(b, columnwise=transb), _operand(a, columnwise=not transa)
    result = (left.t() if transb else left) @ (right.t() if transa else right)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = left.sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if out is None:
        if out_dtype is None and is_float8(a):
            raise ValueError("an FP8 product without a format of its result")
        dtype = a.dtype if out_dtype is None else TORCH_DTYPES[out_dtype]
        shape = result.shape if transb else (*b.size()[:-1], result.shape[-1])
        if accumulate:
            raise ValueError("a product that adds to nothing")
        return result.reshape(shape).to(dtype), bias_gradient, None, extra_output
    if not out.is_contiguous():
        raise ValueError("a result that is not contiguous")
    result = result.reshape(out.shape)
    out.copy_(out.float() + result if accumulate else result)
    return out, bias_gradient, None, extra_output
