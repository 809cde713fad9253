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
from phimr_nemo.config.endpoint import AskConfig, EndpointConfig, Prices
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
from phimr_nemo.config.preparation import (
    AnnotationConfig,
    DecontaminationConfig,
    EvaluationSetConfig,
    NearDuplicatesConfig,
    PrepareConfig,
    SourceConfig,
)
from phimr_nemo.config.stages import STAGES
from phimr_nemo.config.supervised import MidtrainConfig, SFTConfig, SupervisedConfig
from phimr_nemo.config.tiny import BaseConfig, QuickstartConfig

__all__ = [
    "STAGES",
    "AnnotationConfig",
    "AskConfig",
    "BaseConfig",
    "CheckpointConfig",
    "CurateConfig",
    "DPOConfig",
    "DecontaminationConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "EvaluationSetConfig",
    "ExportConfig",
    "FileProblems",
    "GRPOConfig",
    "GenerateConfig",
    "LongRopePolicy",
    "MidtrainConfig",
    "ModelConfig",
    "ModelTeacher",
    "NearDuplicatesConfig",
    "OptimConfig",
    "PackConfig",
    "ParallelConfig",
    "PrepareConfig",
    "Prices",
    "Problems",
    "ProgrammaticTeacher",
    "QuickstartConfig",
    "RebalanceConfig",
    "RecordedTeacher",
    "RunConfig",
    "SFTConfig",
    "ShardConfig",
    "SourceConfig",
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
