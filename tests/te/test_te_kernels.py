"""Products, norms, rotation and the kernels over lists, each against a plain formula; a fault is caught."""

from __future__ import annotations

import math

import pytest
import te_kernels as tex
import torch
from kernel_checks import FAULT, SINGLE, error, gemm, gradients, own_positions, random
from torch import Tensor

HALF = 2.0**-8
"""Of one rounding to bfloat16 (2^-9), twice over."""
BF16 = torch.bfloat16


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_products(layout: str) -> None:
    x, weight, slope = random(3, 8, 64), random(24, 64, seed=1), random(3, 8, 24, seed=2)
    wanted = {
        "TN": x.double() @ weight.double().t(),
        "NN": slope.double() @ weight.double(),
        "NT": slope.double().flatten(0, 1).t() @ x.double().flatten(0, 1),
    }[layout]
    a, b = {"TN": (weight, x), "NN": (weight, slope), "NT": (x, slope)}[layout]
    found, _ = gemm(a, b, layout)
    assert found.shape == wanted.shape
    assert error(found, wanted) < SINGLE
    # Fault: the first operand's rows in another order.
    assert error(gemm(a.roll(1, 0), b, layout)[0], wanted) > FAULT


def test_product_adds_to_the_gradient_in_its_own_format() -> None:
    x, slope = random(32, 64, dtype=BF16), random(32, 24, dtype=BF16, seed=2)
    before = random(24, 64, seed=3)
    product = slope.double().t() @ x.double()
    out = before.clone()
    found, _ = gemm(x, slope, "NT", out=out, accumulate=True)
    assert found is out
    assert error(out, before + product) < SINGLE
    # Faults: replaced instead of added; the sum rounded to the operands' format.
    assert error(gemm(x, slope, "NT", out=before.clone())[0], before + product) > FAULT
    assert error((before + product).to(BF16), before + product) > SINGLE


def test_product_with_a_bias() -> None:
    x, weight, bias = random(8, 64), random(24, 64, seed=1), random(24, seed=2)
    plain = x.double() @ weight.double().t()
    found, none = gemm(weight, x, "TN", bias=bias)
    assert none is None
    assert error(found, plain + bias) < SINGLE
    assert error(found, plain) > FAULT
    slope = random(8, 24, seed=3)
    _, gradient = gemm(x, slope, "NT", bias=bias, grad=True)
    assert gradient is not None
    assert error(gradient, slope.double().sum(0)) < SINGLE


def test_product_refuses_what_it_would_get_wrong() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        gemm(random(24, 64, dtype=BF16), random(8, 64), "TN")
    with pytest.raises(ValueError, match="adds to nothing"):
        gemm(random(24, 64), random(8, 64), "TN", accumulate=True)


@pytest.mark.parametrize("centred", [False, True], ids=["weight", "weight + 1"])
def test_rms_norm(centred: bool) -> None:
    x, weight, slope = random(8, 64), random(64, seed=1), random(8, 64, seed=2)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (w + 1 if centred else w)

    found, _, inverse = tex.rmsnorm_fwd(x, weight, 1e-5, None, None, tex.DType.kFloat32, 0, centred)
    assert error(found, norm(x.double(), weight.double())) < SINGLE
    assert error(found, norm(x.double(), weight.double() + 0.1)) > FAULT
    backward = tex.rmsnorm_bwd(slope, x, inverse, weight, 0, centred)
    wanted = gradients(norm, [x, weight], slope)
    assert all(error(a, b) < SINGLE for a, b in zip(backward, wanted, strict=True))
    # Fault: the statistics are taken for constants.
    assert error(slope * inverse[:, None] * (weight + centred), wanted[0]) > FAULT


def test_layer_norm() -> None:
    x, weight, bias, slope = random(8, 64), random(64, seed=1), random(64, seed=2), random(8, 64, seed=3)

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (64,), w, b)

    found, mean, inverse = tex.layernorm_fwd(x, weight, bias, 1e-5, None, None, tex.DType.kFloat32, 0, False)
    assert error(found, norm(x.double(), weight.double(), bias.double())) < SINGLE
    assert error(found, norm(x.double(), weight.double(), bias.double() + 0.1)) > FAULT
    backward = tex.layernorm_bwd(slope, x, mean, inverse, weight, 0, False)
    wanted = gradients(norm, [x, weight, bias], slope)
    assert all(error(a, b) < SINGLE for a, b in zip(backward, wanted, strict=True))


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """[t, heads, d] by complex numbers: the halves of the first dimensions are real and imaginary parts."""
    half = frequencies.numel()
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    angle = positions[:, None].double() * frequencies.double()
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), -1)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["sbhd", "bshd", "thd"])
def test_rotation(kind: str, ranks: int, rank: int) -> None:
    lengths = (8, 24, 16) if kind == "thd" else (24,)
    positions = torch.tensor([p for n in lengths for p in own_positions(n, ranks, rank)])
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    table = torch.outer(torch.arange(32.0), torch.cat((frequencies, frequencies)))[:, None, None]
    x = random(positions.numel(), 2, 10)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    shaped = {"thd": x, "sbhd": x[:, None], "bshd": x[None]}[kind]
    name = tex.NVTE_QKV_Format[f"NVTE_{kind.upper()}"]
    packed = boundaries if kind == "thd" else None
    found = tex.fused_rope_forward(shaped, table, None, name, False, packed, ranks, rank)
    assert found.shape == shaped.shape
    assert error(found.reshape(x.shape), rotated(x, positions, frequencies)) < SINGLE
    # Fault: positions count on from one document to the next, or ranks take their parts in order.
    wrong = torch.arange(positions.numel()) + (rank * positions.numel() if kind != "thd" else 0)
    if not torch.equal(wrong, positions):
        assert error(found.reshape(x.shape), rotated(x, wrong, frequencies)) > FAULT
    back = tex.fused_rope_backward(found, table, name, False, packed, ranks, rank)
    assert error(back, shaped) < SINGLE


@pytest.mark.parametrize("decoupled", [1, 0], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("main", [True, False], ids=["main copies", "none"])
def test_adam_equals_torch(decoupled: int, main: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    start = [random(4, 8), random(5, seed=1)]
    reference = [torch.nn.Parameter(x.double()) for x in start]
    theirs = kind(reference, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    held = [x.clone() for x in start]
    moments = [[torch.zeros_like(x) for x in start] for _ in range(2)]
    rounded = [x.to(BF16) for x in start] if main else held
    for step in range(1, 5):
        slopes = [random(*x.shape, seed=step * 9 + i) for i, x in enumerate(start)]
        for parameter, slope in zip(reference, slopes, strict=True):
            parameter.grad = slope.double()
        theirs.step()
        lists = [slopes, rounded, *moments, *([held] if main else [])]
        tex.multi_tensor_adam(64, torch.zeros(1), lists, 0.01, 0.9, 0.95, 1e-8, step, decoupled, 1, 0.1)
    for found, wanted, low, first in zip(held, reference, rounded, start, strict=True):
        assert error(found - first, wanted.detach() - first) < SINGLE * 10
        assert error(low, found) < HALF
        # Fault: no bias correction would move the weights by less in the first steps.
        assert error(found * 0.99, wanted.detach()) > FAULT / 10


def test_scaling_and_norms_of_lists() -> None:
    tensors = [random(3, 4), random(7, seed=1)]
    flag, out = torch.zeros(1, dtype=torch.int), [torch.empty_like(x) for x in tensors]
    tex.multi_tensor_scale(64, flag, [tensors, out], 0.25)
    assert all(torch.equal(a, b * 0.25) for a, b in zip(out, tensors, strict=True))
    assert flag.item() == 0
    tex.multi_tensor_scale(64, flag, [[torch.tensor([1.0, math.inf])], [torch.empty(2)]], 0.25)
    assert flag.item() == 1
    every = torch.cat([x.flatten() for x in tensors]).double()
    total, each = tex.multi_tensor_l2norm(64, flag, [tensors], True)
    assert total.item() == pytest.approx(float(every.norm()), rel=SINGLE)
    assert each.tolist() == pytest.approx([float(x.norm()) for x in tensors], rel=SINGLE)
    # Fault: the sum of the norms instead of the norm of all.
    assert total.item() != pytest.approx(sum(each.tolist()), rel=FAULT)
    unscaled, _ = tex.multi_tensor_unscale_l2norm(64, flag, [tensors], torch.tensor([0.5]))
    assert unscaled.item() == pytest.approx(float(every.norm()) / 2, rel=SINGLE)
    with pytest.raises(ValueError, match="lists"):
        tex.multi_tensor_scale(64, flag, [tensors, out[:1]], 1.0)


def test_kernel_that_is_not_here_says_its_name() -> None:
    with pytest.raises(NotImplementedError, match="swiglu"):
        tex.swiglu(random(2, 2))
