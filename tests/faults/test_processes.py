"""Processes that are lost: a grading worker without memory, a rank that is killed or stands still."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fault_length import LONG
from processes import start

from phimr_nemo.verify import Grader

Injected = Callable[[str, str, int, str], None]
PATIENCE_SECONDS = 300.0
KILLED_WORKERS = 20 if LONG else 6
BOX = r"The answer is $\boxed{%s}$."


WORKER = """
import json, resource, sys
from phimr_nemo.verify.workers import worker
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
job = {"text": "1+x", "gold": "x+1", "parts": ["1+x"], "boxes": ["1+x"]}
print(json.dumps([
    worker._within_limit(30.0, lambda: {"size": len(bytearray(16 << 20))}),
    worker._within_limit(30.0, lambda: {"size": len(bytearray(1 << 30))}),
    worker._within_limit(30.0, lambda: worker._grade(job)),
]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux")
def test_a_worker_that_runs_out_of_memory_fails_its_answer_alone(injected: Injected) -> None:
    """The kernel refuses the memory; the answer is an error, the worker is to be replaced, and could even go on."""
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, large, after = json.loads(done.stdout)
    assert small == {"size": 16 << 20}
    assert large == {"verdict": "error", "reason": "the memory limit was reached", "last": True}
    assert after["verdict"] == "correct"
    injected("verify", "a worker runs out of memory", 1, "an error for that answer alone")


def test_workers_killed_at_random_moments_change_no_verdict(injected: Injected) -> None:
    """As by the kernel's out-of-memory killer, while they are at work."""
    draw = random.Random(0)
    pairs = [(BOX % f"{number}+x", f"x+{number % 5}") for number in range(200)]
    killed, stop = 0, threading.Event()
    with Grader(workers=2) as grader:
        expected = [verdict.verdict for verdict in grader.grade_many(pairs)]

        def kill() -> None:
            nonlocal killed
            while killed < KILLED_WORKERS and not stop.wait(draw.uniform(0.01, 0.05)):
                for pid in grader._pool.pids()[1:2]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1

        killer = threading.Thread(target=kill)
        killer.start()
        while killed < KILLED_WORKERS:
            verdicts = [verdict.verdict for verdict in grader.grade_many(pairs)]
            # An answer whose worker was killed twice is an error, never a wrong verdict.
            assert all(found in (wanted, "error") for found, wanted in zip(verdicts, expected, strict=True))
        stop.set()
        killer.join()
        assert [verdict.verdict for verdict in grader.grade_many(pairs)] == expected
    assert expected.count("correct") == 5
    injected("verify", "kill -9 of a grading worker at work", killed, "the answer is tried again, or an error")


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if "RANK" in child.environ()]


@pytest.mark.parametrize("lost", [0, 1] if LONG else [1])
def test_a_killed_rank_ends_the_job_and_is_named(
    lost: int, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    """Two ranks through the real command; one dies by SIGKILL, as by the kernel's out-of-memory killer."""
    from phimr_nemo.store.shards import finish, rows_to_table, write_shard

    row = {"id": "a", "problem_id": "p", "question": "1+1?", "response": "2", "domain": None, "difficulty": None}
    write_shard(tmp_path / "data", 0, rows_to_table([row] * 32, "conversations"), kind="conversations")
    finish(tmp_path / "data", kind="conversations", config={})
    base = ["base", "--config", "conf/base/tiny.yaml", f"run.output={tmp_path / 'base'}"]
    subprocess.run([sys.executable, "-m", "phimr_nemo.cli", *base], cwd=repository, check=True, capture_output=True)
    command = [
        *(
            "sft",
            "--config",
            "conf/sft/tiny.yaml",
            "parallel.data=2",
            "micro_batch=8",
            "validation_rows=0",
            f"run.output={tmp_path / 'out'}",
        ),
        *(f"base={tmp_path / 'base' / 'hf'}", f"data={tmp_path / 'data'}"),
    ]
    launcher = start(
        [sys.executable, "-m", "phimr_nemo.cli", *command],
        cwd=repository,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while len(ranks := ranks_of(launcher)) < 2:
            assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        by_rank = {int(process.environ()["RANK"]): process for process in ranks}
        by_rank[lost].send_signal(signal.SIGKILL)
        _, errors = launcher.communicate(timeout=PATIENCE_SECONDS)
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert f"rank {lost} ended with signal SIGKILL" in errors
    gone, alive = psutil.wait_procs(by_rank.values(), timeout=PATIENCE_SECONDS)
    assert not alive
    assert len(gone) == 2
    injected("sft", "SIGKILL of one of two ranks", 1, "the job ends and names the rank; no process is left")
