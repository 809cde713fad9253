"""8-bit training: Transformer Engine's recipes, refused where they cannot run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from nemo import lightning as nl

from phimr_nemo.config import ModelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.megatron.configuration import has_transformer_engine

FP8_FORMAT: Final = "hybrid"
"""E4M3 forward, E5M2 for gradients (Micikevicius et al. 2022, arXiv 2209.05433)."""

FP8_RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    # A tensor's scale from the largest value of its last 1,024 steps.
    "delayed": {"fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    # From the tensor itself.
    "current": {"fp8_recipe": "tensorwise"},
}


def require_fp8(model: ModelConfig) -> None:
    """Refuse 8-bit training where it cannot run.

    Raises:
        UserError: fp8 without Transformer Engine and a GPU.
    """
    if model.fp8 is not None and not has_transformer_engine():
        raise UserError(
            f"model.fp8={model.fp8} on this machine",
            rule="8-bit products need Transformer Engine and a GPU that has them (Hopper or later)",
            remedy="run in a NeMo container on such a GPU, or leave model.fp8 out (see `phimr doctor`)",
        )


def precision_plugins(model: ModelConfig, make: Callable[..., Any]) -> list[Any]:
    """NeMo's precision plugins for a number format; none for fp32.

    Args:
        model: the format.
        make: see :mod:`phimr_nemo.supervised.assembly`.
    """
    if model.fp8 is not None:
        # Weights stay in bf16 between steps: the export reads them.
        eight = {"fp8": FP8_FORMAT, "fp8_param_gather": False, **FP8_RECIPES[model.fp8]}
        return [_mixed_precision(make, **eight)]
    return [_mixed_precision(make)] if model.dtype == "bf16" else []


def _mixed_precision(make: Callable[..., Any], **more: Any) -> Any:
    # By default NeMo builds the weights in float32 and then rounds them: three times the memory for a moment.
    return make(nl.MegatronMixedPrecision, precision="bf16-mixed", params_dtype=torch.bfloat16, **more)
