"""A process that takes longer than the others is waited for, and a collective that takes too long ends the job."""

from __future__ import annotations

import ast
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import RanksFailed, run_distributed

import phimr_nemo
from phimr_nemo.align import evaluated
from phimr_nemo.align.grpo import rounds
from phimr_nemo.align.grpo.samplers import NoTurns
from phimr_nemo.config import ParallelConfig
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.training.distributed import start_process_group, wait_for_all

LIMIT_SECONDS = 6.0
"""Of the collectives; the slow process takes twice as long."""
PARAMS = SamplingParams(1.0, 1.0, 4)


class SlowSampler:
    """Answers at once in the first process, and late in the others."""

    version = 1
    counts: Mapping[str, int] = MappingProxyType({})

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        del params
        if dist.get_rank():
            time.sleep(2 * LIMIT_SECONDS)
        return [Completion(request.id, (7,), (-0.5,), "stop") for request in requests]


def one_round(directory: Path, is_waited_for: bool) -> list[str]:
    wait_for_all("the processes have started")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT_SECONDS), dist.group.WORLD)
    made = rounds.Rounds(SlowSampler(), list, directory, NoTurns())  # type: ignore[arg-type]
    requests = [Request(f"{dist.get_rank()}/{sample}", (1, 2), sample) for sample in range(2)]
    replacement = wait_for_all if is_waited_for else lambda _: None
    with mock.patch.object(rounds, "wait_for_all", replacement):
        return [completion.request_id for completion in made.sample(1, requests, PARAMS)]


def test_a_straggler_is_waited_for_beyond_the_limit_of_collectives(tmp_path: Path) -> None:
    assert run_distributed(one_round, 2, tmp_path, True) == [["0/0", "0/1"], ["1/0", "1/1"]]


def test_without_the_waiting_the_collective_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 ---[\s\S]*[Tt]imed out"):
        run_distributed(one_round, 2, tmp_path, False)


class SlowEngine:
    """Samples slowly; the first process alone asks it."""

    def sample(self, *_: object) -> list[Completion]:
        time.sleep(2 * LIMIT_SECONDS)
        return []


class NoQuestions:
    def score(self, *_: object) -> dict[str, float]:
        return {"pass1": 1.0}


class NoWeights:
    def weights(self) -> list[tuple[str, torch.Tensor]]:
        return []


def one_evaluation(is_waited_for: bool) -> dict[str, float]:
    wait_for_all("the processes have started")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT_SECONDS), dist.group.WORLD)
    made = object.__new__(evaluated.Evaluated)
    made._policy, made._held_out, made._engine = NoWeights(), NoQuestions(), SlowEngine()  # type: ignore[assignment]
    replacement = wait_for_all if is_waited_for else lambda _: dist.barrier()
    with mock.patch.object(evaluated, "wait_for_all", replacement):
        found = made._pass1(1)
    # The next exchange of the training steps.
    dist.barrier()
    return found


def test_who_evaluates_dpo_is_waited_for_beyond_the_limit_of_collectives() -> None:
    assert run_distributed(one_evaluation, 2, True) == [{"pass1": 1.0}, {}]


def test_a_collective_would_not_wait_for_the_evaluation() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 ---[\s\S]*[Tt]imed out"):
        run_distributed(one_evaluation, 2, False)


def test_nothing_waits_in_a_barrier_with_the_limit_of_collectives() -> None:
    package = Path(phimr_nemo.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr == "barrier"), f"{file}:{node.lineno}"


def come_late() -> str:
    wait_for_all("the processes have started")
    if dist.get_rank() == 1:
        time.sleep(LIMIT_SECONDS)
        return ""
    with pytest.raises(RuntimeError) as error:
        wait_for_all("round 5 is sampled", hours=LIMIT_SECONDS / 3 / 3600)
    return str(error.value)


def test_who_does_not_come_in_time_is_named() -> None:
    message = run_distributed(come_late, 2)[0]
    assert "round 5 is sampled" in message
    assert "Ranks 1 failed" in message


def limits_of_groups() -> list[timedelta]:
    from megatron.core import parallel_state

    dist.destroy_process_group()
    start_process_group(ParallelConfig(timeout_minutes=7), seed=0)
    groups = (
        dist.group.WORLD,
        parallel_state.get_data_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_the_collectives_of_torch_and_megatron_have_the_configured_limit() -> None:
    assert run_distributed(limits_of_groups, 1) == [[timedelta(minutes=7)] * 3]
