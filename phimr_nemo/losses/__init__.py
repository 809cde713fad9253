"""Losses as pure functions of tensors, found on first use so that importing this needs no torch.

All of them return sums and the counts to divide by; dividing by the global count is the caller's part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from phimr_nemo.losses.advantages import *
    from phimr_nemo.losses.distill import *
    from phimr_nemo.losses.dpo import *
    from phimr_nemo.losses.grpo import *
    from phimr_nemo.losses.logprobs import *
    from phimr_nemo.losses.mismatch import *
    from phimr_nemo.losses.sequences import *
    from phimr_nemo.losses.sft import *

# Which module each name is of; a module's own `__all__` says the same (tests/contracts/test_public_names.py), but
# reading it would import torch.
_NAMES: Final = {
    "advantages": ("batch_advantages", "centered_advantages", "group_advantages"),
    "distill": ("TeacherStates", "reverse_kl_loss", "sampled_reverse_kl_loss", "token_reverse_kl"),
    "dpo": (
        "apo_down_loss",
        "apo_zero_loss",
        "dpo_loss",
        "ipo_loss",
        "label_smoothed_dpo_loss",
        "length_normalized_dpo_loss",
        "length_normalized_ipo_loss",
        "rpo_loss",
    ),
    "grpo": (
        "PolicyBatch",
        "PolicyLoss",
        "cispo_loss",
        "dapo_loss",
        "dr_grpo_loss",
        "grpo_loss",
        "gspo_loss",
        "importance_weighted_k3_kl",
        "k3_kl",
    ),
    "logprobs": ("IGNORED_LABEL", "token_logprobs", "token_logprobs_and_entropy"),
    "mismatch": ("masked_importance_weights", "sequence_masked_weights", "truncated_importance_weights"),
    "sequences": ("sequence_logprobs",),
    "sft": ("sft_loss",),
}
_HOMES: Final = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
