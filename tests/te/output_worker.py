"""The output layer in 8 bits, over Transformer Engine's own Python, against the same function in bfloat16."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.config import OutputFormat
from phimr_nemo.errors import UserError
from phimr_nemo.losses import IGNORED_LABEL, logprobs

ROWS, VOCABULARY, WIDTH, TEMPERATURE = 45, 320, 64, 0.7
E4M3, E5M2, BF16 = 2.0**-4, 2.0**-3, 2.0**-8
"""Half a step of each format, in parts of a number."""
DEVIATIONS = 6
"""Standard deviations of a sum of independent roundings, which none of some ten thousand sums is beyond."""
Results = dict[str, Tensor]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, this rank's part of the matrix, labels; rows that come to no multiple of 16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    whole = (0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)).bfloat16()
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[3] = IGNORED_LABEL
    return hidden, whole.chunk(dist.get_world_size())[dist.get_rank()], labels


def results(output_format: OutputFormat, *, accumulate: bool = False) -> Results:
    hidden, part, labels = inputs()
    h, w = hidden.requires_grad_(), part.clone().requires_grad_()
    if accumulate:
        w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "tp_group": dist.group.WORLD, "chunk_size": 24}
    values, entropy = logprobs.token_logprobs_and_entropy(
        h, w, labels, output_format=output_format, accumulate=accumulate, **options
    )
    (values * torch.linspace(-1, 1, ROWS)).sum().backward()
    assert h.grad is not None
    assert w.grad is not None
    weight = w.main_grad if accumulate else w.grad
    return {"logprobs": values.detach(), "entropy": entropy.detach(), "hidden": h.grad, "weight": weight}


def bounds() -> Results:
    """By result, the largest difference that the formats' rounding explains.

    A logit's error is a sum of h_i w_i (d_i + e_i) with roundings |d|, |e| <= 2^-4, uniform and independent:
    variance sum (h_i w_i)^2 2 u^2 / 3; and it is rounded to bfloat16. Numbers near 0, where E4M3 has fixed steps, err
    by less than 2^-10 448^-1 of the tensor's largest value. With z off by at most D in a row, log-probabilities are
    off by at most 2 D / T, and probabilities by a factor within exp(+-2 D / T). Gradients are sums of products with
    the logits' gradient in E5M2, whose own difference is that factor's.
    """
    hidden, part, labels = (value.double() if value.is_floating_point() else value for value in inputs())
    whole = torch.cat(_gathered(part))
    u = (2 * E4M3**2 / 3) ** 0.5
    fixed = hidden.abs().max() * whole.abs().max() * 2.0**-9 / 448 * WIDTH
    z = hidden @ whole.t()
    spread = DEVIATIONS * u * ((hidden**2) @ (whole**2).t()).sqrt() + BF16 * z.abs() + fixed
    most = spread.max(1).values / TEMPERATURE
    p = (z / TEMPERATURE).softmax(1)
    entropies = -(p * p.log()).sum(1)
    scale = torch.linspace(-1, 1, ROWS).double()[:, None] / TEMPERATURE
    is_label = torch.zeros_like(p).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    gradient = scale * (is_label - p)
    gradient[labels == IGNORED_LABEL] = 0.0
    # Of each entry: by its probability, and by bfloat16.
    apart = scale.abs() * p * torch.expm1(2 * most)[:, None] + BF16 * gradient.abs()
    v = ((E4M3**2 + E5M2**2) / 3) ** 0.5
    rounded = DEVIATIONS * v * ((gradient**2) @ (whole**2)).sqrt()
    mine = slice(dist.get_rank() * part.shape[0], (dist.get_rank() + 1) * part.shape[0])
    of_weight = DEVIATIONS * v * ((gradient.t() ** 2) @ (hidden**2)).sqrt() + apart.t() @ hidden.abs()
    of_hidden = rounded + apart @ whole.abs()
    return {
        "logprobs": 2 * most,
        # d H = -sum p dz (log p + H), with |dz| <= D.
        "entropy": most * ((p * (p.log() + entropies[:, None]).abs()).sum(1)) * torch.exp(2 * most),
        "hidden": of_hidden + 2 * BF16 * of_hidden.max(),
        "weight": (of_weight + 2 * BF16 * of_weight.max())[mine],
    }


def shares(fault: str = "") -> dict[str, float]:
    """By result, the largest difference between 8 bits and bfloat16, in parts of its bound; and the mean one."""
    wanted = results("own")
    if fault:
        with planted(fault):
            found = results("fp8")
    else:
        found = results("fp8")
    limits = bounds()
    _, _, labels = inputs()
    told: dict[str, float] = {}
    for name, limit in limits.items():
        difference = (found[name].double() - wanted[name].double()).abs()
        keep = labels != IGNORED_LABEL if difference.shape[0] == ROWS else slice(None)
        told[name] = float((difference[keep] / limit[keep].clamp(min=1e-30)).max())
        told[f"{name}: mean"] = float(difference[keep].mean() / wanted[name].double().abs().mean())
    return told


def wide(fault: str = "") -> dict[str, float]:
    """By result, how far logits in float32 by Transformer Engine's product are from those of a float32 copy.

    Args:
        fault: planted: "rounded" to bfloat16 on its way.
    """
    from phimr_nemo.losses import products

    by_copy, asked = results("fp32"), []
    real = products._product

    def product(first: Any, second: Any, layout: str, **options: Any) -> Tensor:
        asked.append((first.dtype, second.dtype, layout, options["out_dtype"]))
        exact = real(first, second, layout, **options)
        return exact.bfloat16().float() if fault == "rounded" else exact

    with (
        mock.patch.object(products, "has_wide_products", return_value=True),
        mock.patch.object(products, "_product", product),
    ):
        found = results("fp32")
    assert set(asked) == {(torch.bfloat16, torch.bfloat16, "TN", torch.float32)}
    return {name: float((found[name] - by_copy[name]).abs().max() / by_copy[name].abs().max()) for name in by_copy}


def planted(fault: str) -> Any:
    """Break one thing that the results depend on."""
    from phimr_nemo.losses import products

    if fault == "scale of smaller values":
        # The package's function of that name hides the module.
        kernels = sys.modules["te_kernels.quantize"]
        real_scale = kernels.scale_of
        return mock.patch.object(kernels, "scale_of", lambda *arguments: 8 * real_scale(*arguments))
    if fault == "gradient of the weight forgotten after the first chunk":
        real, calls = products.EightBits.backward, []

        def once(self: Any, grad_logits: Tensor, rows: Tensor, total: Tensor | None, *, wants_rows: bool) -> Any:
            calls.append(1)
            return real(self, grad_logits, rows, total if len(calls) == 1 else None, wants_rows=wants_rows)

        return mock.patch.object(products.EightBits, "backward", once)
    raise ValueError(fault)


def accumulated() -> float:
    """How far the weight's gradient is from that which autograd gets, where it is added to Megatron's buffer."""
    apart, added = results("fp8")["weight"], results("fp8", accumulate=True)["weight"]
    assert added.dtype == torch.float32
    return float((added - apart).abs().max() / apart.abs().max())


def refusal() -> str:
    """What is said of a matrix with other dimensions."""
    hidden, part, labels = inputs()
    try:
        logprobs.token_logprobs(hidden, part[:-1], labels.clamp(max=100), output_format="fp8")
    except UserError as error:
        return error.problem
    return ""


def _gathered(part: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return parts
