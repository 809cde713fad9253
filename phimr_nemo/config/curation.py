"""Settings of the training sets and of packing."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import AtLeastOne, AtLeastZero, Number, Place, Positive, RunConfig, ShardConfig, Share
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.store.records import Difficulty


@config
class MidtrainSet:
    """The full verified set.

    Attributes:
        max_per_problem: responses to one problem at most.
    """

    max_per_problem: Positive


@config
class SFTSet:
    """The harder, cleaner, balanced subset.

    Attributes:
        difficulties: tiers to keep; problems of unknown difficulty are kept too.
        max_per_problem: responses to one problem at most, the longest.
        max_repetition: drop responses that repeat a larger share of themselves.
        one_boxed_answer: drop responses that do not box exactly one answer after their thinking.
        size: rows to keep, balanced over difficulty and length; None = all.
    """

    difficulties: Annotated[tuple[Difficulty, ...], Field(min_length=1)]
    max_per_problem: Positive
    max_repetition: Share
    one_boxed_answer: bool
    size: Positive | None = None


@config
class PairSet:
    """Preference pairs from rollouts of one question.

    Attributes:
        mode: the nearest pairs, or random ones.
        nearness: what is near, see :mod:`phimr_nemo.data.pairs`.
        max_per_problem: pairs of one problem at most.
        max_length_ratio: no pair of which one is more than this many times as long as the other; None = any.
    """

    mode: Literal["near_miss", "random"]
    nearness: Literal["common_steps", "common_beginning"]
    max_per_problem: Positive
    max_length_ratio: AtLeastOne | None = None


@config
class PromptSet:
    """Prompts for reinforcement learning.

    Attributes:
        min_pass, max_pass: the share of right responses lies strictly between them.
        hard_below: prompts with a lower share are marked as hard, for oversampling.
        min_samples: graded responses that a prompt must have, over all sampling rounds.
        max_length_spread: coefficient of variation of the response lengths at most; None = any.
    """

    min_pass: Number
    max_pass: Number
    hard_below: Share
    min_samples: Positive
    max_length_spread: AtLeastZero | None = None

    def __post_init__(self) -> None:
        if not (self.min_pass < self.max_pass and self.min_pass < 1.0 and self.max_pass > 0.0):
            raise RuleBroken(
                f"{AT}min_pass={self.min_pass} {AT}max_pass={self.max_pass}",
                rule=f"a pass rate, from 0 to 1, lies strictly between {AT}min_pass and {AT}max_pass",
                remedy=f"use {AT}min_pass=0.0 {AT}max_pass=1.0 for every prompt that is sometimes right and "
                "sometimes wrong",
            )


@config
class CurateConfig:
    """Verdicts -> training sets, each in its own directory of the output; a set that is None is not made.

    Attributes:
        verdicts: one directory, or several: sampling rounds, sources that bring their own solutions.
        workers: processes.
    """

    run: RunConfig
    verdicts: Place | Annotated[tuple[Place, ...], Field(min_length=1)]
    workers: Positive
    midtrain: MidtrainSet | None = None
    sft: SFTSet | None = None
    pairs: PairSet | None = None
    prompts: PromptSet | None = None

    def __post_init__(self) -> None:
        if self.midtrain is None and self.sft is None and self.pairs is None and self.prompts is None:
            raise RuleBroken(
                f"none of {AT}midtrain, {AT}sft, {AT}pairs and {AT}prompts is configured",
                rule="curate makes at least one training set",
                remedy=f"set for example {AT}midtrain.max_per_problem=8",
            )

    @property
    def verdict_directories(self) -> tuple[Place, ...]:
        """All directories of verdicts."""
        return self.verdicts if isinstance(self.verdicts, tuple) else (self.verdicts,)


@config
class PackConfig:
    """Conversations -> packed rows.

    Attributes:
        tokenizer: directory with the tokenizer.
        sequence_length: tokens a row.
        placement: which documents share a row: those that fill it best by length, or short ones at random.
        workers: processes that tokenise; with 1 the tokenizer's own threads use all cores.
        shard: this process's share of the conversations' shards.
    """

    run: RunConfig
    conversations: Place
    tokenizer: Place
    sequence_length: Positive
    placement: Literal["length", "mixed"]
    workers: Positive
    shard: ShardConfig = field(default_factory=ShardConfig)
