"""Settings of problems, teachers, rollouts and their verification."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import NonNegative, Positive, RunConfig, ShardConfig, Share, config


@config
class SyntheticProblems:
    """Problems that the project generates by seed.

    Attributes:
        count: how many.
        split: which side of the split by construction.
    """

    kind: Literal["synthetic"]
    count: Positive
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
    path: Path
    question: str | None = None
    answer: str | None = None
    solution: str | None = None
    limit: NonNegative = 0


Problems = Annotated[SyntheticProblems | FileProblems, Field(discriminator="kind")]


@config
class ProgrammaticTeacher:
    """Writes step-by-step solutions of synthetic problems and makes mistakes at a set rate."""

    kind: Literal["programmatic"]
    mistake_rate: Share


@config
class RecordedTeacher:
    """Recorded solutions instead of a live teacher.

    Attributes:
        path: a file of questions with their recorded solutions, right and wrong.
        question, answer: column names; found by themselves when None.
        response: column of the solution; None also finds nested ones (one object a model).
        limit: read only the first rows; 0 = all.
    """

    kind: Literal["recorded"]
    path: Path
    question: str | None = None
    answer: str | None = None
    response: str | None = None
    limit: NonNegative = 0


@config
class ModelTeacher:
    """A model in a Hugging Face directory, sampled in this process."""

    kind: Literal["model"]
    path: Path
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    max_batch: Positive = 256


Teacher = Annotated[ProgrammaticTeacher | RecordedTeacher | ModelTeacher, Field(discriminator="kind")]


@config
class GenerateConfig:
    """Problems -> rollouts.

    Attributes:
        problems: what is asked; a recorded teacher brings its own questions and needs none.
        rollouts_per_problem: samples a question; a recorded teacher gives what it has.
        shard_size: problems (recorded: rollouts) a shard.
    """

    run: RunConfig
    problems: Problems | None = None
    teacher: Teacher
    rollouts_per_problem: Positive
    shard_size: Positive
    shard: ShardConfig = field(default_factory=ShardConfig)


@config
class VerifyConfig:
    """Rollouts -> verdicts.

    Attributes:
        workers: grader processes.
        deadline_seconds: an answer that takes longer is a timeout.
    """

    run: RunConfig
    rollouts: Path
    workers: Positive
    deadline_seconds: float
    shard: ShardConfig = field(default_factory=ShardConfig)
