"""Settings of the data: sources, deduplication, decontamination, annotation; training sets and packing."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import RunConfig, ShardConfig
from phimr_nemo.config.generation import AnnotationConfig
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import (
    AtLeastOne,
    AtLeastZero,
    IsNumber,
    Name,
    NonNegative,
    Number,
    Place,
    Positive,
    PositiveShare,
    Share,
)
from phimr_nemo.store.records import DIFFICULTIES, Difficulty

Preset = Literal[
    "openr1_math",
    "openthoughts",
    "openthoughts3",
    "bespoke_stratos",
    "numina_math",
    "big_math",
    "omni_math",
    "deepmath",
    "olympiad_bench",
    "metamath_qa",
    "math_instruct",
    "aqua_rat",
    "ape210k",
    "tal_scq5k",
    "gsm8k",
    "math",
    "deepscaler",
    "orz",
    "dapo",
    "skywork_or1",
    "am_deepseek_r1_distilled",
    "mixture_of_thoughts",
    "s1k",
    "synthetic",
    "open_math_reasoning",
]


@config
class SourceConfig:
    """One set of questions.

    Attributes:
        name: the `source` of its problems.
        path: a file, a directory of files, a dataset that `datasets` saved, or with `hub` its name on the hub.
        preset: the published set it is; None finds the columns by their usual names.
        limit: read only the first rows; 0 = all.
        hub: load `path` from the Hugging Face hub.
        subset, split: of a dataset of the hub or on disk.
        revision: branch, tag or commit of a dataset of the hub; None = the newest. The manifest names the commit.
        question, answer, solution: column names where there is no preset; found by themselves when None.
        response: without a preset, the column of recorded responses; None = the source brings none.
        teacher: who wrote the responses; None = as the preset or the row says.
    """

    name: Name
    path: Name
    preset: Preset | None = None
    limit: NonNegative = 0
    hub: bool = False
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    response: str | None = None
    teacher: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("question", "answer", "solution", "response") if getattr(self, name) is not None]
        if self.preset is not None and given:
            raise RuleBroken(
                f"source {self.name}: {AT}preset={self.preset} and the columns {given}",
                rule="a preset knows its columns; columns are named where there is no preset",
                remedy="set " + " ".join(f"{AT}{name}=null" for name in given) + f", or {AT}preset=null",
            )
        if self.revision is not None and not self.hub:
            raise RuleBroken(
                f"source {self.name}: {AT}revision={self.revision} of a path on this machine",
                rule="a revision pins a dataset of the hub",
                remedy=f"set {AT}hub=true, or {AT}revision=null: the manifest has the checksum of files",
            )


@config
class NearDuplicatesConfig:
    """Questions that are almost the same (see phimr_nemo/data/prepare/dedup.py).

    Attributes:
        threshold: estimated Jaccard similarity of token 3-grams from which two questions are one.
        permutations: MinHash permutations; a multiple of 5.
    """

    threshold: PositiveShare
    permutations: Annotated[int, Field(ge=5, multiple_of=5), IsNumber]


@config
class EvaluationSetConfig:
    """Questions that no training problem may repeat.

    Attributes:
        name: in the report of what was dropped.
        path: a file of rows, or a problems record directory.
        question: column of the question; found when None.
    """

    name: Name
    path: Place
    question: str | None = None


@config
class DecontaminationConfig:
    """Problems too close to evaluation questions are dropped (see phimr_nemo/data/prepare/decontaminate.py).

    Attributes:
        sets: the evaluation sets.
        ngram: tokens a gram, numbers masked.
        overlap: share of the shorter question's grams that the other one has too, from which they match.
    """

    sets: Annotated[tuple[EvaluationSetConfig, ...], Field(min_length=1)]
    ngram: Positive
    overlap: PositiveShare


@config
class GoldConfig:
    """Which answer a question has whose sources disagree or tell none (see phimr_nemo/data/prepare/golds.py).

    Attributes:
        trusted: sources whose answer wins, the most trusted first.
        quorum: finished solutions that must agree on an answer in a vote; None = no vote.
        majority: share of all solutions with an answer that must be exceeded in a vote.
    """

    trusted: tuple[str, ...] = ()
    quorum: Positive | None = 2
    majority: Share = 0.5


@config
class PrepareConfig:
    """Sources -> problems and, from sources with trajectories, rollouts.

    Attributes:
        sources: in the order in which they win where duplicates are equal otherwise.
        golds: what is done where answers disagree or are missing.
        near_duplicates, decontamination, annotation: None = not done.
        shard_size: problems (rollouts) per shard.
        workers: processes that read pieces of sources, and threads of the sort.
        shard: this process's place among those that share the pieces.
    """

    run: RunConfig
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    golds: GoldConfig = field(default_factory=GoldConfig)
    near_duplicates: NearDuplicatesConfig | None = None
    decontamination: DecontaminationConfig | None = None
    annotation: AnnotationConfig | None = None
    shard_size: Positive
    workers: Positive = 1
    shard: ShardConfig = field(default_factory=ShardConfig)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RuleBroken(
                f"{AT}sources: {repeated} occur more than once",
                rule="every source has its own name: it stands in the records and in the counts",
                remedy="rename one of them",
            )
        unknown = sorted(set(self.golds.trusted) - set(names))
        if unknown:
            raise RuleBroken(
                f"{AT}golds.trusted names {unknown}; the sources are {names}",
                rule="a trusted source is one of the sources",
                remedy=f"correct {AT}golds.trusted",
            )


BalanceKey = Literal["domain", "source", "difficulty", "length"]


@config
class Cap:
    """At most so many rows of one domain, source or difficulty.

    Attributes:
        by: the label.
        value: the one that is capped; None = each, also those without the label.
        rows: that are kept at most, drawn by content.
    """

    by: Literal["domain", "source", "difficulty"]
    value: Name | None = None
    rows: Positive

    def __post_init__(self) -> None:
        if self.by == "difficulty" and self.value not in (None, *DIFFICULTIES):
            raise RuleBroken(
                f"{AT}by=difficulty with {AT}value={self.value}",
                rule=f"a difficulty is one of {list(DIFFICULTIES)}",
                remedy=f"set {AT}value={DIFFICULTIES[0]}, or {AT}value=null for each",
            )


@config
class MidtrainSet:
    """The full verified set.

    Attributes:
        max_per_problem: responses to one problem at most.
        max_tokens: of a conversation at most, as the stage that trains on it counts: its sequence length; None = any.
        caps: rows of a label at most.
    """

    max_per_problem: Positive
    max_tokens: Positive | None = None
    caps: tuple[Cap, ...] = ()


@config
class SFTSet:
    """The harder, cleaner, balanced subset.

    Attributes:
        difficulties: tiers to keep; problems of unknown difficulty are kept too.
        max_per_problem: responses to one problem at most, the longest of those that fit `max_tokens`.
        max_repetition: drop responses that repeat a larger share of themselves.
        one_boxed_answer: drop responses that do not box exactly one answer after their thinking.
        size: rows to keep, balanced; None = all.
        max_tokens, caps: as those of the mid-training set.
        balance: what `size` is balanced over: cells of these labels share it evenly.
    """

    difficulties: Annotated[tuple[Difficulty, ...], Field(min_length=1)]
    max_per_problem: Positive
    max_repetition: Share
    one_boxed_answer: bool
    size: Positive | None = None
    max_tokens: Positive | None = None
    balance: Annotated[tuple[BalanceKey, ...], Field(min_length=1)] = ("difficulty", "length")
    caps: tuple[Cap, ...] = ()


@config
class Delta:
    """Whose responses are chosen and whose are rejected: the delta between two models is what is learned.

    Attributes:
        strong, weak: teachers as the rollouts name them: of a directory its weights' hash, of an endpoint its model.
        by_verdict: chosen responses are right and rejected ones wrong; otherwise verdicts say nothing.
    """

    strong: Name
    weak: Name
    by_verdict: bool = False

    def __post_init__(self) -> None:
        if self.strong == self.weak:
            raise RuleBroken(
                f"{AT}strong and {AT}weak are both {self.weak}",
                rule="the responses of one model are chosen, those of a weaker one rejected",
                remedy=f"name a smaller or earlier model in {AT}weak",
            )


@config
class PairSet:
    """Preference pairs from rollouts of one question; both sides are complete responses.

    Attributes:
        mode: of right and wrong ones the nearest pairs, or random ones; or random pairs of two models' (`delta`).
        delta: the two models.
        nearness: what is near, see :mod:`phimr_nemo.data.pairs`.
        max_per_problem: pairs of one problem at most.
        max_length_ratio: no pair of which one is more than this many times as long as the other; None = any.
        difficulties: tiers to keep; problems of unknown difficulty are kept too. None = any.
        max_repetition: of either side; a model that is taught to avoid loops learns nothing about mathematics.
        max_tokens: of the question with either side, as those of the mid-training set.
        size: pairs to keep, balanced over `balance` (the length is that of the rejected side); None = all.
        caps: pairs of a label at most.
        voted_golds: use questions whose answer is a vote among solutions.
    """

    mode: Literal["near_miss", "random", "delta"]
    nearness: Literal["common_steps", "common_beginning"]
    max_per_problem: Positive
    max_length_ratio: AtLeastOne | None = None
    difficulties: Annotated[tuple[Difficulty, ...], Field(min_length=1)] | None = None
    max_repetition: Share = 1.0
    max_tokens: Positive | None = None
    size: Positive | None = None
    balance: Annotated[tuple[BalanceKey, ...], Field(min_length=1)] = ("difficulty", "length")
    caps: tuple[Cap, ...] = ()
    voted_golds: bool = False
    delta: Delta | None = None

    def __post_init__(self) -> None:
        if (self.mode == "delta") != (self.delta is not None):
            raise RuleBroken(
                f"{AT}mode={self.mode} {'with' if self.delta else 'without'} {AT}delta",
                rule=f"{AT}mode=delta, and no other, pairs the two models that {AT}delta names",
                remedy=f"set {AT}mode=delta {AT}delta.strong=TEACHER {AT}delta.weak=TEACHER, or {AT}delta=null",
            )


@config
class PromptSet:
    """Prompts for reinforcement learning.

    Attributes:
        min_pass, max_pass: the share of correct responses lies strictly between them.
        hard_below: prompts with a lower share are marked as hard, for oversampling.
        min_samples: graded responses that a prompt must have, over all sampling rounds.
        max_length_spread: coefficient of variation of the response lengths at most; None = any.
        max_tokens: of the prompt at most: what the stage's sequence length leaves beside its longest response;
            None = any.
        voted_golds: use questions whose answer is a vote among solutions.
    """

    min_pass: Number
    max_pass: Number
    hard_below: Share
    min_samples: Positive
    max_length_spread: AtLeastZero | None = None
    max_tokens: Positive | None = None
    voted_golds: bool = False

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
        tokenizer: directory of the tokenizer that the stages train with, which counts for `max_tokens`. None = the
            recorded number of tokens, else an estimate from the characters: a stage may then refuse a set.
        shard: this process's place among those that share the work.
    """

    run: RunConfig
    verdicts: Place | Annotated[tuple[Place, ...], Field(min_length=1)]
    workers: Positive
    tokenizer: Place | None = None
    shard: ShardConfig = field(default_factory=ShardConfig)
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
        """All directories of verdicts, each once however often it is named."""
        named = self.verdicts if isinstance(self.verdicts, tuple) else (self.verdicts,)
        distinct: dict[Place, Place] = {}
        for path in named:
            distinct.setdefault(path.resolve(), path)
        return tuple(distinct.values())
