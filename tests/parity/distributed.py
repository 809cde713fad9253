"""Run a function on several gloo processes and get every rank's result.

The imports (torch, Megatron-Core, NeMo) take seconds, so one process does them once, for the whole test session,
and forks the ranks of every run: each run starts fresh, and starts at once.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from phimr_nemo.process.children import ended_with_us

START_SECONDS = 300.0
RUN_SECONDS = 600.0
END_SECONDS = 60.0
"""What a process that has closed its pipe gets to be gone."""
ATTEMPTS = 2
NOT_CONNECTED = ("connectFullMesh failed", "EADDRINUSE")
"""Of gloo's own start, before anything of ours: another process on a busy machine was given the port meanwhile."""
GRACE_SECONDS = 1.0
"""After one rank failed, what the others get to fail by themselves: their tracebacks may tell more."""
LOOK_SECONDS = 0.5
"""How often it is looked whether the process that forks the ranks is alive: its ranks may hold its pipe open."""

Outcome = tuple[bool, Any]


class RanksFailed(AssertionError):
    """At least one rank raised or died; the message holds each one's traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``fn(*args)`` on `world_size` processes of one gloo group.

    Args:
        fn: a function at the top level of an importable module; torch.distributed is initialised and
            ``phimr_nemo.training.platform.prepare`` has been called.
        args: picklable.

    Returns:
        What each rank returned, by rank.

    Raises:
        RanksFailed: with the traceback of every rank that failed.
    """
    return run_prepared(_prepare, fn, world_size, *args)


def run_prepared(prepare: Callable[[], None], fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """The same on processes that something else was imported in: `prepare`, a function at the top of a module, is
    called in place of ``phimr_nemo.training.platform.prepare`` in a process that forks the ranks of all its runs."""
    for attempt in range(ATTEMPTS):
        outcomes = _forker(prepare).ask((fn, world_size, args, dict(os.environ)), fn.__name__)
        failures = [f"--- rank {rank} ---\n{value}" for rank, (ok, value) in enumerate(outcomes) if not ok]
        is_connected = not any(word in failure for failure in failures for word in NOT_CONNECTED)
        if is_connected or attempt + 1 == ATTEMPTS:
            break
    if failures:
        raise RanksFailed("\n".join([f"{fn.__name__} failed:", *failures]))
    return [value for _, value in outcomes]


def _prepare() -> None:
    from phimr_nemo.training import platform

    platform.prepare()
    # Imported once, here.
    import torch.utils.tensorboard  # noqa: F401

    import phimr_nemo.model.megatron.convert  # noqa: F401


class _Forker:
    """The process that forks the ranks of every run, after `prepare`."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process: SpawnProcess = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(theirs, prepare)
        )
        self._process.start()
        theirs.close()

    def ask(self, request: tuple[Any, ...], name: str) -> list[Outcome]:
        """The outcomes of a request.

        Raises:
            RanksFailed: there is no answer; this process is gone then, and the next run gets a new one.
        """
        try:
            self._connection.send_bytes(pickle.dumps(request))
            deadline = time.monotonic() + START_SECONDS + RUN_SECONDS
            while not self._connection.poll(LOOK_SECONDS):
                if not self._process.is_alive():
                    raise EOFError
                if time.monotonic() > deadline:
                    raise RanksFailed(f"no answer from {request[1]} ranks of {name}")
            outcomes: list[Outcome] = pickle.loads(self._connection.recv_bytes())
            return outcomes
        except (EOFError, OSError) as error:
            self._process.join(END_SECONDS)
            raise RanksFailed(f"{name}: {_ended(self._process.exitcode)}") from error
        except RanksFailed:
            self.stop()
            raise

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        self._connection.close()
        self._process.join(GRACE_SECONDS)
        self._process.kill()
        self._process.join()


_forkers: dict[Callable[[], None], _Forker] = {}


def _forker(prepare: Callable[[], None]) -> _Forker:
    """The living one, or a new one."""
    found = _forkers.get(prepare)
    if found is None or not found.is_alive():
        found = _forkers[prepare] = _Forker(prepare)
        atexit.register(found.stop)
    return found


def _ended(code: int | None) -> str:
    """What is said of a process that forks the ranks and has ended."""
    how = f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = f"{signal.Signals(-code).name}, {how}"
    return (
        f"the process that forks the ranks of all tests has ended ({how}), and its ranks with it; the next test gets "
        "a new one. No rank does that by failing: look for code, here or in a test beside it, that sends signals to "
        "processes it did not start (SIGTERM), or for too little memory (SIGKILL: see dmesg)"
    )


def _serve(connection: Connection, prepare: Callable[[], None]) -> None:
    # More threads than cores make two-core machines crawl, and a forked OpenMP pool hangs.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    prepare()
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as scratch:
            connection.send_bytes(pickle.dumps(run_ranks(request, Path(scratch))))


def run_ranks(request: bytes, scratch: Path) -> list[Outcome]:
    """Fork the ranks of one request: a pickled (function, number of ranks, arguments, environment)."""
    fn, world_size, args, environment = pickle.loads(request)
    # What is imported by now lives as long as this process: no rank looks for garbage in it, and copies it by that.
    gc.collect()
    gc.freeze()
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, world_size, port, scratch, fn, args, environment))
        with ended_with_us():
            process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    outcomes = _collect(pipes, time.monotonic() + RUN_SECONDS)
    for process in processes:
        process.kill()
        process.join()
    return outcomes


def _collect(pipes: list[Connection], deadline: float) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                outcomes[rank] = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                outcomes[rank] = (False, "died without a word")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    stopped: Outcome = (False, "did not finish: it ran out of time, or waited for a rank that had failed")
    return [outcomes.get(rank, stopped) for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    scratch: Path,
    fn: Callable[..., Any],
    args: Any,
    environment: Mapping[str, str],
) -> None:
    import torch.distributed as dist

    # What the test has set since the process began that forks the ranks.
    os.environ.update(environment)
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        # A file, because a free port can be taken before it is used.
        store = dist.FileStore(str(scratch / "rendezvous"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        outcome: Outcome = (True, fn(*args))
        answer = pickle.dumps(outcome)
    except BaseException:  # noqa: BLE001  (whatever it was, the test shall see it)
        answer = pickle.dumps((False, traceback.format_exc()))
    # Megatron's checkpoint writer leaves a manager process behind that would outlive this one, and the answer is
    # what this process is waited for.
    util._run_finalizers()  # type: ignore[attr-defined]
    pipe.send_bytes(answer)
    pipe.close()
    # No other clean-up: gloo's would wait for ranks that are gone.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
