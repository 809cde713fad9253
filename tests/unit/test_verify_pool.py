"""The grader's processes: hostile answers, limits, dying workers, threads, a dying parent."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from processes import start

from phimr_nemo.errors import UserError
from phimr_nemo.process.children import STOP_SIGNALS
from phimr_nemo.verify import Grader, grade
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS
from phimr_nemo.verify.workers import worker as protocol
from phimr_nemo.verify.workers.pool import Job, Pool

PATIENCE_SECONDS = 60.0
BOX = r"Therefore it is $\boxed{%s}$."
SYMBOLIC = ("x+1", BOX % "1+x")
"""An answer that only a worker can decide."""


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2) as made:
        yield made


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as handle:
            return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


HOSTILE = [
    "9^{9^{9}}", "9^{9^{9^{9}}}", "(10^{10})!", "((100!)!)!", "2^{10^{12}}", r"\sum_{k=1}^{10^{9}} \frac{1}{k^k}",
    r"\prod_{k=1}^{10^7} (1+\frac{1}{k})", r"\int_0^1 e^{\sin(x^{x^x})} dx", r"\binom{10^{9}}{5\cdot 10^{8}}",
    "(a+b+c+d+e+f+g+h)^{60}", r"7^{7^{7^7}} \bmod 10", r"\frac{1}{" * 60 + "2" + "}" * 60,
    r"\sqrt{1+" * 40 + "2" + "}" * 40, "(" * 500 + "5" + ")" * 500, "(" * 3000, "1" * 20_000, "+".join(["x"] * 3000),
    ",".join(map(str, range(3000))), r"\zeta(3)^{\zeta(5)^{1000}}", "1e999999999", "10^{-999999999}",
    r"\sin(10^{10^{10}})", "x^5-x+1=0", "\x00", r"\left(" * 200, "99999^{99999}", "((9!)!)", r"\frac{}{}",
    r"\begin{pmatrix}" + r"\\".join("&".join("x" for _ in range(20)) for _ in range(20)) + r"\end{pmatrix}^{50}",
]  # fmt: skip
HOSTILE_RESPONSES = [
    r"\boxed{" + "{" * 100_000,
    r"\boxed{" + "5" * 1_000_000 + "}",
    r"\boxed",
    r"\boxed{",
    "$x$ " * 20_000,
    "$" * 50_001,
    "\x00" * 10_000,
    "word " * 2_000_000,
    "answer is " * 50_000,
    "(" * 100_000 + r"\boxed{6}",
    "",
    "\ud800",
]


def test_hostile_answers_are_never_correct_and_never_break_the_pool(grader: Grader) -> None:
    pairs = [(BOX % answer, "5") for answer in HOSTILE] + [(response, "5") for response in HOSTILE_RESPONSES]
    verdicts = grader.grade_many(pairs)
    assert len(verdicts) == len(pairs)
    assert "correct" not in {verdict.verdict for verdict in verdicts}
    assert all(len(verdict.extracted) <= MAX_ANSWER_CHARS for verdict in verdicts)
    assert grader.grade(*reversed(SYMBOLIC)).verdict == "correct"


def test_an_answer_after_a_mountain_of_text_is_found(grader: Grader) -> None:
    assert grader.grade("word " * 2_000_000 + BOX % "5", "5").verdict == "correct"
    assert grader.grade(r"\boxed{1} " * 20_000 + BOX % "5", "5").verdict == "correct"


def test_a_hostile_gold_answer_is_an_error_or_equal_as_text(grader: Grader) -> None:
    assert grader.grade(BOX % "5", "").verdict == "error"
    assert grader.grade(BOX % "5", "7" * (MAX_ANSWER_CHARS + 1)).verdict == "error"
    assert grader.grade(BOX % "5", "9^{9^{9}}").verdict == "wrong"
    assert grader.grade(BOX % "5", "9^{9^{9^{9^{9}}}}").verdict == "gold_unreadable"
    assert grader.grade(BOX % "9^{9^{9}}", "9^{9^{9}}").verdict == "correct"


def test_order_is_kept_and_equal_pairs_are_graded_alike(grader: Grader) -> None:
    pairs = [(BOX % f"{n}+x", f"x+{n % 3}") for n in range(6)] * 2
    verdicts = [verdict.verdict for verdict in grader.grade_many(pairs)]
    assert verdicts == ["correct" if n == n % 3 else "wrong" for n in range(6)] * 2


def spin_forever(_job: object) -> dict[str, object]:
    while True:
        pass


@pytest.fixture
def worker_limits() -> Iterator[None]:
    """Undo what a worker does to its own process."""
    handler, limit = signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_CPU)
    signal.signal(signal.SIGPROF, protocol._raise_soft_limit)
    yield
    resource.setrlimit(resource.RLIMIT_CPU, limit)
    signal.signal(signal.SIGPROF, handler)


@pytest.mark.usefixtures("worker_limits")
def test_the_soft_limit_interrupts_python_code() -> None:
    assert protocol._within_limit(0.05, lambda: spin_forever(None))["verdict"] == "timeout"


@pytest.mark.usefixtures("worker_limits")
def test_a_memory_error_is_reported_and_ends_the_worker() -> None:
    def too_much() -> dict[str, object]:
        raise MemoryError

    result = protocol._within_limit(5.0, too_much)
    assert result == {"verdict": "error", "reason": "the memory limit was reached", "last": True}


def test_a_stopped_worker_is_killed_at_the_deadline_and_replaced() -> None:
    """SIGSTOP stands for a computation that nothing inside the process can interrupt."""
    pool = Pool(1, soft_seconds=1.0, deadline_seconds=1.0, memory_bytes=1 << 30)
    try:
        job = Job("x+1", "1+x", ("1+x",), ("1+x",))
        assert pool.run([job])[0].verdict == "correct"
        stopped = pool.pids()[1]
        os.kill(stopped, signal.SIGSTOP)
        assert pool.run([job])[0].verdict == "timeout"
        assert not is_running(stopped)
        wait_until(lambda: pool.run([job])[0].verdict == "correct")
    finally:
        pool.close()


def test_a_worker_that_dies_is_replaced_and_its_answer_tried_again() -> None:
    with Grader(workers=2) as grader:
        assert grader.grade(*reversed(SYMBOLIC)).verdict == "correct"
        for pid in grader._pool.pids()[1:]:
            os.kill(pid, signal.SIGKILL)
        verdicts = grader.grade_many([(BOX % f"{n}+x", f"x+{n}") for n in range(5)])
        assert [verdict.verdict for verdict in verdicts] == ["correct"] * 5


def test_a_spawner_that_dies_is_replaced() -> None:
    with Grader(workers=1) as grader:
        assert grader.grade(*reversed(SYMBOLIC)).verdict == "correct"
        spawner, worker = grader._pool.pids()
        os.kill(worker, signal.SIGKILL)
        os.kill(spawner, signal.SIGKILL)
        assert grader.grade(*reversed(SYMBOLIC)).verdict == "correct"


def test_a_pool_starts_while_the_whole_job_is_told_to_stop() -> None:
    """A trainer grades the step that it finishes; a job's signals reach the spawner before its first import."""
    pool = Pool(1, soft_seconds=5, deadline_seconds=30, memory_bytes=2 << 30)
    verdicts: list[Any] = []
    job = Job(SYMBOLIC[0], "1+x", (), ("1+x",))
    thread = threading.Thread(target=lambda: verdicts.extend(pool.run([job])))
    thread.start()
    try:
        wait_until(lambda: bool(pool.pids()))
        for number in STOP_SIGNALS:
            os.kill(pool.pids()[0], number)
        thread.join(PATIENCE_SECONDS)
        assert [verdict.verdict for verdict in verdicts] == ["correct"]
    finally:
        pool.close()


def test_closing_ends_every_process() -> None:
    grader = Grader(workers=2)
    grader.grade_many([(BOX % f"{n}+x", f"x+{n}") for n in range(4)])
    pids = grader._pool.pids()
    assert len(pids) == 3
    grader.close()
    grader.close()
    wait_until(lambda: not any(map(is_running, pids)))


def test_it_works_from_any_thread_and_from_several_at_once(grader: Grader) -> None:
    results: dict[int, list[str]] = {}

    def work(number: int) -> None:
        pairs = [(BOX % f"{number}+x", f"x+{n}") for n in range(3)]
        results[number] = [verdict.verdict for verdict in grader.grade_many(pairs)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert results == {k: ["correct" if n == k else "wrong" for n in range(3)] for k in range(3)}


def test_no_process_outlives_a_killed_parent() -> None:
    script = textwrap.dedent(
        r"""
        import sys, time
        from phimr_nemo.verify import Grader
        grader = Grader(workers=2)
        grader.grade_many([(r"\boxed{1+x}", "x+1"), (r"\boxed{2+x}", "x+2")])
        print(*grader._pool.pids(), flush=True)
        time.sleep(600)
        """
    )
    parent = start([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_running, pids))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_forked_child_may_not_use_the_parents_pool() -> None:
    pool = Pool(1, soft_seconds=1.0, deadline_seconds=1.0, memory_bytes=1 << 30)
    pool._owner = os.getpid() + 1
    with pytest.raises(RuntimeError, match="forked child"):
        pool.run([Job("x", "y", ("y",), ("y",))])


def test_the_package_function_grades_and_needs_no_main_guard() -> None:
    script = r"""from phimr_nemo.verify import grade; print(grade(r"\boxed{1+x}", "x+1").verdict)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "correct"
    assert done.stderr == ""
    assert grade(BOX % "43", "42").verdict == "wrong"


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"deadline_seconds": 0.0}, {"memory_bytes": -1}])
def test_impossible_limits_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be positive"):
        Grader(**arguments)


def test_importing_the_grader_imports_no_torch_and_no_sympy() -> None:
    script = (
        "import sys, phimr_nemo.verify; print([m for m in ('torch', 'sympy', 'math_verify') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
