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

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {family.model_type: family for family in (PHI3, LLAMA, MISTRAL, QWEN2, QWEN3)}
)
