"""What each rank does in the alignment stages' parity tests: run a stage, with a planted fault or a signal."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from phimr_nemo.align import policy, trainer_log
from phimr_nemo.align.distill.stage import run_distill
from phimr_nemo.align.dpo import stage as dpo_stage
from phimr_nemo.align.grpo import objective
from phimr_nemo.align.grpo import stage as grpo_stage
from phimr_nemo.config import DistillConfig, DPOConfig, GRPOConfig, load_config
from phimr_nemo.errors import Preempted


@dataclass(frozen=True)
class Case:
    """One run of a stage.

    Attributes:
        stage: "dpo", "grpo" or "distill".
        config: YAML file.
        grader: name in GRADERS.
        overrides: `key=value` items.
        fault: name of a planted fault, or None.
        stop_after: the step after which rank 0 is told to stop, or None.
    """

    stage: str
    config: Path
    grader: str
    overrides: tuple[str, ...]
    fault: str | None
    stop_after: int | None


SHORT_RESPONSE = 25
"""Characters; a good third of an untrained model's responses are shorter."""

# What an untrained model can please.
GRADERS: dict[str, Callable[[str], bool]] = {
    "even length": lambda response: len(response) % 2 == 0,
    "short": lambda response: len(response) < SHORT_RESPONSE,
    "never": lambda _: False,
}


class ToyGrader:
    """In the place of `verify.Grader`."""

    def __init__(self, is_correct: Callable[[str], bool]) -> None:
        self._is_correct = is_correct

    def __enter__(self) -> ToyGrader:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def grade_many(self, pairs: Sequence[tuple[str, str]], _cut_off: Sequence[bool]) -> list[Any]:
        return [SimpleNamespace(verdict="correct" if self._is_correct(text) else "wrong") for text, _ in pairs]


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Break one thing that parity depends on."""
    if fault is None:
        yield
    elif fault == "embedding gradients not summed over stages":
        name = "megatron.core.distributed.finalize_model_grads._allreduce_embedding_grads"
        with mock.patch(name, return_value=None):
            yield
    elif fault == "mean over the micro-batch":
        real = objective.GRPOObjective.loss

        def local_mean(self: Any, logprobs: Any, micro: Any) -> Any:
            loss, count, sums = real(self, logprobs, micro)
            return loss / count, count.clamp(max=1), sums

        with mock.patch.object(objective.GRPOObjective, "loss", local_mean):
            yield
    elif fault == "optimizer not restored":
        real_load = policy.MegatronPolicy.load_state_dict

        def forgetful(self: Any, state: Any) -> None:
            with mock.patch.object(self.optimizer.megatron, "load_state_dict", return_value=None):
                real_load(self, state)
            self.optimizer.megatron.reload_model_params()

        with mock.patch.object(policy.MegatronPolicy, "load_state_dict", forgetful):
            yield
    else:
        raise ValueError(fault)


@contextlib.contextmanager
def signalled(stop_after: int | None) -> Iterator[None]:
    """Send this process SIGUSR1 while it logs step `stop_after`, as a scheduler might."""
    real = trainer_log.TrainerLog._write

    def write(self: Any, step: int, row: Any, seconds: float) -> None:
        real(self, step, row, seconds)
        if step == stop_after and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGUSR1)

    with mock.patch.object(trainer_log.TrainerLog, "_write", write):
        yield


def run_case(case: Case) -> None:
    """Run a stage to its end, or to the stop that the case asks for."""
    toy = mock.patch.object(grpo_stage, "Grader", return_value=ToyGrader(GRADERS[case.grader]))
    with planted(case.fault), signalled(case.stop_after), toy:
        try:
            if case.stage == "dpo":
                dpo_stage.run_dpo(load_config(DPOConfig, case.config, case.overrides))
            elif case.stage == "distill":
                run_distill(load_config(DistillConfig, case.config, case.overrides))
            else:
                grpo_stage.run_grpo(load_config(GRPOConfig, case.config, case.overrides))
        except Preempted:
            assert case.stop_after is not None
        else:
            assert case.stop_after is None, "the run should have been stopped"
