"""The families of models that are trained here, a file each, by the model_type of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from phimr_nemo.model.families.family import Family
from phimr_nemo.model.families.llama import LLAMA
from phimr_nemo.model.families.mistral import MISTRAL
from phimr_nemo.model.families.phi3 import PHI3
from phimr_nemo.model.families.qwen2 import QWEN2
from phimr_nemo.model.families.qwen3 import QWEN3
from phimr_nemo.model.families.smollm3 import SMOLLM3

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {family.model_type: family for family in (PHI3, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)}
)

_EXPERTS: Final = "its feed-forward layers are mixtures of experts"
_GEMMA: Final = "it scales its embeddings and norms in its own way, and caps its scores"
REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma3"), _GEMMA),
        **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "phimoe"), _EXPERTS),
    }
)
"""Families that are asked for, and what their models have that is not implemented."""
