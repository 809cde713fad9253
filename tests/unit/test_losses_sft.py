"""sft_loss and sequence_logprobs by hand, and the property that makes packing and sharding harmless."""

from __future__ import annotations

import math

import pytest
import torch

from phimr_nemo.errors import UserError
from phimr_nemo.losses import sequence_logprobs, sft_loss


def test_sum_and_count_by_hand() -> None:
    """Tokens of probability 1/2, 1/4 count, 1/8 does not: -(ln 1/2 + ln 1/4) = 3 ln 2 over 2 tokens."""
    logprobs = torch.tensor([[0.5, 0.25, 0.125]]).log()
    loss_sum, token_count = sft_loss(logprobs, torch.tensor([[1, 1, 0]]))
    assert loss_sum.item() == pytest.approx(3 * math.log(2))
    assert token_count.item() == 2


def test_gradient_is_minus_one_at_counted_tokens_only() -> None:
    logprobs = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.uint8)
    sft_loss(logprobs, mask)[0].backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -mask.float())


def test_uneven_micro_batches_add_up_to_the_whole_batch() -> None:
    """Summing first and dividing once: a mean of means would weigh the 1-token row like the 6-token row."""
    logprobs = -torch.rand(2, 6, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [1] + [0] * 5])
    whole_sum, whole_count = sft_loss(logprobs, mask)
    parts = [sft_loss(logprobs[row : row + 1], mask[row : row + 1]) for row in range(2)]
    loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    assert loss == pytest.approx((whole_sum / whole_count).item(), rel=1e-12)
    assert sum(float(part[0] / part[1]) for part in parts) / 2 != pytest.approx(float(loss), rel=1e-3)


def test_masked_nan_reaches_neither_value_nor_gradient() -> None:
    logprobs = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    loss_sum, token_count = sft_loss(logprobs, torch.tensor([[1, 0]]))
    loss_sum.backward()
    assert (loss_sum.item(), token_count.item()) == (1.0, 1)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_sequence_logprobs_by_hand() -> None:
    sums, counts = sequence_logprobs(torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]]), torch.eye(2, 3) + 1)
    assert sums.tolist() == [-7.0, -56.0]
    assert counts.tolist() == [3, 3]
    sums, counts = sequence_logprobs(torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), torch.tensor([[0, 1], [0, 0]]))
    assert sums.tolist() == [-2.0, 0.0]
    assert counts.tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="rule"):
        sft_loss(torch.zeros(2, 4) if len(shape) == 2 else torch.zeros(3), torch.zeros(shape))
