"""LongRoPE's factor on queries and keys: rounded once, kept exact in any number format, on the heads' device."""

from __future__ import annotations

import pytest
import torch

from phimr_nemo.model.megatron.attention import RotaryScale

FACTOR, HEAD, ROTATED = 1.1902380714238083, 16, 12


def scale() -> RotaryScale:
    return RotaryScale(rotary_dim=ROTATED, factor=FACTOR, hidden_size=HEAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_heads_and_their_gradient_are_the_exact_product_rounded_once(dtype: torch.dtype) -> None:
    # Not contiguous, as a query is that was cut out of the projection.
    rows = torch.randn(5, 2, 3, 2 * HEAD, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads = rows[..., :HEAD].detach().requires_grad_()
    slope = torch.randn(5, 2, 3, HEAD, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = scale()(heads)
    found.backward(slope)
    factors = torch.tensor([FACTOR] * ROTATED + [1.0] * (HEAD - ROTATED), dtype=torch.float32)
    assert found.dtype == dtype
    assert torch.equal(found, (heads.float() * factors).to(dtype))
    assert heads.grad is not None
    assert torch.equal(heads.grad, (slope.float() * factors).to(dtype))
    # The twin: a factor that was rounded to bfloat16 itself.
    assert not torch.equal(found, (heads.float() * factors.bfloat16().float()).to(dtype))


def test_factor_is_not_rounded_with_the_model_and_follows_the_heads_once() -> None:
    module = scale().bfloat16()
    assert module.scale.dtype == torch.float32
    assert module.scale[0].item() == torch.tensor(FACTOR).item()
    assert not module.state_dict()
    module(torch.empty(2, HEAD, device="meta"))
    moved = module.scale
    module(torch.empty(2, HEAD, device="meta"))
    assert moved.device.type == "meta"
    assert module.scale is moved
