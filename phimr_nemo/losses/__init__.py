"""Losses as pure functions of tensors, found on first use so that importing this needs no torch.

All of them return sums and the counts to divide by; dividing by the global count is the caller's part. What a module
has to offer stands in its `__all__`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phimr_nemo.losses.advantages import *
    from phimr_nemo.losses.distill import *
    from phimr_nemo.losses.dpo import *
    from phimr_nemo.losses.grpo import *
    from phimr_nemo.losses.logprobs import *
    from phimr_nemo.losses.mismatch import *
    from phimr_nemo.losses.sequences import *
    from phimr_nemo.losses.sft import *

_MODULES = ("advantages", "distill", "dpo", "grpo", "logprobs", "mismatch", "sequences", "sft")


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for module in (importlib.import_module(f"{__name__}.{home}") for home in _MODULES):
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
