"""The simulation against closed forms: schedules, restarts, the interval of checkpoints, and how traffic grows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from phimr_nemo.plan.simulate import (
    Job,
    Site,
    best_interval,
    expected_seconds,
    run_array,
    save,
    start_up,
    weight_sync,
)

SITE = Site(
    gpus_per_node=8,
    storage_bandwidth=1e11,
    storage_operations=5e4,
    node_bandwidth=4e10,
    http_bandwidth=5e8,
    file_bandwidth=2e9,
    message_seconds=1e-4,
    hours_between_failures=5e4,
)
JOB = Job(
    package_files=10_000,
    package_bytes=3e9,
    import_seconds=10.0,
    model_bytes=8e9,
    state_bytes=5e10,
    files_per_rank=2,
    index_bytes_per_rank=5e4,
)


def draw() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("shards", "workers"), [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_equal_shards_without_failures_take_whole_rounds(shards: int, workers: int) -> None:
    run = run_array([7.0] * shards, workers, failures_per_second=0, restart_seconds=99, keeps=0, draw=draw())
    assert run.seconds == 7.0 * math.ceil(shards / workers)
    assert (run.busy_seconds, run.failures, run.lost_seconds) == (7.0 * shards, 0, 0.0)


def test_a_straggler_is_waited_for() -> None:
    times = [1.0] * 9 + [10.0]
    last = run_array(times, 5, failures_per_second=0, restart_seconds=0, keeps=0, draw=draw())
    first = run_array(times[::-1], 5, failures_per_second=0, restart_seconds=0, keeps=0, draw=draw())
    # Taken last it begins after 9 others on 5 workers, in the second round; taken first it ends by itself.
    assert (last.seconds, first.seconds) == (11.0, 10.0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 2.0])
def test_restarts_from_the_beginning_have_their_expected_length(rate: float) -> None:
    """One worker, so the sum of many shards is the sum of independent ones."""
    count, work, restart = 20_000, 1.0, 0.3
    run = run_array([work] * count, 1, failures_per_second=rate, restart_seconds=restart, keeps=0, draw=draw())
    fails = math.expm1(rate * work)
    # Failed attempts are geometric; four standard errors of their mean.
    assert run.failures / count == pytest.approx(fails, abs=4 * math.sqrt(fails * (fails + 1) / count))
    assert run.seconds / count == pytest.approx(expected_seconds(work, rate, restart), rel=0.05)
    assert run.seconds == pytest.approx(count * work + run.lost_seconds + run.failures * restart)


def test_what_keeps_its_work_loses_only_the_restarts() -> None:
    count, rate, restart = 5_000, 0.5, 0.2
    run = run_array([1.0] * count, 1, failures_per_second=rate, restart_seconds=restart, keeps=1, draw=draw())
    assert run.lost_seconds == 0
    assert run.seconds == pytest.approx(count + run.failures * restart)
    # Failures are Poisson in the time worked.
    assert run.failures == pytest.approx(rate * count, abs=4 * math.sqrt(rate * count))


def test_expected_seconds_at_its_limits() -> None:
    assert expected_seconds(5.0, 0.0, 9.0) == 5.0
    # Few failures: each costs a restart and half of the work.
    assert expected_seconds(5.0, 1e-6, 9.0) == pytest.approx(5 + 5e-6 * (9 + 2.5), rel=1e-9)


def test_the_interval_of_checkpoints_loses_the_least() -> None:
    gpus, seconds = 1024, 20.0
    mean = SITE.hours_between_failures * 3600 / gpus
    found = best_interval(SITE, gpus, seconds)

    def lost(interval: float) -> float:
        return seconds / interval + interval / 2 / mean

    grid = np.geomspace(found / 10, found * 10, 4001)
    assert found == pytest.approx(grid[np.argmin([lost(value) for value in grid])], rel=0.01)


def test_a_node_s_own_adapters_limit_one_node_and_the_storage_limits_many() -> None:
    assert start_up(SITE, JOB, 8)["model"] == JOB.model_bytes / SITE.node_bandwidth
    assert start_up(SITE, JOB, 1024)["model"] == 128 * JOB.model_bytes / SITE.storage_bandwidth
    assert save(SITE, JOB, 8)["bytes"] == JOB.state_bytes / SITE.node_bandwidth
    assert save(SITE, JOB, 1024)["bytes"] == JOB.state_bytes / SITE.storage_bandwidth


def test_what_one_process_does_for_all_grows_with_their_number() -> None:
    few, many = save(SITE, JOB, 64)["process 0"], save(SITE, JOB, 1024)["process 0"]
    assert many == pytest.approx(16 * few)
    assert save(SITE, JOB, 1024)["files"] == pytest.approx(2 * 2048 / SITE.storage_operations)


@pytest.mark.parametrize(("servers", "rounds"), [(1, 1), (3, 2), (7, 3), (8, 4), (128, 8)])
def test_weights_by_tree_take_a_round_for_every_doubling(servers: int, rounds: int) -> None:
    """By brute force: each round, everyone who has the weights sends them to one more."""
    having, needed = 1, 0
    while having < servers + 1:
        having, needed = 2 * having, needed + 1
    sync = weight_sync(SITE, JOB.model_bytes, servers)
    assert needed == rounds
    assert sync["tree"] == pytest.approx(rounds * JOB.model_bytes / SITE.http_bandwidth)
    assert sync["from process 0"] == pytest.approx(servers * JOB.model_bytes / SITE.http_bandwidth)
    # Written once, then read by all at once: twice what one process needs, until the storage is the limit.
    assert sync["shared directory"] == pytest.approx(
        JOB.model_bytes / SITE.file_bandwidth
        + max(JOB.model_bytes / SITE.file_bandwidth, servers * JOB.model_bytes / SITE.storage_bandwidth)
    )


def test_a_network_slower_than_the_processes_is_the_limit() -> None:
    slow = dataclasses.replace(SITE, node_bandwidth=1e8)
    sync = weight_sync(slow, JOB.model_bytes, 3)
    assert sync["from process 0"] == pytest.approx(3 * JOB.model_bytes / 1e8)


def test_faster_storage_helps_what_it_limits_and_nothing_else() -> None:
    faster = dataclasses.replace(SITE, storage_bandwidth=10 * SITE.storage_bandwidth)
    assert start_up(faster, JOB, 1024)["model"] < start_up(SITE, JOB, 1024)["model"]
    assert start_up(faster, JOB, 1024)["rendezvous"] == start_up(SITE, JOB, 1024)["rendezvous"]
