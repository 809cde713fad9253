"""Settings of problems, teachers, rollouts and their verification."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from phimr_nemo.config.common import RunConfig, ShardConfig
from phimr_nemo.config.engine import (
    EndpointEngine,
    Engine,
    GraderName,
    Prices,
    SampledLongRope,
    SamplingConfig,
)
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import (
    AboveZero,
    AtLeastZero,
    IsNumber,
    NonNegative,
    Place,
    Positive,
    PositiveShare,
    Share,
)

LARGEST_SYNTHETIC: Final = 300_000
"""So many distinct problems there are on either side of the split (measured by making them)."""
SyntheticCount = Annotated[int, Field(ge=1, le=LARGEST_SYNTHETIC), IsNumber]


def own_directory(key: str, directory: Path | None, engine: Any) -> None:
    """An engine in this process has a model to read.

    Raises:
        RuleBroken: there is none.
    """
    if directory is None and not isinstance(engine, EndpointEngine):
        raise RuleBroken(
            f"no {AT}{key} for {AT}engine.kind={engine.kind}",
            rule="an engine in this process reads the model from a Hugging Face directory",
            remedy=f"set {AT}{key}=DIRECTORY, or {AT}engine.kind to endpoint for a served model",
        )


def no_second_model(key: str, directory: Path | None, engine: Any) -> None:
    """An endpoint has its model, and reads no directory.

    Raises:
        RuleBroken: one is named.
    """
    if directory is not None and isinstance(engine, EndpointEngine):
        raise RuleBroken(
            f"{AT}{key}={directory} with {AT}engine.kind=endpoint",
            rule=f"the server has the model, by the name {AT}engine.endpoint.model",
            remedy=f"set {AT}{key}=null",
        )


@config
class SyntheticProblems:
    """Problems that the project generates by seed.

    Attributes:
        count: how many.
        split: which side of the split by construction.
    """

    kind: Literal["synthetic"]
    count: SyntheticCount
    split: Literal["train", "heldout"]


@config
class FileProblems:
    """Problems from the user's file (JSON, JSONL, parquet, .gz, .zst).

    Attributes:
        path: the file.
        question, answer, solution: column names; found by themselves when None.
        limit: read only the first rows; 0 = all.
    """

    kind: Literal["file"]
    path: Place
    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    limit: NonNegative = 0


@config
class RecordProblems:
    """Problems that the stage `prepare` made.

    Attributes:
        path: a record directory of problems.
        answered: record directories of rollouts, such as those that `prepare` took from the sources: a problem that
            has one there is not asked.
        limit: only the first ones of what is left; 0 = all.
    """

    kind: Literal["records"]
    path: Place
    answered: tuple[Place, ...] = ()
    limit: NonNegative = 0


Problems = Annotated[SyntheticProblems | FileProblems | RecordProblems, Field(discriminator="kind")]


@config
class ProgrammaticTeacher:
    """Writes step-by-step solutions of synthetic problems and makes mistakes at a set rate.

    Attributes:
        mistake_rate: share of the solutions with a mistake.
        style: "careful" calculates one digit at a time, "terse" at once; None = half of each.
    """

    kind: Literal["programmatic"]
    mistake_rate: Share
    style: Literal["careful", "terse"] | None = None


@config
class RecordedTeacher:
    """Recorded solutions instead of a live teacher.

    Attributes:
        path: a file of questions with their recorded solutions, correct and wrong.
        question, answer: column names; found by themselves when None.
        response: column of the solution; None also finds nested ones (one object a model).
        limit: read only the first rows; 0 = all.
    """

    kind: Literal["recorded"]
    path: Place
    question: str | None = None
    answer: str | None = None
    response: str | None = None
    limit: NonNegative = 0


@config
class ModelTeacher(SamplingConfig):
    """A model that is sampled: one in a Hugging Face directory, or a served one.

    Attributes:
        path: the directory; None only behind an endpoint, which has the model.
        engine: what samples.
        longrope: which of LongRoPE's factors; the longest sequence is the longest prompt and `max_new_tokens`. A
            served model has the server's.
    """

    kind: Literal["model"]
    path: Place | None = None
    engine: Engine
    longrope: SampledLongRope = "as_trained"

    def __post_init__(self) -> None:
        own_directory("path", self.path, self.engine)
        no_second_model("path", self.path, self.engine)


Teacher = Annotated[ProgrammaticTeacher | RecordedTeacher | ModelTeacher, Field(discriminator="kind")]


@config
class GenerateConfig:
    """Problems -> rollouts.

    Attributes:
        problems: what is asked; a recorded teacher brings its own questions and needs none.
        rollouts_per_problem: samples per question; a recorded teacher gives what it has.
        shard_size: problems (recorded: rollouts) per shard.
    """

    run: RunConfig
    problems: Problems | None = None
    teacher: Teacher
    rollouts_per_problem: Positive
    shard_size: Positive
    shard: ShardConfig = field(default_factory=ShardConfig)

    def __post_init__(self) -> None:
        if self.problems is None and not isinstance(self.teacher, RecordedTeacher):
            raise RuleBroken(
                f"{AT}teacher.kind={self.teacher.kind} without problems",
                rule="only a recorded teacher brings its own questions",
                remedy=f"set {AT}problems.kind=synthetic {AT}problems.count=1000 {AT}problems.split=train, or "
                f"{AT}problems.kind=file {AT}problems.path=FILE",
            )
        if isinstance(self.teacher, ProgrammaticTeacher) and not isinstance(self.problems, SyntheticProblems):
            raise RuleBroken(
                f"{AT}teacher.kind=programmatic with {AT}problems.kind={self.problems and self.problems.kind}",
                rule="the programmatic teacher solves the project's own synthetic problems only",
                remedy=f"set {AT}problems.kind=synthetic {AT}problems.count=1000 {AT}problems.split=train, or use "
                f"{AT}teacher.kind=model or {AT}teacher.kind=recorded",
            )


@config
class AskConfig(SamplingConfig):
    """A model that answers short questions, a judge or an annotator, and what it may spend.

    Attributes:
        path: its Hugging Face directory; None only behind an endpoint, which has the model.
        engine: what samples.
        longrope: which of LongRoPE's factors; a served model has the server's.
        sequence_length: longest question with its reply (tokens) in this process; a longer question has no reply.
        max_requests, max_total_tokens, max_cost: the budget of one process's journal of replies, earlier runs
            included; None = no limit. Tokens and costs are known afterwards: as many replies more than the budget may
            come as are under way together.
    """

    path: Place | None = None
    engine: Engine
    longrope: SampledLongRope = "as_trained"
    top_p: PositiveShare = 1.0
    sequence_length: Positive = 4096
    max_requests: NonNegative | None = None
    max_total_tokens: NonNegative | None = None
    max_cost: AtLeastZero | None = None

    def __post_init__(self) -> None:
        own_directory("path", self.path, self.engine)
        no_second_model("path", self.path, self.engine)
        if isinstance(self.engine, EndpointEngine) and (self.engine.system is not None or self.engine.max_missing):
            raise RuleBroken(
                f"{AT}engine.system={self.engine.system} {AT}engine.max_missing={self.engine.max_missing}",
                rule="a judge's or an annotator's questions bring their own system turn, and one without a reply is "
                "counted",
                remedy=f"set {AT}engine.system=null {AT}engine.max_missing=0.0",
            )
        if not isinstance(self.engine, EndpointEngine) and self.max_new_tokens >= self.sequence_length:
            raise RuleBroken(
                f"{AT}max_new_tokens={self.max_new_tokens} with {AT}sequence_length={self.sequence_length}",
                rule=f"{AT}sequence_length holds the question and its reply",
                remedy=f"use {AT}sequence_length={2 * self.max_new_tokens}, or a smaller {AT}max_new_tokens",
            )
        if self.max_cost is not None and self.prices is None:
            raise RuleBroken(
                f"{AT}max_cost={self.max_cost} without prices",
                rule="a limit of cost needs an endpoint's prices",
                remedy=f"set {AT}engine.endpoint.prices.input_per_million and {AT}engine.endpoint.prices."
                f"output_per_million, or {AT}max_cost=null and {AT}max_total_tokens instead",
            )

    @property
    def prices(self) -> Prices | None:
        """What tokens cost, where that is known."""
        return self.engine.endpoint.prices if isinstance(self.engine, EndpointEngine) else None


@config
class AnnotationConfig:
    """Domain and difficulty for problems whose source tells none.

    Attributes:
        ask: the annotator, a model; None = rules alone.
    """

    ask: AskConfig | None = None


@config
class JudgeConfig:
    """The second opinion on answers that the grader does not accept.

    Attributes:
        ask: the judging model and the budget for it.
        verdicts: which of the grader's verdicts it looks at.
        overrules: whether an answer that it accepts becomes correct; otherwise its opinion is only recorded.
    """

    ask: AskConfig
    verdicts: Annotated[tuple[Literal["wrong", "unparsable"], ...], Field(min_length=1)]
    overrules: bool


@config
class VerifyConfig:
    """Rollouts -> verdicts.

    Attributes:
        workers: grader processes.
        deadline_seconds: an answer that takes longer is a timeout.
        judge: a small model that looks again at answers called wrong; None = off.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
    """

    run: RunConfig
    rollouts: Place
    workers: Positive
    deadline_seconds: AboveZero
    judge: JudgeConfig | None = None
    grader: GraderName | None = None
    shard: ShardConfig = field(default_factory=ShardConfig)
