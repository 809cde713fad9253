"""Attention, norm and SwiGLU of the CPU's layers equal plain formulas under autograd, values and every gradient.

In float64, where both sides are exact to about 1e-13, so that a fault cannot hide in rounding; each comparison has a
twin with a planted fault. In float32 the error stays within what rounding of the sums allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phimr_nemo.model.megatron import cpu_attention, cpu_layers, elementwise

EXACT = 1e-10
"""Largest difference in float64 of values of size 1 after sums of some hundred terms."""
FAULT = 1e-3
EPS = 1e-5
TOKENS, HIDDEN = 37, 24
GROUPS, QUERIES, HEAD_DIM, ROTARY_DIM, FACTOR = 2, 3, 8, 6, 1.19
DOCUMENTS = (9, 1, 16, 11)
"""Lengths of a packed row's documents, one of a single token."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value, and the gradients of its product with fixed numbers."""
    leaves = [values.clone().requires_grad_() for values in inputs]
    value = function(*leaves)
    slope = drawn(*value.shape, seed=9, dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, slope)]


def largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted, strict=True))


def plain_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / torch.sqrt((hidden * hidden).mean(-1, keepdim=True) + EPS) * weight


def plain_swiglu(values: Tensor) -> Tensor:
    gate, up = values.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def angles_of(positions: Sequence[int]) -> Tensor:
    rates = torch.tensor([10.0 ** (-2 * pair / ROTARY_DIM) for pair in range(ROTARY_DIM // 2)], dtype=torch.float64)
    half = torch.tensor(positions, dtype=torch.float64)[:, None] * rates
    return torch.cat((half, half), dim=-1)


def plain_attention(heads: Tensor, lengths: Sequence[int], positions: Sequence[int], factor: float) -> Tensor:
    """Head by head and document by document: rotation as complex numbers, then softmax over what came before."""
    pairs = ROTARY_DIM // 2
    turn = torch.polar(torch.full_like(angles_of(positions)[:, :pairs], factor), angles_of(positions)[:, :pairs])

    def turned(head: Tensor) -> Tensor:
        numbers = torch.complex(head[:, :pairs], head[:, pairs:ROTARY_DIM]) * turn
        return torch.cat((numbers.real, numbers.imag, head[:, ROTARY_DIM:]), dim=-1)

    rows = []
    for row in range(heads.shape[1]):
        outputs = []
        for group in range(GROUPS):
            key, value = turned(heads[:, row, group, QUERIES]), heads[:, row, group, QUERIES + 1]
            for query in range(QUERIES):
                scores = turned(heads[:, row, group, query]) @ key.T / math.sqrt(HEAD_DIM)
                document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
                seen = (document[:, None] == document) & torch.ones_like(scores, dtype=torch.bool).tril()
                outputs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ value)
        rows.append(torch.cat(outputs, dim=-1))
    return torch.stack(rows, dim=1)


def attention(positions: Sequence[int], spans: tuple[tuple[int, int], ...] | None) -> Callable[[Tensor], Tensor]:
    tables = elementwise.rotary_tables(angles_of(positions)[:, None, None], HEAD_DIM, FACTOR, torch.float64)
    return lambda heads: cpu_attention.attend(heads, tables, ROTARY_DIM, 1 / math.sqrt(HEAD_DIM), spans)


def test_norm_and_its_gradients_are_the_formula_under_autograd() -> None:
    inputs = drawn(TOKENS, 2, HIDDEN), drawn(HIDDEN, seed=1)
    found = with_gradients(lambda x, w: elementwise.rms_norm(x, w, EPS), *inputs)
    assert largest(found, with_gradients(plain_norm, *inputs)) < EXACT
    # The twin: the scale taken for a constant, as a backward pass that forgets its second term would.
    wrong = with_gradients(lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS).detach() * w, *inputs)
    assert largest(found, wrong) > FAULT


def test_swiglu_and_its_gradient_are_the_formula_under_autograd() -> None:
    [values] = [drawn(TOKENS, 2, 2 * HIDDEN)]
    found = with_gradients(elementwise.swiglu, values)
    assert largest(found, with_gradients(plain_swiglu, values)) < EXACT
    wrong = with_gradients(lambda x: plain_swiglu(x.roll(HIDDEN, dims=-1)), values)
    assert largest(found, wrong) > FAULT


WAYS = {"the kernel": range(TOKENS + 1, TOKENS + 2), "tiles": range(1, TOKENS + 1), "each way": range(10, 12)}


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which documents are cut into tiles, of eight queries and a rest."""
    monkeypatch.setattr(cpu_attention, "TILED", request.param)
    monkeypatch.setattr(cpu_attention, "TILE", 8)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_over_whole_rows_is_brute_force(batch: int) -> None:
    heads = drawn(TOKENS, batch, GROUPS, QUERIES + 2, HEAD_DIM)
    positions = range(TOKENS)
    found = with_gradients(attention(positions, None), heads)
    wanted = with_gradients(lambda x: plain_attention(x, [TOKENS], positions, FACTOR), heads)
    assert largest(found, wanted) < EXACT
    wrong = with_gradients(lambda x: plain_attention(x, [TOKENS], positions, 1.0), heads)
    assert largest(found, wrong) > FAULT


@pytest.mark.usefixtures("tiled")
def test_packed_documents_do_not_see_one_another_and_count_from_zero() -> None:
    assert sum(DOCUMENTS) == TOKENS
    heads = drawn(TOKENS, 1, GROUPS, QUERIES + 2, HEAD_DIM)
    positions = [place for length in DOCUMENTS for place in range(length)]
    plan = cpu_layers.plan_spans(torch.tensor(DOCUMENTS))
    found = with_gradients(attention(positions, plan.spans), heads)
    assert largest(found, with_gradients(lambda x: plain_attention(x, DOCUMENTS, positions, FACTOR), heads)) < EXACT
    # The twin: one boundary moved by a token.
    moved = (DOCUMENTS[0] + 1, *DOCUMENTS[1:3], DOCUMENTS[3] - 1)
    assert largest(found, with_gradients(lambda x: plain_attention(x, moved, positions, FACTOR), heads)) > FAULT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rounding_of_norm_and_swiglu_stays_within_its_bound(dtype: torch.dtype) -> None:
    # A gradient is at most a few roundings of the format away from the exact one of the rounded inputs, and a sum
    # over tokens as many more as it has terms; sums are float32, so that for bfloat16 the last rounding dominates.
    unit = torch.finfo(dtype).eps
    hidden, weight = drawn(TOKENS, 1, HIDDEN, dtype=dtype), drawn(HIDDEN, seed=1, dtype=dtype)
    values = drawn(TOKENS, 1, 2 * HIDDEN, dtype=dtype)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x, w: elementwise.rms_norm(x, w, EPS), plain_norm, (hidden, weight)),
        (elementwise.swiglu, plain_swiglu, (values,)),
    ]
    for function, plain, inputs in cases:
        found = with_gradients(function, *inputs)
        leaves = [tensor.double().requires_grad_() for tensor in inputs]
        value = plain(*leaves)
        slope = drawn(*value.shape, seed=9).to(dtype).double()
        wanted = [value.detach(), *torch.autograd.grad(value, leaves, slope)]
        sizes = [float(tensor.abs().max()) for tensor in wanted]
        for tensor, exact, size in zip(found, wanted, sizes, strict=True):
            assert tensor.dtype == dtype
            assert float((tensor.double() - exact).abs().max()) < 8 * unit * max(size, math.sqrt(TOKENS))


@pytest.mark.usefixtures("tiled")
def test_rounding_of_attention_in_bfloat16_stays_within_its_bound() -> None:
    """Of the exact values of the rounded inputs; a query turned the wrong way is not."""
    heads = drawn(TOKENS, 1, GROUPS, QUERIES + 2, HEAD_DIM, dtype=torch.bfloat16)
    positions = [place for length in DOCUMENTS for place in range(length)]
    tables = elementwise.rotary_tables(angles_of(positions)[:, None, None], HEAD_DIM, FACTOR, torch.float32)
    spans = cpu_layers.plan_spans(torch.tensor(DOCUMENTS)).spans

    def ours(heads: Tensor) -> Tensor:
        return cpu_attention.attend(heads, tables, ROTARY_DIM, 1 / math.sqrt(HEAD_DIM), spans)

    found = with_gradients(ours, heads)
    assert all(values.dtype == torch.bfloat16 for values in found)
    exact = with_gradients(lambda x: plain_attention(x, DOCUMENTS, positions, FACTOR), heads.double())
    # Rounding of the turned heads, of the weights, of the scores' gradient, of the sums, and at the end.
    bound = 8 * torch.finfo(torch.bfloat16).eps
    for values, wanted in zip(found, exact, strict=True):
        assert float((values.double() - wanted).norm() / wanted.norm()) < bound
    wrong = with_gradients(lambda x: plain_attention(x, DOCUMENTS, positions[::-1], FACTOR), heads.double())
    assert float((found[0].double() - wrong[0]).norm() / wrong[0].norm()) > bound


def test_norm_and_swiglu_equal_torch_in_value() -> None:
    hidden, weight = drawn(TOKENS, HIDDEN, dtype=torch.float32), drawn(HIDDEN, seed=1, dtype=torch.float32)
    ours, theirs = elementwise.rms_norm(hidden, weight, EPS), F.rms_norm(hidden, (HIDDEN,), weight, EPS)
    assert float((ours - theirs).abs().max()) < 8 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    gate, up = hidden.chunk(2, dim=-1)
    assert torch.equal(elementwise.swiglu(hidden), F.silu(gate) * up)
