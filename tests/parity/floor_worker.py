"""What a rank does in the tests of the training floor: any of the four stages, stopped, poisoned or left alone."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from align_worker import GRADERS, ToyGrader, signalled
from supervised_worker import after_step

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import Preempted
from phimr_nemo.jobs.launch import run_stage

CONF = Path(__file__).resolve().parents[2] / "conf"
ALIGNED = ("dpo", "grpo")


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        said: its warnings.
        preempted: whether it ended because it was told to.
        digests: of all weights after each optimizer step of an alignment stage.
    """

    said: list[str]
    preempted: bool
    digests: list[str]


class Listener(logging.Handler):
    """Keeps what the project warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def poisoned(update: int | None) -> Iterator[None]:
    """The loss of an alignment stage's optimizer step (from 1) is not a number."""
    from phimr_nemo.align.policy import MegatronPolicy

    if update is None:
        yield
        return
    calls = 0
    real = MegatronPolicy.get_loss_and_metrics

    def get_loss_and_metrics(self: Any, batch: Any, forward_only: bool) -> Any:
        nonlocal calls
        calls += 1
        right = self.objective.loss
        if calls == update:
            self.objective.loss = lambda logprobs, micro: right(logprobs * float("nan"), micro)
        try:
            return real(self, batch, forward_only)
        finally:
            self.objective.loss = right

    with mock.patch.object(MegatronPolicy, "get_loss_and_metrics", get_loss_and_metrics):
        yield


@contextlib.contextmanager
def digested(digests: list[str]) -> Iterator[None]:
    """Note the weights after each optimizer step of an alignment stage."""
    from phimr_nemo.training.optimizer import TrainerOptimizer

    real = TrainerOptimizer.step

    def step(self: Any, closure: None = None) -> None:
        real(self, closure)
        digest = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        digests.append(digest.hexdigest())

    with mock.patch.object(TrainerOptimizer, "step", step):
        yield


def run(
    stage: str,
    overrides: Sequence[str],
    stop_after: int | None = None,
    poison: int | None = None,
    preset: Path | None = None,
) -> Outcome:
    """Run a stage as `phimr` does, to its end or to the stop after a step."""
    import torch.distributed as dist

    listener, digests = Listener(), list[str]()
    logging.getLogger("phimr_nemo").addHandler(listener)
    config: Any = load_config(STAGES[stage], preset or CONF / stage / "tiny.yaml", overrides)
    with contextlib.ExitStack() as stack:
        if stage in ALIGNED:
            from phimr_nemo.align.grpo import stage as grpo_stage

            toy = ToyGrader(GRADERS["even length"])
            stack.enter_context(mock.patch.object(grpo_stage, "Grader", return_value=toy))
            stack.enter_context(signalled(stop_after))
            stack.enter_context(poisoned(poison))
            stack.enter_context(digested(digests))
        else:
            # NeMo starts the process group itself, with Megatron's groups.
            dist.destroy_process_group()
            if stop_after is not None:
                after_step(stop_after, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            run_stage(stage, config)
        except Preempted:
            return Outcome(listener.said, True, digests)
    return Outcome(listener.said, False, digests)
