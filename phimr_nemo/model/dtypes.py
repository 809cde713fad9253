"""The dtypes that the configuration names, under the names of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

TORCH_NAMES: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Name in the configuration -> attribute of torch; vLLM's and TensorRT-LLM's name as well."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name in the configuration."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def config_dtype(dtype: torch.dtype) -> Any:
    """Return the name in the configuration of a dtype that it has a name for; of another one fp32."""
    names = {torch_dtype(name): name for name in TORCH_NAMES}
    return names.get(dtype, "fp32")
