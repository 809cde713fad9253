"""The fused kernels of the output layer under Triton's interpreter, against the same function in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.config import OutputFormat
from phimr_nemo.losses import IGNORED_LABEL, logprobs

ROWS, VOCABULARY, WIDTH, TEMPERATURE = 11, 300, 32, 0.7
BLOCK = 64
"""So that a row's words do not come out even."""


def compare(output_format: OutputFormat, fault: str = "") -> dict[str, float]:
    """By result, how far the fused path is from plain PyTorch (parts of the largest value); ranks share the words."""
    from phimr_nemo.losses import fused

    kernels: dict[str, Callable[..., Any]] = {
        name: functools.partial(getattr(fused, name), block=BLOCK) for name in ("statistics", "gradient")
    }
    if fault == "every label is this rank's":
        kernels = {name: functools.partial(_all_owned, kernel) for name, kernel in kernels.items()}
    elif fault == "no temperature":
        kernels["gradient"] = functools.partial(_at_one, kernels["gradient"])
    wanted = _results(output_format)
    with (
        mock.patch.object(logprobs, "is_fused", return_value=True),
        mock.patch.object(fused, "statistics", kernels["statistics"]),
        mock.patch.object(fused, "gradient", kernels["gradient"]),
    ):
        found = _results(output_format)
    return {
        name: float((found[name].double() - wanted[name].double()).abs().max() / wanted[name].double().abs().max())
        for name in wanted
    }


def _all_owned(kernel: Callable[..., Any], logits: Tensor, columns: Tensor, owned: Tensor, *rest: Any) -> Any:
    return kernel(logits, columns, torch.ones_like(owned), *rest)


def _at_one(kernel: Callable[..., Any], logits: Tensor, columns: Tensor, owned: Tensor, _: float, *rest: Any) -> Any:
    return kernel(logits, columns, owned, 1.0, *rest)


def _results(output_format: OutputFormat) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    whole = (0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)).bfloat16()
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[3] = IGNORED_LABEL
    # The first and the last word: the ends of a rank's part.
    labels[0], labels[1] = 0, VOCABULARY - 1
    part = whole.chunk(dist.get_world_size())[dist.get_rank()]
    options: dict[str, Any] = {"temperature": TEMPERATURE, "tp_group": dist.group.WORLD, "chunk_size": 4}
    options["output_format"] = output_format
    found: dict[str, Tensor] = {}
    for name, with_entropy in (("plain", False), ("with entropy", True)):
        h, w = hidden.clone().requires_grad_(), part.clone().requires_grad_()
        if with_entropy:
            values, entropy = logprobs.token_logprobs_and_entropy(h, w, labels, **options)
            found["entropy"] = entropy.detach()
            loss = (values * torch.arange(ROWS)).sum() + 0.3 * entropy.square().sum()
        else:
            values = logprobs.token_logprobs(h, w, labels, **options)
            loss = (values * torch.arange(ROWS)).sum()
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        found |= {f"{name}: logprobs": values.detach(), f"{name}: hidden": h.grad, f"{name}: weight": w.grad}
    return found
