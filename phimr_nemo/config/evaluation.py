"""Settings of evaluation and release."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import Dtype, LongRopePolicy, Positive, RunConfig, Share, config
from phimr_nemo.config.endpoint import EndpointConfig
from phimr_nemo.config.generation import FileProblems, RecordProblems, SyntheticProblems


@config
class BenchmarkProblems:
    """A benchmark by its name, checked to be whole.

    Attributes:
        name: AIME24, MATH-500, GPQA-Diamond, ...; docs/evaluation.md has the table.
        path: the user's own copy: a file, a directory of files, a dataset that `datasets` saved.
        hub: without a path, read the benchmark's dataset from the Hugging Face hub.
    """

    kind: Literal["benchmark"]
    name: str
    path: Path | None = None
    hub: bool = False


EvaluatedProblems = Annotated[
    BenchmarkProblems | SyntheticProblems | FileProblems | RecordProblems, Field(discriminator="kind")
]


@config
class LocalSampling:
    """The built-in engine in this process.

    Attributes:
        max_batch: sequences computed together.
    """

    kind: Literal["local"]
    max_batch: Positive
    dtype: Dtype


@config
class VLLMSampling:
    """vLLM in this process, which then runs in vLLM's environment.

    Attributes:
        max_batch: sequences computed together.
        tensor: GPUs that share the model.
        memory_share: of each GPU's memory; on a CPU, VLLM_CPU_KVCACHE_SPACE counts.
        eager: no CUDA graphs and no compilation.
    """

    kind: Literal["vllm"]
    max_batch: Positive
    dtype: Dtype
    tensor: Positive = 1
    memory_share: Share
    eager: bool = False


@config
class EndpointSampling:
    """A server with an OpenAI-compatible interface.

    Attributes:
        system: the system's turn; None leaves it out (a model of this recipe brings its own in the chat template).
        max_missing: the share of responses that may be missing for good (refused or failed).
    """

    kind: Literal["endpoint"]
    endpoint: EndpointConfig
    system: str | None = None
    max_missing: Share = 0.0


Sampling = Annotated[LocalSampling | VLLMSampling | EndpointSampling, Field(discriminator="kind")]


@config
class EvaluateConfig:
    """Scores of a model on problems.

    Attributes:
        model: Hugging Face directory; None only behind an endpoint, which has the model.
        samples: answers a question.
        prompt: the user's turn; `{question}` stands in it once.
        engine: what samples.
        longrope: the training run's policy; the longest sequence is the longest prompt and `max_new_tokens`. A
            served model has the server's.
        shard_questions: questions stored together: what a kill costs with an engine in this process. Behind an
            endpoint every response is stored as it comes.
        workers: grader processes.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
        row: the model's name in tables; None = the stage of the run that made it.
    """

    run: RunConfig
    model: Path | None = None
    problems: EvaluatedProblems
    samples: Positive
    prompt: str
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    engine: Sampling
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    shard_questions: Positive
    workers: Positive = 1
    grader: str | None = None
    row: str | None = None


@config
class ExportConfig:
    """A trained directory -> a release directory.

    Attributes:
        model: Hugging Face directory of the last stage.
        base_model: what it was trained from, for the model card.
        licence: its identifier on the hub.
        stages: stage name -> run directory, for the model card.
        evaluations: row name -> directory of an evaluation, for the model card's table.
        knows: what the model can be asked, in a sentence or two, with an example: for the model card and for the
            first line of `phimr chat`.
    """

    run: RunConfig
    model: Path
    base_model: str
    licence: str
    stages: dict[str, Path] = field(default_factory=dict)
    evaluations: dict[str, Path] = field(default_factory=dict)
    knows: str | None = None
