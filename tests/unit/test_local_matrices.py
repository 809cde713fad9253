"""The decoder's matrices with a copy in oneDNN's blocks: the same products, for the rows that they are meant for."""

from __future__ import annotations

import pytest
import torch
from test_local_sampler import (
    FAMILIES,
    LOGPROB_TOLERANCE,
    largest_logprob_error,
    make_family,
    make_hf_model,
    make_requests,
    make_sampler,
)
from torch import Tensor

from phimr_nemo.generate.local import matrices
from phimr_nemo.generate.local.matrices import Matrix, takes_copies
from phimr_nemo.generate.sampler import SamplingParams

OUTPUTS, INPUTS = 640, 448

has_blocks = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this build of torch has no oneDNN"
)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def within_rounding(found: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether every number is within what sums of n products in its format may be off: (n + 2) u sum |a b|."""
    added = torch.zeros(len(weight)).double() if bias is None else bias.double()
    exact = inputs.double() @ weight.double().T + added
    # Sums are in float32, the result is rounded to its format.
    unit, last = torch.finfo(torch.float32).eps / 2, torch.finfo(found.dtype).eps
    size = inputs.double().abs() @ weight.double().abs().T + added.abs()
    return bool(((found.double() - exact).abs() <= (INPUTS + 2) * unit * size + last * exact.abs()).all())


@has_blocks
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 64, 127, 128, 200])
def test_products_are_those_of_the_matrix(rows: int, with_bias: bool) -> None:
    weight, bias = drawn(OUTPUTS, INPUTS), drawn(OUTPUTS) if with_bias else None
    for inputs in (drawn(rows, INPUTS), drawn(rows, 1, INPUTS), drawn(1, rows, INPUTS)):
        found = Matrix(weight, copied=True)(inputs, bias)
        assert found.shape == (*inputs.shape[:-1], OUTPUTS)
        assert within_rounding(found, inputs, weight, bias)


@has_blocks
def test_products_in_16_bits_are_those_of_the_matrix() -> None:
    weight, inputs = drawn(OUTPUTS, INPUTS, dtype=torch.bfloat16), drawn(16, INPUTS, dtype=torch.bfloat16)
    if not takes_copies(weight, weight.numel()):
        pytest.skip("this processor has no products in bf16")
    assert within_rounding(Matrix(weight, copied=True)(inputs), inputs, weight, None)


@has_blocks
@pytest.mark.parametrize("rows", [3, 4, 127, 128])
def test_the_copy_serves_some_tens_of_rows(rows: int) -> None:
    """The planted fault: a copy of another matrix is outside of rounding, and only where the copy is used."""
    weight, inputs = drawn(OUTPUTS, INPUTS), drawn(rows, INPUTS)
    matrix = Matrix(weight, copied=True)
    matrix._copy = Matrix(2 * weight, copied=True)._copy
    assert within_rounding(matrix(inputs), inputs, weight, None) == (rows in (3, 128))


def test_small_and_large_models_and_other_formats_have_no_copies() -> None:
    weight = drawn(8, 8)
    assert Matrix(weight, copied=True)._copy is None, "a call costs more than it saves"
    assert Matrix(drawn(OUTPUTS, INPUTS), copied=False)._copy is None
    assert not takes_copies(weight.double(), 64)
    assert not takes_copies(weight.to("meta"), 64)
    assert not takes_copies(weight, matrices.COPIED_BYTES // 4 + 1)
    assert takes_copies(weight, 64) == hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@has_blocks
@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_a_decoder_with_copies_agrees_with_transformers(family: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "SMALLEST", 1)
    model = make_hf_model() if family is None else make_family(family)
    params, requests = SamplingParams(0.8, 0.9, 16), make_requests([5, 11, 1, 8, 20, 3])
    done = make_sampler(model).sample(requests, params)
    assert largest_logprob_error(model, requests, done, 0.8) < LOGPROB_TOLERANCE
