"""The one model of all stages: its architecture, its Megatron-Core form and its Hugging Face form.

Importing this package needs no torch; `build_model` and what else needs it is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phimr_nemo.model.architecture import Architecture

if TYPE_CHECKING:
    from phimr_nemo.model.megatron.gpt import PhiGPTModel, build_model, transformer_config

__all__ = ["Architecture", "PhiGPTModel", "build_model", "transformer_config"]

_FROM_MEGATRON = frozenset({"PhiGPTModel", "build_model", "transformer_config"})


def __getattr__(name: str) -> Any:
    if name in _FROM_MEGATRON:
        from phimr_nemo.model.megatron import gpt as megatron

        return getattr(megatron, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
