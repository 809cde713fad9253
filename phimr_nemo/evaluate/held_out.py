"""A small pass@1 while training: the weights of a step answer held-out questions, and the grader grades them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import HeldOutConfig, LocalEngine, ModelConfig, ServerEngine, TrainingEvaluationConfig
from phimr_nemo.config.engine import QUESTION
from phimr_nemo.data.chat import load_tokenizer, render_prompts, response_text
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.statistics import mean_and_clustered_error
from phimr_nemo.generate.engines import SampledModel, ServerRun, named_by_weights, open_engine, params_of
from phimr_nemo.generate.sampler import Completion, Request, Unfinished
from phimr_nemo.generate.stage import read_configured_problems
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.origin import Origin
from phimr_nemo.model.regime import opening_as_trained
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.content import content_seed
from phimr_nemo.verify import Grader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIRECTORY: Final = "evaluation"
CORRECT: Final = "correct"
SHOWN_CHARS: Final = 80
RUN_NAME_BYTES: Final = 4
"""Tells servers whose weights they are given."""


class HeldOut:
    """The questions of an evaluation while training, and what their answers score.

    Args:
        directory: the run directory; responses and verdicts go to `evaluation/step-N.json` there.
        config: problems and sampling.
        base: the directory whose tokenizer is used.
        seed: of problems and sampling.
        sequence_length: prompt and response together (tokens), where the engine was opened for so many; None = any.

    Raises:
        UserError: an unreadable problems file, or a question that leaves no room for its response.
    """

    def __init__(
        self, directory: Path, config: HeldOutConfig, *, base: Path, seed: int, sequence_length: int | None = None
    ) -> None:
        self._directory, self._config = directory / DIRECTORY, config
        self.params = params_of(config)
        self._tokenizer = load_tokenizer(base)
        table, _ = read_configured_problems(config.problems, seed)
        problems = table.select(["id", "question", "answer"]).to_pylist()
        self._questions = {one["question"] for one in problems}
        prompts = render_prompts(
            self._tokenizer, [config.prompt.replace(QUESTION, one["question"]) for one in problems]
        )
        self.longest = max(map(len, prompts), default=0) + config.max_new_tokens
        if sequence_length is not None and self.longest > sequence_length:
            raise UserError(
                f"a question of evaluation.problems has {self.longest - config.max_new_tokens} tokens, and "
                f"evaluation.max_new_tokens={config.max_new_tokens}",
                rule=f"the run's engine is open for sequence_length={sequence_length} tokens, prompt and response",
                remedy="lower evaluation.max_new_tokens, leave the question out, or raise sequence_length",
            )
        asked = [
            (one, ids, index) for one, ids in zip(problems, prompts, strict=True) for index in range(config.samples)
        ]
        self._names = [one["id"] for one, _, _ in asked]
        self._answers = [one["answer"] for one, _, _ in asked]
        self.requests = [
            Request(f"{one['id']}:{index}", tuple(ids), content_seed(str(seed), one["id"], str(index)))
            for one, ids, index in asked
        ]

    def check_apart(self, trained: Iterable[str], source: Path) -> None:
        """Held-out questions are not trained on.

        Args:
            trained: the questions that are.
            source: where they were read.

        Raises:
            UserError: some are.
        """
        shared = self._questions & set(trained)
        if shared:
            raise UserError(
                f"{len(shared)} of {len(self._questions)} questions of evaluation.problems are trained on, in "
                f"{source}; one is {min(shared)[:SHOWN_CHARS]!r}",
                rule="pass@1 while training is measured on questions that are held out",
                remedy="take them out of evaluation.problems, or out of the training data",
            )

    def score(self, completions: Sequence[Completion], step: int) -> dict[str, float]:
        """Grade the completions of `requests`, in their order, and write them down.

        Returns:
            pass1, its standard error clustered by question, and the share of responses that end by themselves.
        """
        responses = [
            response_text(self._tokenizer, request.prompt_ids, completion.token_ids)
            for request, completion in zip(self.requests, completions, strict=True)
        ]
        with Grader(workers=self._config.workers, function=self._config.grader) as grader:
            verdicts = grader.grade_many(
                list(zip(responses, self._answers, strict=True)),
                [completion.finish_reason == "length" for completion in completions],
            )
        correct: dict[str, list[bool]] = {}
        for name, verdict in zip(self._names, verdicts, strict=True):
            correct.setdefault(name, []).append(verdict.verdict == CORRECT)
        score, error = mean_and_clustered_error(correct)
        stopped = sum(completion.finish_reason == "stop" for completion in completions) / len(completions)
        rows = [
            {"problem_id": name, "response": response, "verdict": verdict.verdict, "extracted": verdict.extracted}
            for name, response, verdict in zip(self._names, responses, verdicts, strict=True)
        ]
        table = {"step": step, "grader": grader.name, "pass1": score, "stderr": error, "responses": rows}
        write_json(self._directory / f"step-{step:08d}.json", table)
        return {"pass1": score, "pass1_stderr": error, "pass1_stopped": stopped}


def lost_answers(count: int, step: int) -> UserError:
    """What to say when servers have lost held-out questions."""
    return UserError(
        f"{count} held-out questions of the evaluation after step {step} have no answer: the servers were lost",
        rule="pass@1 is over all of evaluation.problems",
        remedy="look at the rollout servers, start them again, and run the same command: it continues at the newest "
        "checkpoint",
    )


@dataclass
class OwnEngine:
    """The engine of an evaluation while training, in the one process that samples.

    vLLM and servers stay open between evaluations and are given the step's weights; the built-in engine is opened
    with them, so that it holds no second model while training goes on.

    Attributes:
        config: the evaluation.
        base: the run's base.
        model: how the run computes.
        sequence_length: the run's longest sequence (tokens), which decides LongRoPE's factors.
        device: of this process.
    """

    config: TrainingEvaluationConfig
    base: Path
    model: ModelConfig
    sequence_length: int
    device: torch.device
    _name: str = field(default_factory=lambda: secrets.token_hex(RUN_NAME_BYTES))
    _opened: Any = None

    def sample(self, held_out: HeldOut, tensors: Iterable[tuple[str, Tensor]], step: int) -> list[Completion]:
        """The responses of a step's weights.

        Args:
            held_out: the questions.
            tensors: all weights under their Hugging Face names.
            step: that made them.

        Raises:
            UserError: see :func:`phimr_nemo.generate.engines.open_engine`.
        """
        if isinstance(self.config.engine, LocalEngine):
            # Every process gives its part of the weights, whatever becomes of the engine.
            with closing(self._open(held_out, list(tensors))) as opened:
                return list(opened.sampler.sample(held_out.requests, held_out.params))
        if self._opened is None:
            self._opened = self._open(held_out, ())
        self._opened.sampler.update_weights(tensors, step)
        try:
            return list(self._opened.sampler.sample(held_out.requests, held_out.params))
        except Unfinished as unfinished:
            raise lost_answers(len(held_out.requests) - len(unfinished.completed), step) from unfinished

    def _open(self, held_out: HeldOut, weights: Iterable[tuple[str, Tensor]]) -> Any:
        engine, architecture = self.config.engine, Architecture.from_directory(self.base)
        trained = Origin(self.sequence_length, self.model.longrope)
        opening = opening_as_trained(architecture, trained, held_out.longest)
        is_served = isinstance(engine, ServerEngine)
        described = SampledModel(
            directory=self.base,
            # Servers were started for the run's longest sequence.
            longrope=self.model.longrope if is_served else opening.policy,
            max_length=self.sequence_length if is_served else opening.max_length,
            weights=weights,
            dtype=self.model.dtype,
            device=self.device,
            run=ServerRun(self._name, True, "resample", named_by_weights(self.base)) if is_served else None,
        )
        return open_engine(engine, described, held_out.params)

    def close(self) -> None:
        """Free what is open."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
