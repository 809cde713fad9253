"""Settings of the ablations of DPO and GRPO, and of what the stages forget."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import Place, Positive


@config
class ForgettingConfig:
    """What each stage forgets.

    Attributes:
        output: where the table and the picture go.
        quickstarts: outputs of finished quickstarts.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]


@config
class GraderErrorsConfig:
    """The same reinforcement learning with graders that err.

    Attributes:
        output: where the arms, the tables and the pictures go.
        base: Hugging Face directory of the model that every arm starts from.
        prompts: of every arm.
        seeds: of GRPO and of the evaluation's sampling.
        steps: rounds of each arm.
        settings: that differ from conf/grpo/tiny.yaml in every arm.
        arms: name -> function of recipes/ablations/erring_grader.py; the others are compared with the first.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    base: Place
    prompts: Place
    seeds: tuple[int, ...]
    steps: Positive
    settings: tuple[str, ...]
    arms: dict[str, str]
    heldout_problems: Positive
    evaluation_samples: Positive


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

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    steps: Positive
    arms: dict[str, tuple[str, ...]]
    equal: str
    heldout_problems: Positive
    evaluation_samples: Positive


@config
class Recipe2026Config:
    """The values of the recipe of 2026 by themselves, and both recipes end to end.

    Attributes:
        output: where the arms, the tables and the picture go.
        quickstarts: outputs of finished quickstarts: SFT model and pairs of a seed's arms of DPO, DPO model and
            prompts of its arms of GRPO.
        steps: rounds of each arm of GRPO.
        dpo, grpo: name -> settings that differ from conf/<stage>/tiny.yaml; the others are compared with the first.
        two_updates: the same of GRPO, for values that say nothing while a round is one update.
        whole: an arm of both, the recipe itself.
        pairs: settings of curate that the recipe's own pairs differ in from conf/curate/tiny-rollouts.yaml.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    steps: Positive
    dpo: dict[str, tuple[str, ...]]
    grpo: dict[str, tuple[str, ...]]
    two_updates: dict[str, tuple[str, ...]]
    whole: str
    pairs: tuple[str, ...]
    heldout_problems: Positive
    evaluation_samples: Positive

    def __post_init__(self) -> None:
        """Refuse a recipe that is no arm of both stages.

        Raises:
            RuleBroken: it is not.
        """
        if self.whole not in self.dpo.keys() & self.grpo.keys():
            raise RuleBroken(
                f"{AT}whole={self.whole}, and the arms are {list(self.dpo)} and {list(self.grpo)}",
                rule=f"{AT}whole is an arm of both stages",
                remedy="name one of them",
            )


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

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    sizes: dict[str, tuple[str, ...]]
    midtrain_epochs: Positive
    sft_epochs: Positive
    rl_problems: Positive
    steps: Positive
    arms: dict[str, tuple[str, ...]]
    heldout_problems: Positive
    evaluation_samples: Positive


@config
class MismatchConfig:
    """The same reinforcement learning with a sampler that differs from the trainer by known amounts.

    Attributes:
        output: where the arms, the tables and the picture go.
        quickstarts: outputs of finished quickstarts; every arm of a seed starts from its DPO model and prompts.
        steps: rounds of each arm.
        settings: that differ from conf/grpo/tiny.yaml in every arm.
        dials: what differs, as recipes/ablations/mismatched.py names it; the first differs in nothing.
        corrections: name -> what is done about it, settings of `correction`; each dial is an arm with each of them.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    steps: Positive
    settings: tuple[str, ...]
    dials: Annotated[tuple[str, ...], Field(min_length=1)]
    corrections: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    heldout_problems: Positive
    evaluation_samples: Positive


@config
class DPONegativesConfig:
    """The ablation of DPO's negatives.

    Attributes:
        output: where the arms, the table and the picture go.
        quickstarts: outputs of finished quickstarts; each seed in them starts both arms.
        modes: the arms: how pairs are curated.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    modes: tuple[Literal["near_miss", "random"], ...]
    heldout_problems: Positive
    evaluation_samples: Positive
