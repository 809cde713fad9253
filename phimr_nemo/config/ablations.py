"""Settings of the ablations (recipes/ablations)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import AtLeastZero, Place, Positive, Share


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
class SecondDomainConfig:
    """The ablation of a second domain.

    Attributes:
        output: where data, arms, tables and the picture go.
        quickstarts: outputs of finished quickstarts; their RL and their random models are what is taught.
        train_problems, heldout_problems: of the new domain; no program is in both.
        solutions_per_problem: recorded solutions of each training problem.
        mistake_rate: probability of a mistake in one.
        epochs: of SFT on the right ones.
        batch: solutions an update.
        max_new_tokens: of an answer in the new domain.
        evaluation_samples: answers a question of the new domain.
        maths_problems, maths_samples: as the quickstarts were evaluated, so that the questions are the same.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    train_problems: Positive
    heldout_problems: Positive
    solutions_per_problem: Positive
    mistake_rate: Share
    epochs: Positive
    batch: Positive
    max_new_tokens: Positive
    evaluation_samples: Positive
    maths_problems: Positive
    maths_samples: Positive


@config
class TeachersConfig:
    """The ablation of the teacher's style and error rate.

    Attributes:
        output: where the arms, the tables and the picture go.
        quickstarts: outputs of finished quickstarts; every arm of a seed goes on from its mid-trained model.
        teachers: name -> settings that differ from conf/generate/tiny.yaml; the others are compared with the first.
        problems: that every teacher answers once.
        epochs: of mid-training on its verified solutions.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    teachers: dict[str, tuple[str, ...]]
    problems: Positive
    epochs: Positive
    heldout_problems: Positive
    evaluation_samples: Positive


@config
class SolutionsConfig:
    """The ablation of verification, and of solutions a question, at equal tokens.

    Attributes:
        output: where the arms, the table and the picture go.
        quickstarts: outputs of finished quickstarts; every arm of a seed goes on from its mid-trained model.
        solutions: a question, one arm each.
        total: solutions of every arm, verified or not.
        mistake_rate: share of them that are wrong.
        steps: of mid-training, the same in every arm.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    solutions: Annotated[tuple[Positive, ...], Field(min_length=1)]
    total: Positive
    mistake_rate: Share
    steps: Positive
    heldout_problems: Positive
    evaluation_samples: Positive

    def __post_init__(self) -> None:
        uneven = [count for count in self.solutions if self.total % count]
        if uneven or len(set(self.solutions)) < len(self.solutions):
            raise RuleBroken(
                f"{AT}total={self.total} with {AT}solutions={list(self.solutions)}",
                rule="every arm has its own number of solutions a question, and the total is a multiple of it",
                remedy=f"set {AT}solutions=[1,2,4,8] {AT}total=2400",
            )


@config
class StoppingConfig:
    """The report on stopping: who ends an answer before the limit.

    Attributes:
        output: where the table goes.
        quickstarts: outputs of finished quickstarts.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]


@config
class MidtrainScalingConfig:
    """The ablation of the mid-training set's size.

    Attributes:
        output: where the arms, the table and the picture go.
        quickstarts: outputs of finished quickstarts; they bring the base models and the whole set.
        problems: the smaller sets: as many problems as the teacher is asked.
        epochs: passes over each set; the quickstart's own over the whole set.
        updates: also train every set for so many updates, whatever its size; None = do not.
        heldout_documents: problems whose right responses measure the loss.
        heldout_problems: questions of the evaluation; as many as the quickstart's.
        evaluation_samples: answers a question; as many as the quickstart's.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    problems: tuple[Positive, ...]
    epochs: Positive
    updates: Positive | None = None
    heldout_documents: Positive
    heldout_problems: Positive
    evaluation_samples: Positive


@config
class MidtrainPackingConfig:
    """The ablation of packing in mid-training.

    Attributes:
        output: where the arms, the table and the picture go.
        quickstarts: outputs of finished quickstarts.
        scaling: output of the ablation of the set's size, which has the documents.
        problems: which of its sets.
        epochs: as there.
        batch: conversations an update; as many as an update of packed rows holds on average.
        lr, min_lr: of mid-training (conf/midtrain/tiny.yaml).
        sequence_length: the same.
        heldout_problems: questions of the evaluation; as many as there.
        evaluation_samples: answers a question; as many as there.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    scaling: Place
    problems: Positive
    epochs: Positive
    batch: Positive
    lr: AtLeastZero
    min_lr: AtLeastZero
    sequence_length: Positive
    heldout_problems: Positive
    evaluation_samples: Positive

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise RuleBroken(
                f"{AT}min_lr={self.min_lr} with {AT}lr={self.lr}",
                rule=f"{AT}min_lr is at most {AT}lr",
                remedy=f"use {AT}min_lr={self.lr} or less",
            )


@config
class DirectSFTConfig:
    """The ablation of direct SFT on a small set.

    Attributes:
        output: where the arms, the table and the picture go.
        quickstarts: outputs of finished quickstarts.
        scaling: output of the ablation of the set's size, which has the small set.
        small: problems behind the small set: the SFT subset of so many.
        epochs: passes over the small set.
        heldout_problems: questions of the evaluation; as many as the quickstart's.
        evaluation_samples: answers a question; as many as the quickstart's.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    scaling: Place
    small: Positive
    epochs: Positive
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
