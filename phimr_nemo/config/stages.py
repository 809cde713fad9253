"""Every stage's configuration by the stage's name."""

from __future__ import annotations

from typing import Any, Final

from phimr_nemo.config.data import CurateConfig, PrepareConfig
from phimr_nemo.config.dpo import DPOConfig
from phimr_nemo.config.evaluation import EvaluateConfig, ExportConfig
from phimr_nemo.config.generation import GenerateConfig, VerifyConfig
from phimr_nemo.config.sampled.distill import DistillConfig
from phimr_nemo.config.sampled.grpo import GRPOConfig
from phimr_nemo.config.supervised import MidtrainConfig, PackConfig, SFTConfig
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
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}

_ASK: Final = {"endpoint": "engine.endpoint", "max_tokens": "max_new_tokens"}
_TEACHER: Final = ("max_batch", "dtype", "tensor", "memory_share", "eager", "endpoint", "system", "max_missing")
MOVED: Final[dict[type[Any], dict[str, str]]] = {
    GenerateConfig: {
        "teacher.kind=vllm": "teacher.kind=model teacher.engine.kind=vllm",
        "teacher.kind=endpoint": "teacher.kind=model teacher.engine.kind=endpoint",
        **{f"teacher.{name}": f"teacher.engine.{name}" for name in _TEACHER},
    },
    PrepareConfig: {f"annotation.ask.{old}": f"annotation.ask.{new}" for old, new in _ASK.items()},
    VerifyConfig: {f"judge.ask.{old}": f"judge.ask.{new}" for old, new in _ASK.items()},
    MidtrainConfig: {"evaluation.max_batch": "evaluation.engine.max_batch"},
    SFTConfig: {"evaluation.max_batch": "evaluation.engine.max_batch"},
    GRPOConfig: {"sampler": "engine", "reward_correct": "reward.correct", "reward_wrong": "reward.wrong"},
}
"""Former keys and kinds, by configuration -> what they are called now: for the message that refuses them."""
