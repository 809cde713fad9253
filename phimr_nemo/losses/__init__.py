"""Losses as pure functions of tensors, resolved on first use so that importing this needs no torch.

All of them return sums and the counts to divide by; dividing by the global count is the caller's part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phimr_nemo.losses.logprobs import IGNORED_LABEL, token_logprobs, token_logprobs_and_entropy

_HOMES = {
    "IGNORED_LABEL": "logprobs",
    "token_logprobs": "logprobs",
    "token_logprobs_and_entropy": "logprobs",
}

__all__ = [
    "IGNORED_LABEL",
    "token_logprobs",
    "token_logprobs_and_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
