"""Settings of the problems: sources, deduplication, decontamination, annotation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import IsNumber, Name, NonNegative, Place, Positive, PositiveShare, RunConfig
from phimr_nemo.config.engine import AskConfig
from phimr_nemo.config.rules import AT, RuleBroken, config

Preset = Literal[
    "openr1_math",
    "openthoughts",
    "bespoke_stratos",
    "numina_math",
    "big_math",
    "omni_math",
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
class AnnotationConfig:
    """Domain and difficulty for problems whose source tells none.

    Attributes:
        ask: the annotator, a model behind an OpenAI-compatible endpoint; None = rules alone.
    """

    ask: AskConfig | None = None


@config
class PrepareConfig:
    """Sources -> problems and, from sources with trajectories, rollouts.

    Attributes:
        sources: in the order in which they win where duplicates are equal otherwise.
        near_duplicates, decontamination, annotation: None = not done.
        shard_size: problems (rollouts) a shard.
    """

    run: RunConfig
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    near_duplicates: NearDuplicatesConfig | None = None
    decontamination: DecontaminationConfig | None = None
    annotation: AnnotationConfig | None = None
    shard_size: Positive

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise RuleBroken(
                f"{AT}sources: {repeated} occur more than once",
                rule="every source has its own name: it stands in the records and in the counts",
                remedy="rename one of them",
            )
