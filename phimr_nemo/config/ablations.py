"""Settings of the ablations that compare domains, teachers and stages."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.config.common import Positive, config


@config
class ForgettingConfig:
    """What each stage forgets.

    Attributes:
        output: where the table and the picture go.
        quickstarts: outputs of finished quickstarts.
    """

    output: Path
    quickstarts: tuple[Path, ...]


@config
class GRPORemediesConfig:
    """The ablation of GRPO's temperature, remedies and reward.

    Attributes:
        output: where the arms, the tables and the pictures go.
        quickstarts: outputs of finished quickstarts; every arm of a seed starts from its DPO model and prompts.
        steps: rounds of each arm.
        arms: name -> settings that differ from conf/grpo/tiny.yaml; the others are compared with the first.
        equal: an arm that algebra makes equal to the first up to rounding.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Path
    quickstarts: tuple[Path, ...]
    steps: Positive
    arms: dict[str, tuple[str, ...]]
    equal: str
    heldout_problems: Positive
    evaluation_samples: Positive


@config
class GRPOSizesConfig:
    """The same reinforcement learning at several model sizes.

    Attributes:
        output: where the arms, the tables and the pictures go.
        quickstarts: outputs of finished quickstarts; they bring the training data.
        sizes: name -> settings that differ from conf/base/tiny.yaml.
        midtrain_epochs, sft_epochs: supervised training of every size.
        rl_problems: problems of which every size samples its own prompts.
        steps: rounds of each arm.
        arms: name -> settings that differ from conf/grpo/tiny.yaml.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Path
    quickstarts: tuple[Path, ...]
    sizes: dict[str, tuple[str, ...]]
    midtrain_epochs: Positive
    sft_epochs: Positive
    rl_problems: Positive
    steps: Positive
    arms: dict[str, tuple[str, ...]]
    heldout_problems: Positive
    evaluation_samples: Positive
