"""Traffic and failures at many GPUs, simulated: start-up, checkpoints, weight sync, and arrays of tasks that fail.

Deliberately coarse: each step is the slowest of the resources that it loads (bytes and files of the shared file
system, bytes of a node's adapters, messages of one process). Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Site:
    """A cluster, as far as traffic goes.

    Attributes:
        gpus_per_node: GPUs of a node, and ranks on it.
        storage_bandwidth: bytes per second of the shared file system, all nodes together.
        storage_operations: files opened or made per second, all nodes together.
        node_bandwidth: bytes per second of a node's adapters, in one direction.
        http_bandwidth: bytes per second of a model from one process to another over HTTP, packing included.
        file_bandwidth: the same through files.
        message_seconds: what one process takes for one small message or one object of another rank.
        hours_between_failures: of one GPU, everything that ends a job counted.
    """

    gpus_per_node: int
    storage_bandwidth: float
    storage_operations: float
    node_bandwidth: float
    http_bandwidth: float
    file_bandwidth: float
    message_seconds: float
    hours_between_failures: float


@dataclass(frozen=True)
class Job:
    """A training job, as far as traffic goes.

    Attributes:
        package_files, package_bytes: what importing the code reads on a node; later ranks find it in its memory.
        import_seconds: processor time of the imports of one rank.
        model_bytes: the Hugging Face directory.
        state_bytes: a native checkpoint: weights and optimizer, over all ranks.
        files_per_rank: that a rank writes into a checkpoint.
        index_bytes_per_rank: of the checkpoint's index, which process 0 gathers and writes.
    """

    package_files: int
    package_bytes: float
    import_seconds: float
    model_bytes: float
    state_bytes: float
    files_per_rank: int
    index_bytes_per_rank: float


def _nodes(site: Site, gpus: int) -> int:
    return math.ceil(gpus / site.gpus_per_node)


def start_up(site: Site, job: Job, gpus: int) -> Mapping[str, float]:
    """Seconds of each part of a start: code, rendezvous, the base model, and (on a resume) the checkpoint."""
    nodes = _nodes(site, gpus)
    from_storage = max(
        nodes * job.package_files / site.storage_operations,
        nodes * job.package_bytes / site.storage_bandwidth,
        job.package_bytes / site.node_bandwidth,
    )
    return {
        "code": from_storage + job.import_seconds,
        # Every rank announces itself to one store, and fetches the addresses of its groups from it.
        "rendezvous": gpus * site.message_seconds * (1 + math.log2(max(gpus, 2))),
        # Each rank reads its slices; a node reads each byte once.
        "model": _read_everywhere(site, job.model_bytes, nodes),
        # Each byte of the state is read once to compare checksums and once to be loaded.
        "checkpoint": 2 * _spread(site, job.state_bytes, nodes),
    }


def _read_everywhere(site: Site, size: float, nodes: int) -> float:
    return max(nodes * size / site.storage_bandwidth, size / site.node_bandwidth)


def _spread(site: Site, size: float, nodes: int) -> float:
    return max(size / site.storage_bandwidth, size / nodes / site.node_bandwidth)


def save(site: Site, job: Job, gpus: int) -> Mapping[str, float]:
    """Seconds of each part of a native checkpoint: bytes, files, and what process 0 does for all ranks."""
    files = gpus * job.files_per_rank
    index = gpus * job.index_bytes_per_rank
    return {
        "bytes": _spread(site, job.state_bytes, _nodes(site, gpus)),
        # Made, and looked at once more for the seal.
        "files": 2 * files / site.storage_operations,
        # Plans of all ranks are gathered, merged and written by one process, and so are the checksums.
        "process 0": 2 * gpus * site.message_seconds
        + 2 * index / site.node_bandwidth
        + index / site.storage_bandwidth,
    }


def weight_sync(site: Site, model_bytes: float, servers: int) -> Mapping[str, float]:
    """Seconds to bring one version of the weights to rollout servers, by three ways.

    "from process 0" is what the project does over HTTP: one process sends the whole model to every server. "shared
    directory" writes it once and lets the servers' nodes read it. "tree" has every server that is done send it on.
    """
    over_http = min(site.http_bandwidth, site.node_bandwidth)
    through_files = model_bytes / min(site.file_bandwidth, site.node_bandwidth)
    return {
        "from process 0": servers * model_bytes / over_http,
        "shared directory": max(through_files, model_bytes / site.storage_bandwidth)
        + max(through_files, _read_everywhere(site, model_bytes, servers)),
        "tree": math.ceil(math.log2(servers + 1)) * model_bytes / over_http,
    }


def best_interval(site: Site, gpus: int, save_seconds: float) -> float:
    """Seconds of training between checkpoints that lose the least: sqrt(2 x save x mean time between failures).

    Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974).
    """
    return math.sqrt(2 * save_seconds * site.hours_between_failures * 3600 / gpus)


def expected_seconds(work: float, failures_per_second: float, restart_seconds: float) -> float:
    """Mean time of work that starts from its beginning after every failure (failures exponential in time).

    (1/f + r) (e^(f w) - 1): the mean number of failed attempts is e^(f w) - 1.
    """
    if failures_per_second == 0:
        return work
    return (1 / failures_per_second + restart_seconds) * math.expm1(failures_per_second * work)


@dataclass(frozen=True)
class ArrayRun:
    """What an array of tasks took.

    Attributes:
        seconds: until the last shard was done.
        busy_seconds: of all workers together, restarts and lost work included.
        failures: attempts that ended early.
        lost_seconds: of work done twice.
    """

    seconds: float
    busy_seconds: float
    failures: int
    lost_seconds: float


def run_array(
    shards: Sequence[float],
    workers: int,
    *,
    failures_per_second: float,
    restart_seconds: float,
    keeps: float,
    draw: np.random.Generator,
) -> ArrayRun:
    """Simulate workers that take the next shard when they are done, and fail now and then.

    Args:
        shards: seconds of work of each, in the order in which they are taken.
        workers: tasks at once.
        failures_per_second: of one worker at work; exponential.
        restart_seconds: from a failure until the worker continues.
        keeps: the share of a failed attempt's work that need not be done again (a journal, finished groups).
        draw: random numbers.
    """
    free = [0.0] * min(workers, len(shards))
    heapq.heapify(free)
    failures, lost, busy = 0, 0.0, 0.0
    for work in shards:
        begun = heapq.heappop(free)
        taken, remaining = 0.0, work
        while failures_per_second:
            survives = float(draw.exponential(1 / failures_per_second))
            if survives >= remaining:
                break
            failures += 1
            lost += survives * (1 - keeps)
            remaining -= survives * keeps
            taken += survives + restart_seconds
        taken += remaining
        busy += taken
        heapq.heappush(free, begun + taken)
    return ArrayRun(max(free), busy, failures, lost)
