"""Advantages of sampled responses relative to the other responses to the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from phimr_nemo.losses.sequences import check_sequence_shapes

__all__ = ["batch_advantages", "centered_advantages", "group_advantages"]

ADVANTAGE_EPSILON = 1e-4
"""Added to a group's standard deviation of reward, as in TRL; it is 1e-4 of a +1/-1 reward's scale."""


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward standardised within its group: (r - mean) / (std + ADVANTAGE_EPSILON).

    Source: DeepSeekMath (arXiv 2402.03300, section 4.1.2) with TRL's sample standard deviation (n - 1) and
    epsilon. A group of one, or of equal rewards, gives exactly 0: it teaches nothing.

    Args:
        rewards: [S] one per response.
        groups: [S] integer id of each response's prompt; groups may differ in size and be in any order.

    Returns:
        [S] advantages in the dtype of ``rewards``.

    Raises:
        UserError: the shapes differ.

    >>> group_advantages(torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([0, 0, 1, 1])).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    centered, index, sizes = _center(rewards, groups)
    squares = torch.zeros(sizes.numel(), dtype=centered.dtype, device=centered.device)
    squares.index_add_(0, index, centered.square())
    deviation = (squares / (sizes - 1).clamp(min=1)).sqrt()
    return (centered / (deviation[index] + ADVANTAGE_EPSILON)).to(rewards.dtype)


def batch_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus its group's mean, over the batch's spread: (r - mean) / (std of all rewards + ADVANTAGE_EPSILON).

    Source: ScaleRL (arXiv 2510.13786), Lite-PPO (arXiv 2508.08221); TRL's ``scale_rewards="batch"``, with the
    sample standard deviation (n - 1) of the rewards. A prompt that is nearly always solved, or nearly never, is
    not blown up to the scale of the others.

    Args:
        rewards: [S] one per response of the whole batch.
        groups: [S] integer id of each response's prompt.

    Returns:
        [S] advantages in the dtype of ``rewards``; exactly 0 in a group of equal rewards.

    Raises:
        UserError: the shapes differ.
    """
    centered, _, _ = _center(rewards, groups)
    wide = rewards.double()
    deviation = wide.std() if len(wide) > 1 else torch.zeros((), dtype=wide.dtype, device=wide.device)
    return (centered / (deviation + ADVANTAGE_EPSILON)).to(rewards.dtype)


def centered_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus its group's mean, not divided by the spread: Dr. GRPO (arXiv 2503.20783, section 3.2).

    Args:
        rewards: [S] one per response.
        groups: [S] integer id of each response's prompt.

    Returns:
        [S] advantages in the dtype of ``rewards``; exactly 0 in a group of equal rewards.

    Raises:
        UserError: the shapes differ.

    >>> centered_advantages(torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 0, 1])).tolist()
    [1.0, -1.0, 0.0]
    """
    return _center(rewards, groups)[0].to(rewards.dtype)


def _center(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reward minus group mean (float64), each response's group index, and the groups' sizes."""
    check_sequence_shapes(rewards, groups=groups)
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    # Counted from one member of the group, equal rewards give exactly 0 whatever their value.
    wide = rewards.double()
    anchor = torch.zeros(sizes.numel(), dtype=wide.dtype, device=wide.device).scatter_(0, index, wide)
    offset = wide - anchor[index]
    totals = torch.zeros_like(anchor).index_add_(0, index, offset)
    return offset - (totals / sizes)[index], index, sizes
