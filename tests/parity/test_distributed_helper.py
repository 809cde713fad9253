"""The helper itself: results by rank, collectives that work, failures that are seen."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from distributed import RanksFailed, run_distributed, run_prepared


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"planted failure on rank {rank}")
    dist.barrier()


def die() -> None:
    os._exit(7)


def test_results_come_by_rank_and_collectives_work() -> None:
    # (0 + 5) + (1 + 5) + (2 + 5) = 18
    assert run_distributed(sum_of_ranks, 3, 5) == [(0, 18), (1, 18), (2, 18)]


def test_a_failure_surfaces_with_its_traceback_while_others_wait() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 ---[\s\S]*in fail_on[\s\S]*planted failure on rank 1"):
        run_distributed(fail_on, 2, 1)


def test_a_dead_rank_is_a_failure() -> None:
    with pytest.raises(RanksFailed, match="died without a word"):
        run_distributed(die, 1)


def no_preparation() -> None:
    """Of a process of its own, so that the other tests keep theirs."""


def parent() -> int:
    return os.getppid()


def kill_parent(number: signal.Signals) -> None:
    os.kill(os.getppid(), number)
    # Until it takes this rank along.
    signal.pause()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_test_in_which_the_forking_process_dies_says_so_and_the_next_has_a_new_one(
    number: signal.Signals,
) -> None:
    (first,) = run_prepared(no_preparation, parent, 1)
    with pytest.raises(RanksFailed, match=rf"kill_parent: .* has ended \({number.name}, exit code {-number}\)"):
        run_prepared(no_preparation, kill_parent, 1, number)
    (second,) = run_prepared(no_preparation, parent, 1)
    assert second != first


def test_a_forking_process_that_died_between_two_tests_is_replaced() -> None:
    (first,) = run_prepared(no_preparation, parent, 1)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    (second,) = run_prepared(no_preparation, parent, 1)
    assert second != first
