"""Products of the decoder's matrices with few rows, which is what sampling token by token asks for.

A product with some tens of rows is bound by how the matrix is read. torch's own (MKL) lays the matrix out anew in
every call; oneDNN multiplies with a copy that was laid out in its blocks once, as vLLM's CPU build does.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from phimr_nemo.process.memory import GIBIBYTE

FEWEST_ROWS: Final = 4
MOST_ROWS: Final = 127
"""Products with fewer or more rows are as fast without the copy or faster."""

SMALLEST: Final = 2**18
"""Numbers of a matrix below which a call costs more than the copy saves."""

COPIED_BYTES: Final = GIBIBYTE
"""What the matrices of a model may take together for a copy to be kept of them."""


class Matrix:
    """A matrix [outputs, inputs] of the decoder.

    Args:
        weight: the matrix; kept as it is.
        copied: keep a copy in oneDNN's blocks too, if it is large enough.
    """

    def __init__(self, weight: Tensor, *, copied: bool) -> None:
        self._weight = weight
        self._copy: Tensor | None = None
        if copied and weight.numel() >= SMALLEST:
            self._copy = torch.ops.mkldnn._reorder_linear_weight(weight, MOST_ROWS)

    def __call__(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        rows = inputs.numel() // inputs.shape[-1]
        if self._copy is None or not FEWEST_ROWS <= rows <= MOST_ROWS:
            return F.linear(inputs, self._weight, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._copy, bias, "none", [], "")
        return found


def takes_copies(like: Tensor, numbers: int) -> bool:
    """Whether copies are kept of a model's matrices.

    Args:
        like: one of them, for dtype and device.
        numbers: of all of them.
    """
    operators = torch.ops.mkldnn
    if like.device.type != "cpu" or not hasattr(operators, "_reorder_linear_weight"):
        return False
    known = like.dtype == torch.float32 or (like.dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported())
    return known and numbers * like.element_size() <= COPIED_BYTES
