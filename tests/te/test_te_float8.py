"""FP8 kernels against the definition of the formats (arXiv 2209.05433) and of the scalings; a fault is caught."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import te_kernels as tex
import torch
from kernel_checks import FAULT, SINGLE, error, gemm, random
from te_kernels.quantize import scale_of, to_float8
from torch import Tensor


def float8(bits: int, mantissa: int, bias: int, largest: float) -> Tensor:
    """All finite numbers of a format of so many stored bits: (1 + m / 2^M) 2^(e - bias), and those below 1."""
    values = [
        (m / 2**mantissa + (e > 0)) * 2.0 ** (max(e, 1) - bias)
        for e in range(2 ** (bits - mantissa - 1))
        for m in range(2**mantissa)
    ]
    positive = torch.tensor([value for value in values if value <= largest], dtype=torch.float64)
    return torch.cat((-positive.flip(0), positive))


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [(tex.DType.kFloat8E4M3, float8(8, 3, 7, 448.0)), (tex.DType.kFloat8E5M2, float8(8, 2, 15, 57344.0))],
    ids=["E4M3", "E5M2"],
)
def test_rounding_to_float8_is_to_the_nearest_number_and_saturates(dtype: tex.DType, numbers: Tensor) -> None:
    kind = {tex.DType.kFloat8E4M3: torch.float8_e4m3fn}.get(dtype, torch.float8_e5m2)
    largest = float(numbers.max())
    x = torch.cat((random(512) * 3, random(64, seed=1) * largest, torch.tensor([0.0, 1e6, -1e6, 1e-9])))
    found = to_float8(x, torch.tensor(2.0), dtype).view(kind).double()
    nearest = (numbers[None] - (x.double() * 2.0)[:, None]).abs().min(1)
    assert torch.equal((found - x.double() * 2.0).abs(), nearest.values)
    assert found.abs().max() == largest
    # Fault: the scale is forgotten.
    assert error(to_float8(x[:512], torch.tensor(1.0), dtype).view(kind), x[:512] * 2.0) > FAULT


def quantizer(current: bool, **changes: Any) -> Any:
    values = {"scale": torch.tensor([4.0]), "amax": torch.tensor([0.5]), "dtype": tex.DType.kFloat8E4M3}
    if current:
        values |= {"with_amax_reduction": False, "force_pow_2_scales": False, "amax_epsilon": 0.0}
    return SimpleNamespace(**{**values, **changes})


def empty_float8(rows: int, columns: int) -> Any:
    return SimpleNamespace(
        _data=torch.zeros(rows, columns, dtype=torch.uint8),
        _transpose=torch.zeros(columns, rows, dtype=torch.uint8),
        _transpose_invalid=True,
        _scale_inv=torch.zeros(1),
        _fp8_dtype=None,
    )


@pytest.mark.parametrize("current", [False, True], ids=["delayed", "current"])
def test_quantised_tensor_scale_largest_value_and_transpose(current: bool) -> None:
    x = random(32, 16) * 3
    how = quantizer(current)
    found = tex.quantize(x, how, empty_float8(32, 16))
    amax = x.abs().max()
    scale = 448.0 / amax if current else torch.tensor(4.0)
    assert how.scale.item() == pytest.approx(float(scale))
    assert how.amax.item() == pytest.approx(float(amax if current else max(amax, torch.tensor(0.5))))
    plain = tex.dequantize(found, tex.DType.kFloat32)
    # E4M3 has three stored bits: half a step is 2^-4 of the number.
    assert error(plain, x) < 2.0**-4
    assert torch.equal(tex.fp8_transpose(found._data, found._fp8_dtype), found._transpose)
    # Faults: with the scale itself instead of its inverse, and by one of the other kind's scales.
    found._scale_inv = how.scale
    assert error(tex.dequantize(found, tex.DType.kFloat32), x) > FAULT
    kept = found._data.clone()
    tex.quantize(x * 2, quantizer(current), found, torch.ones(1))
    assert torch.equal(found._data, kept)


def test_largest_value_of_several_micro_batches_is_kept_by_delayed_scaling() -> None:
    how = quantizer(False, amax=torch.zeros(1))
    for x in (random(4, 16), random(4, 16, seed=1) * 9, random(4, 16, seed=2)):
        tex.quantize(x, how, empty_float8(4, 16))
    assert how.amax.item() == float(random(4, 16, seed=1).mul(9).abs().max())


def test_products_of_float8_use_the_data_that_the_gpu_has() -> None:
    weight = tex.quantize(random(24, 64), quantizer(True), empty_float8(24, 64))
    x = tex.quantize(random(8, 64, seed=1), quantizer(True), empty_float8(8, 64))
    slope = tex.quantize(random(8, 24, seed=2), quantizer(True), empty_float8(8, 24))
    for tensor in (weight, x, slope):
        tensor.size = tensor._data.size
    wide = {
        name: tex.dequantize(t, tex.DType.kFloat32).double() for name, t in (("w", weight), ("x", x), ("s", slope))
    }
    f32 = {"dtype": tex.DType.kFloat32}
    assert error(gemm(weight, x, "TN", **f32)[0], wide["x"] @ wide["w"].t()) < SINGLE
    assert error(gemm(weight, slope, "NN", **f32)[0], wide["s"] @ wide["w"]) < SINGLE
    assert error(gemm(x, slope, "NT", **f32)[0], wide["s"].t() @ wide["x"]) < SINGLE
    # Fault: a weight that was quantised for the forward alone.
    weight._transpose_invalid = True
    with pytest.raises(RuntimeError, match="columnwise"):
        gemm(weight, slope, "NN", **f32)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_delayed_scales_follow_from_the_history(algorithm: str) -> None:
    history = torch.tensor([[7.0, 0.0, 1.0], [2.0, 0.0, 64.0], [8.0, 0.0, 3.0]])
    scale, before = torch.tensor([5.0, 6.0, 7.0]), history.clone()
    amaxes = torch.tensor([4.0, 0.0, 2.0])
    tex.fused_amax_and_scale_update_after_reduction(amaxes, [history], [scale], algorithm, tex.DType.kFloat8E4M3, 1)
    chosen = {"max": (8.0, 64.0), "most_recent": (4.0, 2.0)}[algorithm]
    # The second tensor was never used: its scale stays.
    assert scale.tolist() == [448.0 / chosen[0] / 2, 6.0, 448.0 / chosen[1] / 2]
    # The first row is for the next step; the last one is the newest.
    assert torch.equal(history, torch.stack((torch.zeros(3), before[2], amaxes)))
    wrong = {"max": (4.0, 2.0), "most_recent": (8.0, 64.0)}[algorithm]
    assert scale[0].item() != 448.0 / wrong[0] / 2


def test_scale_of_a_value_that_is_not_finite_stays() -> None:
    amax = torch.tensor([math.inf, math.nan, 0.0, 1e-45, 2.0])
    found = scale_of(amax, torch.full((5,), 3.0), tex.DType.kFloat8E5M2)
    assert found.tolist() == [3.0, 3.0, 3.0, torch.finfo(torch.float32).max, 57344.0 / 2]
