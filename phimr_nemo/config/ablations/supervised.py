"""Settings of the ablations of the data, of mid-training and of SFT."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import AtLeastZero, Place, Positive, Share


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
    """The ablation of verification, and of solutions per question, at equal tokens.

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
                rule="every arm has its own number of solutions per question, and the total is a multiple of it",
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
class RepetitionConfig:
    """Repetition or scale: size of the mid-training set and width of the model, at equal updates.

    Attributes:
        output: where the arms, the table and the picture go.
        quickstarts: outputs of finished quickstarts; they bring the whole set, the largest.
        problems: the smaller sets: as many problems as the teacher is asked.
        widths: name -> settings that differ from conf/base/tiny.yaml; two at least, as contours have two axes.
        updates: of every arm; a smaller set is repeated more often.
        heldout_documents: problems whose correct responses measure the loss.
        heldout_problems: questions of the evaluation.
        evaluation_samples: answers a question.
    """

    output: Place
    quickstarts: Annotated[tuple[Place, ...], Field(min_length=1)]
    problems: Annotated[tuple[Positive, ...], Field(min_length=1)]
    widths: Annotated[dict[str, tuple[str, ...]], Field(min_length=2)]
    updates: Positive
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
