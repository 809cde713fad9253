"""Every stage's configuration by the stage's name."""

from __future__ import annotations

from typing import Any

from phimr_nemo.config.alignment import DPOConfig, GRPOConfig
from phimr_nemo.config.curation import CurateConfig, PackConfig
from phimr_nemo.config.evaluation import EvaluateConfig, ExportConfig
from phimr_nemo.config.generation import GenerateConfig, VerifyConfig
from phimr_nemo.config.preparation import PrepareConfig
from phimr_nemo.config.supervised import MidtrainConfig, SFTConfig
from phimr_nemo.config.tiny import BaseConfig

STAGES: dict[str, type[Any]] = {
    "base": BaseConfig,
    "prepare": PrepareConfig,
    "generate": GenerateConfig,
    "verify": VerifyConfig,
    "curate": CurateConfig,
    "pack": PackConfig,
    "midtrain": MidtrainConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "grpo": GRPOConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
