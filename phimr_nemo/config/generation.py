"""Settings of problems, teachers, rollouts and their verification."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import (
    Dtype,
    LongRopePolicy,
    NonNegative,
    Positive,
    RunConfig,
    ShardConfig,
    Share,
    config,
)
from phimr_nemo.config.endpoint import AskConfig, EndpointConfig


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


@config
class RecordProblems:
    """Problems that the stage `prepare` made.

    Attributes:
        path: a record directory of problems.
        limit: only the first ones; 0 = all.
    """

    kind: Literal["records"]
    path: Path
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


@config
class EndpointTeacher:
    """A model behind an OpenAI-compatible endpoint: served by vLLM, SGLang or trtllm-serve, or an API.

    Attributes:
        max_new_tokens: of a response, reasoning included.
        prompt: the user's turn, with `{question}` in it once.
        system: the system's turn; None leaves it out.
        max_missing: the share of a shard's responses that may be missing for good (refused or failed).
    """

    kind: Literal["endpoint"]
    endpoint: EndpointConfig
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    prompt: str
    system: str | None = None
    max_missing: Share = 0.0


@config
class VLLMTeacher:
    """A model in a Hugging Face directory, sampled by vLLM in this process.

    Attributes:
        prompt: the user's turn, with `{question}` in it once.
        max_batch: sequences computed together.
        tensor: GPUs that share the model.
        memory_share: of each GPU's memory, for weights and KV cache; on a CPU, VLLM_CPU_KVCACHE_SPACE counts.
        longrope: how a model with LongRoPE was trained; vLLM picks one set of factors for all lengths.
        eager: no CUDA graphs and no compilation.
    """

    kind: Literal["vllm"]
    path: Path
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    prompt: str
    max_batch: Positive
    dtype: Dtype
    tensor: Positive = 1
    memory_share: Share
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    eager: bool = False


Teacher = Annotated[
    ProgrammaticTeacher | RecordedTeacher | ModelTeacher | EndpointTeacher | VLLMTeacher, Field(discriminator="kind")
]


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
class JudgeConfig:
    """The second opinion on answers that the grader does not accept.

    Attributes:
        ask: the judging model and the budget for it.
        verdicts: which of the grader's verdicts it looks at.
        overrules: whether an answer that it accepts becomes correct; otherwise its opinion is only recorded.
    """

    ask: AskConfig
    verdicts: tuple[Literal["wrong", "unparsable"], ...]
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
    rollouts: Path
    workers: Positive
    deadline_seconds: float
    judge: JudgeConfig | None = None
    grader: str | None = None
    shard: ShardConfig = field(default_factory=ShardConfig)
