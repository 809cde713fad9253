"""The output layer's Triton kernels, compiled, against the function in plain PyTorch on the same GPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from phimr_nemo.config import OutputFormat
from phimr_nemo.losses import IGNORED_LABEL, logprobs

TOKENS, VOCABULARY, WIDTH = 1500, 20_011, 256
SINGLE = 1e-5
STEP = 2.0**-7
"""Of bfloat16; see tests/te/test_fused_output.py, where the same kernels are interpreted."""

pytestmark = pytest.mark.gpu


def results(entropy: bool, output_format: OutputFormat) -> dict[str, Tensor]:
    """Log-probabilities and gradients, from inputs that are the same every time."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16().cuda().requires_grad_()
    weight = (0.1 * torch.randn(VOCABULARY, WIDTH, generator=generator)).bfloat16().cuda().requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::7] = IGNORED_LABEL
    found: dict[str, Tensor] = {}
    options: dict[str, Any] = {"temperature": 0.7, "output_format": output_format}
    if entropy:
        values, found["entropy"] = logprobs.token_logprobs_and_entropy(hidden, weight, labels, **options)
        loss = values.sum() + 0.3 * found["entropy"].square().sum()
    else:
        values = logprobs.token_logprobs(hidden, weight, labels, **options)
        loss = values.sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return found | {"logprobs": values, "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("output_format", ["own", "fp32"])
@pytest.mark.parametrize("entropy", [False, True])
def test_fused_output_layer_is_the_plain_one(entropy: bool, output_format: OutputFormat) -> None:
    assert logprobs.is_fused(torch.empty(1, dtype=torch.bfloat16, device="cuda"))
    found = results(entropy, output_format)
    with mock.patch.object(logprobs, "is_fused", return_value=False):
        wanted = results(entropy, output_format)
    for name, value in wanted.items():
        error = float((found[name].double() - value.double()).abs().max() / value.double().abs().max())
        assert error < (2 * STEP if name in ("hidden", "weight") else SINGLE), name
