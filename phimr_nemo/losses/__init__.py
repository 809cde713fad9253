"""Losses as pure functions of tensors, resolved on first use so that importing this needs no torch.

All of them return sums and the counts to divide by; dividing by the global count is the caller's part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phimr_nemo.losses.advantages import centered_advantages, group_advantages
    from phimr_nemo.losses.dpo import (
        dpo_loss,
        ipo_loss,
        label_smoothed_dpo_loss,
        length_normalized_dpo_loss,
        length_normalized_ipo_loss,
        rpo_loss,
    )
    from phimr_nemo.losses.grpo import (
        PolicyLoss,
        dapo_loss,
        dr_grpo_loss,
        grpo_loss,
        gspo_loss,
        k3_kl,
        truncated_importance_weights,
    )
    from phimr_nemo.losses.logprobs import IGNORED_LABEL, token_logprobs, token_logprobs_and_entropy
    from phimr_nemo.losses.sequences import sequence_logprobs
    from phimr_nemo.losses.sft import sft_loss

_HOMES = {
    "IGNORED_LABEL": "logprobs",
    "PolicyLoss": "grpo",
    "centered_advantages": "advantages",
    "dapo_loss": "grpo",
    "dpo_loss": "dpo",
    "dr_grpo_loss": "grpo",
    "group_advantages": "advantages",
    "grpo_loss": "grpo",
    "gspo_loss": "grpo",
    "ipo_loss": "dpo",
    "k3_kl": "grpo",
    "label_smoothed_dpo_loss": "dpo",
    "length_normalized_dpo_loss": "dpo",
    "length_normalized_ipo_loss": "dpo",
    "rpo_loss": "dpo",
    "sequence_logprobs": "sequences",
    "sft_loss": "sft",
    "token_logprobs": "logprobs",
    "token_logprobs_and_entropy": "logprobs",
    "truncated_importance_weights": "grpo",
}

__all__ = [
    "IGNORED_LABEL",
    "PolicyLoss",
    "centered_advantages",
    "dapo_loss",
    "dpo_loss",
    "dr_grpo_loss",
    "group_advantages",
    "grpo_loss",
    "gspo_loss",
    "ipo_loss",
    "k3_kl",
    "label_smoothed_dpo_loss",
    "length_normalized_dpo_loss",
    "length_normalized_ipo_loss",
    "rpo_loss",
    "sequence_logprobs",
    "sft_loss",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "truncated_importance_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
