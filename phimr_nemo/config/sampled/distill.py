"""Settings of on-policy distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import Dtype, is_measured
from phimr_nemo.config.engine import EndpointConfig
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.sampled.rounds import RoundsCheckpointConfig, RoundsConfig
from phimr_nemo.config.values import AtLeastZero, Decay, Place


@config
class DirectoryTeacher:
    """A teacher in the trainer's processes, in the student's layout, of any size that this layout allows.

    Attributes:
        path: Hugging Face directory; with the student's tokenizer and vocabulary.
        dtype: what it is computed in; None = the student's.
    """

    kind: Literal["directory"]
    path: Place
    dtype: Dtype | None = None


@config
class ServerTeacher:
    """A served teacher that returns the log-probabilities of a prompt: OpenAI's completions with `echo`, as of vLLM.

    Attributes:
        tokenizer: directory with the tokenizer that it is served with, which is compared with the student's.
    """

    kind: Literal["server"]
    endpoint: EndpointConfig
    tokenizer: Place


Teacher = Annotated[DirectoryTeacher | ServerTeacher, Field(discriminator="kind")]


@config
class SampledLoss:
    """Reverse KL on the sampled token, as a policy gradient: an advantage of log teacher - log student each.

    Attributes:
        clip_low, clip_high: a token's ratio to the policy before the round stays in [1 - clip_low, 1 + clip_high].
    """

    kind: Literal["sampled_reverse_kl"]
    clip_low: Decay
    clip_high: AtLeastZero


@config
class WholeLoss:
    """Reverse KL over the whole vocabulary, at every token of a response: no variance, for the teacher's logits."""

    kind: Literal["reverse_kl"]


DistillLoss = Annotated[SampledLoss | WholeLoss, Field(discriminator="kind")]


@config
class DistillCheckpointConfig(RoundsCheckpointConfig):
    """Checkpoints of distillation.

    Attributes:
        metric: what `best` and early stopping go by: pass@1 on held-out questions, or a mean between two checkpoints
            over the responses that are trained on.
    """

    metric: Literal["reverse_kl", "pass_rate", "pass1"] = "reverse_kl"


@config
class DistillConfig(RoundsConfig):
    """On-policy distillation: the student samples, the teacher scores every token of what it said.

    Attributes:
        group_size: responses per prompt; they are not compared.
        teacher: what scores.
        loss: the reverse KL divergence of the student from it.
        verify_workers: grader processes on each data-parallel rank, for the metric pass_rate; nothing is learnt from
            verdicts. 0 = responses are not graded, and prompts need no answers.
    """

    teacher: Teacher
    loss: DistillLoss
    checkpoint: DistillCheckpointConfig

    @property
    def has_second_model(self) -> bool:
        """The teacher is one."""
        return True

    @property
    def weighs_tokens(self) -> bool:
        """Whether what a sampled token is worth depends on how probable it was."""
        return self.loss.kind == "sampled_reverse_kl"

    def __post_init__(self) -> None:
        self._check_rounds()
        needs = {
            "pass1": ("evaluation", self.evaluation is not None),
            "pass_rate": ("verify_workers above 0", self.verify_workers > 0),
        }
        is_measured(self.checkpoint, self.early_stopping, needs, otherwise="reverse_kl")
        self._check_server()
        if not self.weighs_tokens and self.correction.kind != "none":
            raise RuleBroken(
                f"{AT}correction.kind={self.correction.kind} with {AT}loss.kind={self.loss.kind}",
                rule="the divergence over the whole vocabulary weighs no sampled token",
                remedy=f"set {AT}correction.kind=none, or {AT}loss.kind=sampled_reverse_kl",
            )

    def _check_server(self) -> None:
        """A server tells one number a token, at temperature 1."""
        if not isinstance(self.teacher, ServerTeacher):
            return
        if not self.weighs_tokens:
            raise RuleBroken(
                f"{AT}loss.kind={self.loss.kind} with {AT}teacher.kind=server",
                rule="a server returns the log-probability of the sampled token, not whole distributions",
                remedy=f"set {AT}loss.kind=sampled_reverse_kl {AT}loss.clip_low=0.2 {AT}loss.clip_high=0.2",
            )
        asked = {"temperature.start": self.temperature.start, "temperature.end": self.temperature.end}
        if set(asked.values()) != {1.0}:
            raise RuleBroken(
                f"{AT}teacher.kind=server with " + " ".join(f"{AT}{key}={value}" for key, value in asked.items()),
                rule="a server's log-probabilities of a prompt are those of temperature 1; the student's must be too",
                remedy=" ".join(f"{AT}{key}=1.0" for key in asked),
            )
