"""FusedFormAdam: torch's AdamW to the last bit, in the form that Megatron's distributed optimizer saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phimr_nemo.training.adam import FusedFormAdam

STEPS = 5


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((7, 3), (5,), (0,))]


def gradient(param: Tensor, step: int) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(step))


def groups(params: list[Tensor]) -> list[dict[str, object]]:
    return [
        {"params": [params[0], params[2]], "weight_decay": 0.1, "lr": 3e-3},
        {"params": [params[1]], "weight_decay": 0.0, "lr": 1e-2},
    ]


def test_equals_torch_adamw_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [
        FusedFormAdam(groups(ours), **settings),
        torch.optim.AdamW(groups(theirs), fused=True, **settings),
    ]
    for step in range(STEPS):
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            for param in params:
                param.grad = gradient(param, step)
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


def test_groups_hold_what_fused_adam_reads_from_them() -> None:
    """Transformer Engine's `step` takes these from a group that it did not make, when a run goes on with it."""
    [group, _] = FusedFormAdam(groups(parameters())).param_groups
    assert group.keys() == {"params", "lr", "bias_correction", "betas", "eps", "weight_decay"}
    assert group["bias_correction"] is True


def test_first_step_by_hand() -> None:
    """With zero moments the bias-corrected step is lr * g / (|g| + eps), after the decay lr * decay * p."""
    param = torch.tensor([2.0, -1.0], requires_grad=True)
    param.grad = torch.tensor([0.5, -4.0])
    FusedFormAdam([param], lr=0.1, weight_decay=0.01).step()
    torch.testing.assert_close(param.detach(), torch.tensor([2.0 * 0.999 - 0.1, -1.0 * 0.999 + 0.1]))


def test_state_has_the_fused_form_and_resumes_exactly() -> None:
    straight, first = parameters(), parameters()
    whole, half = FusedFormAdam(groups(straight)), FusedFormAdam(groups(first))

    def train(optimizer: FusedFormAdam, params: list[Tensor], steps: range) -> None:
        for step in steps:
            for param in params:
                param.grad = gradient(param, step)
            optimizer.step()

    train(whole, straight, range(STEPS))
    train(half, first, range(2))
    state = half.state_dict()
    assert [group["step"] for group in state["param_groups"]] == [2, 2]
    assert {key for entry in state["state"].values() for key in entry} == {"exp_avg", "exp_avg_sq"}
    second = [param.detach().clone().requires_grad_() for param in first]
    resumed = FusedFormAdam(groups(second))
    resumed.load_state_dict(state)
    train(resumed, second, range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def test_a_parameter_without_gradient_stays_and_closures_are_refused() -> None:
    params = parameters()
    before = params[0].detach().clone()
    params[1].grad = torch.ones(5)
    optimizer = FusedFormAdam(groups(params), weight_decay=0.5)
    optimizer.step()
    assert torch.equal(params[0], before)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
