"""Typed configuration: YAML and `key=value` overrides into frozen dataclasses. Needs no torch."""

from phimr_nemo.config.alignment import DPOConfig, GRPOConfig, RebalanceConfig, TemperatureConfig
from phimr_nemo.config.common import (
    CheckpointConfig,
    LongRopePolicy,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ShardConfig,
)
from phimr_nemo.config.curation import CurateConfig, PackConfig
from phimr_nemo.config.evaluation import EvaluateConfig, ExportConfig
from phimr_nemo.config.generation import (
    FileProblems,
    GenerateConfig,
    ModelTeacher,
    Problems,
    ProgrammaticTeacher,
    RecordedTeacher,
    SyntheticProblems,
    VerifyConfig,
)
from phimr_nemo.config.load import find_config, load_config, parse_config, to_dict, to_yaml
from phimr_nemo.config.stages import STAGES
from phimr_nemo.config.supervised import MidtrainConfig, SFTConfig, SupervisedConfig
from phimr_nemo.config.tiny import BaseConfig, QuickstartConfig

__all__ = [
    "STAGES",
    "BaseConfig",
    "CheckpointConfig",
    "CurateConfig",
    "DPOConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FileProblems",
    "GRPOConfig",
    "GenerateConfig",
    "LongRopePolicy",
    "MidtrainConfig",
    "ModelConfig",
    "ModelTeacher",
    "OptimConfig",
    "PackConfig",
    "ParallelConfig",
    "Problems",
    "ProgrammaticTeacher",
    "QuickstartConfig",
    "RebalanceConfig",
    "RecordedTeacher",
    "RunConfig",
    "SFTConfig",
    "ShardConfig",
    "SupervisedConfig",
    "SyntheticProblems",
    "TemperatureConfig",
    "VerifyConfig",
    "find_config",
    "load_config",
    "parse_config",
    "to_dict",
    "to_yaml",
]
