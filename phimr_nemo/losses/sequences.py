"""Masked reductions that the losses share: token values [b, s] and a mask of the same shape."""

from __future__ import annotations

import torch
from torch import Tensor

from phimr_nemo.errors import UserError

__all__ = ["sequence_logprobs"]


LOG_RATIO_LIMIT = 20.0
"""Beyond it (a factor 5e8) exp would soon overflow float32; such a token gets no gradient."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, which stays finite in float32."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_logprobs(logprobs: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of log-probabilities (nats) and number of tokens of each sequence.

    Args:
        logprobs: [b, s] log-probability per token.
        loss_mask: [b, s], nonzero where a token counts. What ``logprobs`` holds elsewhere does not matter,
            not even when it is NaN.

    Returns:
        (sums [b] in the dtype of ``logprobs``, counts [b] int64).

    Raises:
        UserError: the shapes differ.

    >>> sums, counts = sequence_logprobs(torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[1, 1, 0]]))
    >>> sums.tolist(), counts.tolist()
    ([-3.0], [2])
    """
    check_token_shapes(logprobs, loss_mask=loss_mask)
    counted = loss_mask.bool()
    return torch.where(counted, logprobs, 0.0).sum(dim=-1), counted.sum(dim=-1)


def check_token_shapes(logprobs: Tensor, **others: Tensor | None) -> None:
    """Raise a UserError unless every given tensor has the shape [b, s] of ``logprobs``."""
    if logprobs.ndim != 2:
        raise UserError(
            f"log-probabilities of shape {tuple(logprobs.shape)}",
            rule="[sequences, tokens]",
            remedy="pad packed sequences back to one row each before the loss",
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise UserError(
                f"{name} {tuple(tensor.shape)} does not fit log-probabilities {tuple(logprobs.shape)}",
                rule="one value per token, [sequences, tokens]",
                remedy=f"align {name} with the predicted tokens, not with the inputs",
            )


def check_sequence_shapes(reference: Tensor, **others: Tensor) -> None:
    """Raise a UserError unless every given tensor has the shape [n] of ``reference``."""
    if reference.ndim != 1:
        raise UserError(
            f"one value per sequence expected, got shape {tuple(reference.shape)}",
            rule="a vector [n]",
            remedy="sum token log-probabilities with sequence_logprobs first",
        )
    for name, tensor in others.items():
        if tensor.shape != reference.shape:
            raise UserError(
                f"{name} {tuple(tensor.shape)} does not fit the other {tuple(reference.shape)}",
                rule="one value per sequence in every argument",
                remedy="pass the same sequences in the same order everywhere",
            )


def check_positive(name: str, value: float) -> None:
    """Raise a UserError unless ``value`` > 0 (a NaN is not)."""
    if not value > 0:
        raise UserError(f"{name} {value}", rule=f"{name} > 0", remedy=f"choose a positive {name}")
