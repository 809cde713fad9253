"""Next-token loss of mid-training and SFT: the negative log-likelihood of the tokens that count."""

from __future__ import annotations

from torch import Tensor

from phimr_nemo.losses.sequences import sequence_logprobs

__all__ = ["sft_loss"]


def sft_loss(logprobs: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """-sum_t log p(y_t | y_<t) over the tokens with a nonzero mask, and how many there are.

    Divide by the number of counted tokens of the *global* batch (all micro-batches, all data-parallel ranks):
    then every token weighs the same, however the batch is split, and packed equals unpacked.

    Args:
        logprobs: [b, s] log-probability (nats) of each label.
        loss_mask: [b, s], nonzero where the token counts.

    Returns:
        (loss_sum [] in nats, token_count [] int64).

    Raises:
        UserError: the shapes differ.

    >>> import torch
    >>> loss, tokens = sft_loss(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1, 1, 0]]))
    >>> (loss / tokens).item()
    1.5
    """
    sums, counts = sequence_logprobs(logprobs, loss_mask)
    return -sums.sum(), counts.sum()
