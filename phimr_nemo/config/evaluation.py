"""Settings of evaluation and release."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field

from phimr_nemo.config.common import RunConfig
from phimr_nemo.config.engine import (
    Engine,
    GraderName,
    LocalEngine,
    SampledLongRope,
    SamplingConfig,
    TrainedEngine,
    not_colocated,
    samples_as_trained,
)
from phimr_nemo.config.generation import FileProblems, Problems, RecordProblems, SyntheticProblems, own_directory
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import AboveZero, Name, NonNegative, Place, Positive, Share

BenchmarkName = Literal[
    "AIME24", "AIME25", "AMC23", "AMC", "MATH-500", "GSM8K", "OlympiadBench", "GPQA-Diamond", "Omni-MATH"
]
FROM_FILES_ONLY: Final[dict[BenchmarkName, str]] = {
    "AMC": "",
    "GPQA-Diamond": ": its authors ask that it is not passed on",
}
"""Benchmarks that are not read from the hub, and why."""


@config
class BenchmarkProblems:
    """A benchmark by its name, checked to be whole.

    Attributes:
        name: AIME24, MATH-500, GPQA-Diamond, ...; docs/evaluation.md has the table.
        path: the user's own copy: a file, a directory of files, a dataset that `datasets` saved.
        hub: without a path, read the benchmark's dataset from the Hugging Face hub.
    """

    kind: Literal["benchmark"]
    name: BenchmarkName
    path: Place | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        if self.path is None and not self.hub:
            raise RuleBroken(
                f"benchmark {self.name} without a place to read it from",
                rule="a benchmark comes from your own copy or from the Hugging Face hub; none ships here",
                remedy=f"set {AT}path=FILE, or {AT}hub=true",
            )
        if self.path is None and self.name in FROM_FILES_ONLY:
            raise RuleBroken(
                f"benchmark {self.name} with {AT}hub=true",
                rule=f"it is read from a file only{FROM_FILES_ONLY[self.name]}",
                remedy=f"download it and set {AT}path=FILE",
            )


EvaluatedProblems = Annotated[
    BenchmarkProblems | SyntheticProblems | FileProblems | RecordProblems, Field(discriminator="kind")
]


@config
class EvaluateConfig(SamplingConfig):
    """Scores of a model on problems.

    Attributes:
        model: Hugging Face directory; None only behind an endpoint, which has the model.
        samples: answers per question.
        engine: what samples.
        longrope: which of LongRoPE's factors; the longest sequence is the longest prompt and `max_new_tokens`. A
            served model has the server's.
        shard_questions: questions stored together: what a kill costs with an engine in this process. Behind an
            endpoint every response is stored as it comes.
        workers: grader processes.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
        row: the model's name in tables; None = the stage of the run that made it.
    """

    run: RunConfig
    model: Place | None = None
    problems: EvaluatedProblems
    samples: Positive
    engine: Engine
    longrope: SampledLongRope = "as_trained"
    shard_questions: Positive
    workers: Positive = 1
    grader: GraderName | None = None
    row: str | None = None

    def __post_init__(self) -> None:
        own_directory("model", self.model, self.engine)


@config
class HeldOutConfig(SamplingConfig):
    """A small pass@1 while training: the weights of a step answer held-out questions.

    Attributes:
        every: steps between two evaluations; the last step has one as well.
        samples: answers per question.
        workers: grader processes.
        grader: a grader of another domain as MODULE:FUNCTION (docs/verification.md); None = mathematics.
    """

    every: Positive
    problems: Problems
    samples: Positive
    workers: Positive = 1
    grader: GraderName | None = None


@config
class TrainingEvaluationConfig(HeldOutConfig):
    """The same in a stage that does not sample otherwise: the first process has the engine.

    Attributes:
        engine: what samples, by `model.longrope` as it is trained.
    """

    engine: TrainedEngine = field(default_factory=LocalEngine)

    def __post_init__(self) -> None:
        samples_as_trained({"temperature": self.temperature}, self.top_p, self.engine)
        not_colocated(self.engine)


@config
class LicensedConfig:
    """A source of training data, for a model card.

    Attributes:
        name: of the data set; one of the hub's (owner/name) stands in the card's metadata too.
        licence: its identifier on the hub.
    """

    name: Name
    licence: Name


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
        data: sources of the training data with their licences, for the model card.
    """

    run: RunConfig
    model: Place
    base_model: Name
    licence: Name
    stages: dict[str, Place] = field(default_factory=dict)
    evaluations: dict[str, Place] = field(default_factory=dict)
    knows: str | None = None
    data: tuple[LicensedConfig, ...] = ()


@config
class MonitorConfig:
    """What is watched while GRPO runs, and when a warning says that it collapses: `align.grpo.collapse`.

    Attributes:
        dashboard_every: steps between two versions of the picture `grpo.png`.
        window: a rule looks at means over as many steps.
        repetitive_rise: by how much the share of responses that mostly repeat themselves may rise above the lowest
            that the run has had.
        overlong_rise: by how much the share of cut-off responses may rise above the lowest that the run has had.
        entropy_share: smallest healthy entropy, as a share of the highest that the run has had.
        solved_pass_rate: from here on low entropy is no fault.
        max_entropy: largest healthy entropy of a sampled token, in nats.
        pass_rate_drop: by how much the pass rate may fall below the best that the run has had.
        ungraded_warning: a warning where the grader gave up on a larger share of a round's responses.
        ungraded_stop: the run stops where it gave up on a larger share than this.
        responses_every: steps between two samples of responses, with their prompts, rewards and verdicts, that are
            kept for people (`phimr show`); 0 = none.
        responses: how many are kept of such a step, whole groups of them, one at least.
    """

    dashboard_every: Positive
    window: Positive
    repetitive_rise: Share
    overlong_rise: Share
    entropy_share: Share
    solved_pass_rate: Share
    max_entropy: AboveZero
    pass_rate_drop: Share
    ungraded_warning: Share
    ungraded_stop: Share
    responses_every: NonNegative = 10
    responses: Positive = 64
