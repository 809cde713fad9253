"""The three products of the output layer with a chunk of tokens: in its own format, with wider logits, in 8 bits.

In 8 bits they are those of Transformer Engine's hybrid format with current scaling (Micikevicius et al. 2022, arXiv
2209.05433): hidden states and matrix in E4M3, the logits' gradient in E5M2, a scale for each tensor from its largest
value.
Results are summed in float32; logits and hidden states' gradients are then rounded to the matrix's format.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor

from phimr_nemo.config import OutputFormat
from phimr_nemo.errors import UserError
from phimr_nemo.losses.vocabulary import accumulate_weight_gradient, has_wide_products, statistics_dtype

MULTIPLE: Final = 16
"""cuBLASLt's 8-bit products take dimensions that are multiples of this."""


class Products(Protocol):
    """Of a matrix [words, h] with chunks of its inputs and of their logits' gradients."""

    def logits(self, rows: Tensor) -> Tensor:
        """[chunk, h] -> [chunk, words], in a buffer of their own."""
        ...

    def backward(self, grad_logits: Tensor, rows: Tensor, total: Tensor | None, *, wants_rows: bool) -> Tensor | None:
        """A chunk's gradients.

        Args:
            grad_logits: [chunk, words], in the matrix's format.
            rows: [chunk, h].
            total: [words, h], float32 for a matrix of 16 bits, to which the matrix's gradient is added; None = it is
                not wanted.
            wants_rows: whether the rows' gradient is returned, [chunk, h].
        """
        ...


class OwnFormat:
    """In the matrix's own format.

    Args:
        weight: [words, h].
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def logits(self, rows: Tensor) -> Tensor:
        """See :class:`Products`."""
        return torch.mm(rows.to(self._weight.dtype), self._weight.t())

    def backward(self, grad_logits: Tensor, rows: Tensor, total: Tensor | None, *, wants_rows: bool) -> Tensor | None:
        """See :class:`Products`."""
        found = torch.mm(grad_logits, self._weight) if wants_rows else None
        if total is not None:
            accumulate_weight_gradient(total, grad_logits, rows)
        return found


class WideLogits(OwnFormat):
    """Logits in float32 of a matrix of 16 bits: what their products add up to is not rounded to 16 bits again.

    A product of two numbers of 16 bits is exact in float32, so these are the logits of float32 copies, up to the
    order of the sums, and take no longer where Transformer Engine multiplies. Elsewhere the matrix is copied.

    Args:
        weight: [words, h].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._copy = None if has_wide_products(weight) else weight.to(statistics_dtype(weight))

    def logits(self, rows: Tensor) -> Tensor:
        """See :class:`Products`."""
        rows = rows.to(self._weight.dtype)
        if self._copy is not None:
            return torch.mm(rows.to(self._copy.dtype), self._copy.t())
        return _product(self._weight, rows, "TN", out_dtype=torch.float32)


class EightBits:
    """In 8 bits, with Transformer Engine. Chunks are filled with rows of zeros up to what the products take.

    Args:
        weight: [words, h] in 16 bits; it is cast once, for all chunks.
        with_gradients: whether more than the logits is asked for.

    Raises:
        UserError: the matrix has dimensions that 8-bit products do not take.
    """

    def __init__(self, weight: Tensor, *, with_gradients: bool) -> None:
        if any(size % MULTIPLE for size in weight.shape):
            raise UserError(
                f"model.fp8_output=true with an output matrix of {tuple(weight.shape)} on each rank",
                rule=f"8-bit products take multiples of {MULTIPLE} words and numbers of a hidden state",
                remedy="use model.fp8_output=false, or another parallel.tensor",
            )
        self._dtype = weight.dtype
        self._weight = _cast(weight, "kFloat8E4M3", with_transpose=with_gradients)

    def logits(self, rows: Tensor) -> Tensor:
        """See :class:`Products`."""
        inputs = _cast(_filled(rows.to(self._dtype)), "kFloat8E4M3", with_transpose=False)
        return _product(self._weight, inputs, "TN", out_dtype=self._dtype)[: rows.shape[0]]

    def backward(self, grad_logits: Tensor, rows: Tensor, total: Tensor | None, *, wants_rows: bool) -> Tensor | None:
        """See :class:`Products`."""
        slopes = _cast(_filled(grad_logits), "kFloat8E5M2", with_transpose=total is not None)
        if total is not None:
            inputs = _cast(_filled(rows.to(self._dtype)), "kFloat8E4M3", with_transpose=True)
            _product(inputs, slopes, "NT", out_dtype=total.dtype, grad=True, accumulate=True, out=total)
        if not wants_rows:
            return None
        return _product(self._weight, slopes, "NN", out_dtype=self._dtype, grad=True)[: rows.shape[0]]


def products_of(weight: Tensor, output_format: OutputFormat, *, with_gradients: bool) -> Products:
    """The products of a call.

    Args:
        weight: [words, h].
        output_format: of logits and products; a matrix that is not of 16 bits has no wider logits than its own.
        with_gradients: whether more than the logits is asked for.
    """
    if output_format == "fp8":
        return EightBits(weight, with_gradients=with_gradients)
    return WideLogits(weight) if is_wider(weight, output_format) else OwnFormat(weight)


def is_wider(weight: Tensor, output_format: OutputFormat) -> bool:
    """Whether logits have more bits than the matrix."""
    return output_format == "fp32" and weight.dtype != statistics_dtype(weight)


def _cast(matrix: Tensor, format_name: str, *, with_transpose: bool) -> Any:
    """In 8 bits; with a transposed copy for products that read it by columns."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    quantizer = Float8CurrentScalingQuantizer(
        getattr(tex.DType, format_name), matrix.device, rowwise=True, columnwise=with_transpose
    )
    return quantizer(matrix.detach().contiguous())


def _product(first: Any, second: Any, layout: str, **options: Any) -> Tensor:
    """Transformer Engine's product, with the accumulators that its recipe of current scaling asks for."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm
    from transformer_engine.pytorch.module.base import get_workspace

    found: Tensor = general_gemm(
        first, second, get_workspace(), layout=layout, use_split_accumulator=True, **options
    )[0]
    return found


def _filled(rows: Tensor) -> Tensor:
    """With rows of zeros up to a multiple."""
    missing = -rows.shape[0] % MULTIPLE
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
