"""Fused attention and its steps under context parallelism against plain formulas in float64; a fault is caught."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import te_kernels as tex
import torch
from kernel_checks import FAULT, SINGLE, error, gradients, own_positions, random
from torch import Tensor

SCALE = 0.3


def attended(qkv: Sequence[Tensor], causal: bool, shift: int = 0) -> Tensor:
    """[n, heads, d] of each -> the same, in float64."""
    q = qkv[0]
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in qkv[1:])
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * SCALE
    if causal:
        scores = scores + torch.full(scores.shape[1:], -math.inf, dtype=torch.float64).triu(1 + shift)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def run_attention(
    tensors: list[Tensor], layout: str, mask: str, cu: tuple[Tensor, Tensor], longest: tuple[int, int], outer: Tensor
) -> tuple[Tensor, list[Tensor]]:
    names = (tex.NVTE_QKV_Layout[layout], tex.NVTE_Bias_Type.NVTE_NO_BIAS, tex.NVTE_Mask_Type[mask], (-1, -1))
    nothing = [None] * 8
    out, *kept = tex.fused_attn_fwd(
        *longest, True, SCALE, 0.0, True, *names, *cu, *tensors, tensors[0].dtype, *nothing, 16
    )
    slopes = tex.fused_attn_bwd(
        *longest,
        SCALE,
        0.0,
        True,
        *names,
        False,
        *cu,
        *tensors,
        out,
        outer,
        outer.dtype,
        tex.DType.kFloat32,
        kept,
        *[None] * 5,
    )
    assert slopes[3] is None
    return out, [one for one in slopes if one is not None]


@pytest.mark.parametrize("kind", ["SBHD", "BSHD", "THD"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_attention_of_rows_and_documents(kind: str, causal: bool) -> None:
    lengths = (5, 9, 2) if kind == "THD" else (7, 7)
    documents = [[random(n, h, 16, seed=i * 7 + j) for j, h in enumerate((4, 2, 2))] for i, n in enumerate(lengths)]
    outers = [random(n, 4, 16, seed=90 + n + i) for i, n in enumerate(lengths)]

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if kind == "THD" else torch.stack(parts, 1 if kind == "SBHD" else 0)

    tensors = [join([document[i] for document in documents]) for i in range(3)]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    mask = ("PADDING_" if kind == "THD" else "") + "CAUSAL_MASK" if causal else "NO_MASK"
    longest = (max(lengths),) * 2
    out, slopes = run_attention(
        tensors, f"NVTE_{kind}_{kind}_{kind}", f"NVTE_{mask}", (boundaries, boundaries), longest, join(outers)
    )
    wanted = [attended(document, causal=causal) for document in documents]
    assert error(out, join(wanted)) < SINGLE
    of_each = [
        gradients(lambda q, k, v: attended((q, k, v), causal=causal), document, outer)
        for document, outer in zip(documents, outers, strict=True)
    ]
    for index, slope in enumerate(slopes):
        assert error(slope, join([one[index] for one in of_each])) < SINGLE
    # Faults: the other mask; one document sees another.
    assert error(out, join([attended(document, causal=not causal) for document in documents])) > FAULT
    if kind == "THD":
        assert error(out, attended(tensors, causal=causal)) > FAULT


def test_attention_of_the_last_queries_and_the_lse_of_all_keys() -> None:
    q, k, v = random(4, 4, 16), random(10, 2, 16, seed=1), random(10, 2, 16, seed=2)
    cu = (torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 10], dtype=torch.int32))
    outer = random(1, 4, 4, 16, seed=3)
    out, slopes = run_attention(
        [q[None], k[None], v[None]], "NVTE_BSHD_BS2HD", "NVTE_CAUSAL_BOTTOM_RIGHT_MASK", cu, (4, 10), outer
    )
    assert error(out[0], attended((q, k, v), causal=True, shift=6)) < SINGLE
    wanted = gradients(lambda q, k, v: attended((q, k, v), causal=True, shift=6), [q, k, v], outer[0])
    assert all(error(a[0], b) < SINGLE for a, b in zip(slopes, wanted, strict=True))
    # Keys' and values' gradients lie in one tensor, as the layout says.
    assert slopes[1].untyped_storage().data_ptr() == slopes[2].untyped_storage().data_ptr()
    assert error(out[0], attended((q, k, v), causal=True)) > FAULT


def test_attention_refuses_wrong_boundaries() -> None:
    x = random(8, 2, 16)
    for cu, longest in (([0, 5, 9], 5), ([0, 5, 8], 4)):
        table = torch.tensor(cu, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"longer than|tokens"):
            run_attention(
                [x, x, x], "NVTE_THD_THD_THD", "NVTE_PADDING_CAUSAL_MASK", (table, table), (longest,) * 2, x
            )


def test_context_steps_add_up_to_attention_over_the_whole_document() -> None:
    """Two steps of one rank of two, as the exchange between ranks makes them, put together by the kernels."""
    lengths = (8, 16)
    documents = [[random(n, h, 16, seed=i * 5 + j) for j, h in enumerate((4, 2, 2))] for i, n in enumerate(lengths)]
    rank = 0
    mine, theirs = ([own_positions(n, 2, r) for n in lengths] for r in (rank, 1 - rank))

    def part(index: int, places: list[list[int]]) -> Tensor:
        return torch.cat([document[index][p] for document, p in zip(documents, places, strict=True)])

    cu = torch.tensor([0, 4, 12], dtype=torch.int32)
    half = torch.tensor([0, 2, 6], dtype=torch.int32)
    names = (tex.NVTE_QKV_Layout.NVTE_THD_THD_THD, tex.NVTE_Bias_Type.NVTE_NO_BIAS)
    masks = tex.NVTE_Mask_Type
    nothing = [None] * 8
    q, k, v = (part(index, mine) for index in range(3))
    first, lse1, _ = tex.fused_attn_fwd(
        8,
        8,
        True,
        SCALE,
        0.0,
        True,
        *names,
        masks.NVTE_PADDING_CAUSAL_MASK,
        (-1, -1),
        cu,
        cu,
        q,
        k,
        v,
        q.dtype,
        *nothing,
        16,
    )
    second_q = tex.thd_read_half_tensor(q, cu, 1)
    other_k, other_v = part(1, theirs), part(2, theirs)
    second, lse2, _ = tex.fused_attn_fwd(
        4, 8, True, SCALE, 0.0, True, *names, masks.NVTE_PADDING_MASK, (-1, -1), half, cu, second_q, other_k, other_v,
        q.dtype, *nothing, 16,
    )  # fmt: skip
    lse, step = lse1.squeeze(-1).t().contiguous(), lse2.squeeze(-1).t().contiguous()
    before = lse.clone()
    tex.thd_second_half_lse_correction(lse, step, cu, True)
    assert torch.equal(tex.thd_read_second_half_lse(lse, cu, True, 6), lse[:, [2, 3, 8, 9, 10, 11]])
    out = torch.zeros_like(q)
    tex.thd_out_correction(out, first, lse, before, cu, False, True)
    partial = out.clone()
    tex.thd_out_correction(out, second, lse, step, cu, True, True)
    whole = [attended(document, causal=True) for document in documents]
    wanted = torch.cat([one[p] for one, p in zip(whole, mine, strict=True)])
    assert error(out, wanted) < SINGLE
    # Fault: the second step is left out.
    assert error(partial, wanted) > FAULT


def test_context_gradients_are_copied_and_added_by_part() -> None:
    cu = torch.tensor([0, 4, 6], dtype=torch.int32)
    first, second = [0, 1, 4], [2, 3, 5]
    for shape in ((6, 2, 4), (2, 6, 2, 4)):  # one tensor, and keys and values together
        dim = len(shape) - 3
        total, step = random(*shape), random(*shape, seed=1)
        part = step.index_select(dim, torch.tensor([0, 1, 2]))
        found = total.clone()
        tex.thd_grad_correction(found, step, cu, "copy", "add")
        wanted = total.clone()
        for places, source in ((first, step), (second, step + total)):
            wanted.index_copy_(dim, torch.tensor(places), source.index_select(dim, torch.tensor(places)))
        assert torch.equal(found, wanted)
        found = total.clone()
        tex.thd_grad_correction(found, part, cu, "none", "add")
        assert torch.equal(found, total.index_add(dim, torch.tensor(second), part))
        assert not torch.equal(found, total.index_add(dim, torch.tensor(first), part))
        assert tex.thd_read_half_tensor(total, cu, 0).equal(total.index_select(dim, torch.tensor(first)))
