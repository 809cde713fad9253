"""A small pass@1 while training: the current weights answer some problems, and the grader grades them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.config import ModelConfig, TrainingEvaluationConfig
from phimr_nemo.config.engine import QUESTION
from phimr_nemo.data.chat import decode_response, load_tokenizer, render_prompts
from phimr_nemo.evaluate.statistics import mean_and_clustered_error
from phimr_nemo.generate.engines import SampledModel, open_engine, params_of
from phimr_nemo.generate.sampler import Completion, Request
from phimr_nemo.generate.stage import read_configured_problems
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.content import content_seed
from phimr_nemo.supervised.callbacks import RunMonitor
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import exported, wait_for_all
from phimr_nemo.verify import Grader

DIRECTORY: Final = "evaluation"


class TrainingEvaluation(pl.Callback):
    """pass@1 every so many steps. All ranks give their weights, rank 0 samples and grades, the others wait.

    Args:
        directory: the run directory; responses and verdicts go to `evaluation/step-N.json` there.
        config: problems and sampling.
        base: the directory whose tokenizer is used.
        seed: of problems and sampling.
        model: how the run computes: its LongRoPE policy and precision.
        monitor: writes the score among the run's metrics.

    Raises:
        UserError: an unreadable problems file.
    """

    def __init__(
        self,
        directory: Path,
        config: TrainingEvaluationConfig,
        *,
        base: Path,
        seed: int,
        model: ModelConfig,
        monitor: RunMonitor,
    ) -> None:
        self.directory, self.config, self.monitor = directory / DIRECTORY, config, monitor
        self.base, self.model = base, model
        self.architecture = Architecture.from_directory(base)
        self.params = params_of(config)
        self.tokenizer = load_tokenizer(base)
        table, _ = read_configured_problems(config.problems, seed)
        self.problems = table.select(["id", "question", "answer"]).to_pylist()
        turns = [config.prompt.replace(QUESTION, problem["question"]) for problem in self.problems]
        self.requests = [
            Request(f"{problem['id']}:{index}", tuple(ids), content_seed(str(seed), problem["id"], str(index)))
            for problem, ids in zip(self.problems, render_prompts(self.tokenizer, turns), strict=True)
            for index in range(config.samples)
        ]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Evaluate when it is time (collective)."""
        if trainer.global_step % self.config.every:
            return
        tensors = exported(trainer.strategy.megatron_parallel, self.architecture)
        if dist.get_rank() == 0:
            self.monitor.write(trainer.global_step, self._evaluate(tensors, trainer.global_step))
        else:
            for _ in tensors:
                continue
        wait_for_all(f"problems are answered at step {trainer.global_step}")

    def _evaluate(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> dict[str, float]:
        completions = self._sample(tensors)
        responses = [decode_response(self.tokenizer, completion.token_ids) for completion in completions]
        answers = [problem["answer"] for problem in self.problems for _ in range(self.config.samples)]
        with Grader(workers=self.config.workers, function=self.config.grader) as grader:
            verdicts = grader.grade_many(list(zip(responses, answers, strict=True)))
        correct: dict[str, list[bool]] = {}
        names = [problem["id"] for problem in self.problems for _ in range(self.config.samples)]
        for name, verdict in zip(names, verdicts, strict=True):
            correct.setdefault(name, []).append(verdict.verdict == "correct")
        score, error = mean_and_clustered_error(correct)
        stopped = sum(completion.finish_reason == "stop" for completion in completions) / len(completions)
        rows = [
            {"problem_id": name, "response": response, "verdict": verdict.verdict, "extracted": verdict.extracted}
            for name, response, verdict in zip(names, responses, verdicts, strict=True)
        ]
        table = {"step": step, "grader": grader.name, "pass1": score, "responses": rows}
        write_json(self.directory / f"step-{step:08d}.json", table)
        return {"pass1": score, "pass1_stderr": error, "pass1_stopped": stopped}

    def _sample(self, tensors: Iterator[tuple[str, Tensor]]) -> list[Completion]:
        longest = max(len(request.prompt_ids) for request in self.requests)
        model = SampledModel(
            directory=self.base,
            longrope=self.model.longrope,
            max_length=longest + self.params.max_new_tokens,
            # Every process gives its part of them, whatever becomes of the engine.
            weights=list(tensors),
            dtype=self.model.dtype,
            device=platform.device(),
        )
        with closing(open_engine(self.config.engine, model, self.params)) as opened:
            return list(opened.sampler.sample(self.requests, self.params))
