"""Settings of the ablations (recipes/ablations)."""

from phimr_nemo.config.ablations.alignment import (
    DPONegativesConfig,
    ForgettingConfig,
    GraderErrorsConfig,
    GRPORemediesConfig,
    GRPOSizesConfig,
    MismatchConfig,
    Recipe2026Config,
)
from phimr_nemo.config.ablations.supervised import (
    DirectSFTConfig,
    MidtrainPackingConfig,
    MidtrainScalingConfig,
    RepetitionConfig,
    SecondDomainConfig,
    SolutionsConfig,
    StoppingConfig,
    TeachersConfig,
)

__all__ = [
    "DPONegativesConfig",
    "DirectSFTConfig",
    "ForgettingConfig",
    "GRPORemediesConfig",
    "GRPOSizesConfig",
    "GraderErrorsConfig",
    "MidtrainPackingConfig",
    "MidtrainScalingConfig",
    "MismatchConfig",
    "Recipe2026Config",
    "RepetitionConfig",
    "SecondDomainConfig",
    "SolutionsConfig",
    "StoppingConfig",
    "TeachersConfig",
]
