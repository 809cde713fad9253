"""How a process is told to stop, and that what it started ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from processes import left_of, start, tree, wait_for

from phimr_nemo.errors import EXIT_PREEMPTED, Preempted
from phimr_nemo.process import stopping
from phimr_nemo.process.children import STOP_SIGNALS, Relay, unheard_by_children

TESTS = Path(__file__).resolve().parents[1]


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_command_as_a_preemption_does(number: signal.Signals) -> None:
    before = handlers()
    with pytest.raises(Preempted, match=r"(?s)generate was interrupted.*same command.*kept: 3 shards"):  # noqa: SIM117
        with stopping.stoppable("generate", lambda: "3 shards"):
            os.kill(os.getpid(), number)
    assert handlers() == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_inside_a_trainer_it_is_remembered(number: signal.Signals) -> None:
    before = handlers()
    with stopping.stoppable("sft"), stopping.deferred():
        assert not stopping.told()
        os.kill(os.getpid(), number)
        assert stopping.told()
        # A scheduler repeats itself.
        os.kill(os.getpid(), signal.SIGTERM)
    assert handlers() == before
    assert not stopping.told()


def test_a_signal_that_a_library_has_swallowed_still_stops_the_trainer() -> None:
    def train() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with stopping.deferred():
            pytest.fail("it began to train")

    with pytest.raises(Preempted), stopping.stoppable("sft"):
        train()


def test_what_a_library_makes_of_the_interruption_is_one_too() -> None:
    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("partly imported") from error

    with pytest.raises(Preempted), stopping.stoppable("sft"):
        load()


def test_an_error_of_its_own_stays_one() -> None:
    with pytest.raises(ImportError), stopping.stoppable("sft"):
        raise ImportError("absent")


def test_a_thread_listens_to_nothing() -> None:
    found: list[object] = []

    def work() -> None:
        with stopping.stoppable("sft"):
            found.extend(handlers())

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == before


CHILD = """
import os, signal, sys
from phimr_nemo.process import stopping
with stopping.stoppable("x"), stopping.deferred():
    child = os.fork()
    if child == 0:
        # It has its parent's handlers, and Ctrl-C reaches both.
        os.kill(os.getpid(), signal.SIGINT)
        told = stopping.told()
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, stopping.told())
"""


def test_a_forked_child_ignores_ctrl_c_and_dies_of_sigterm() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == f"{-signal.SIGTERM} False\n"


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_a_child_that_nobody_stopped_has_its_own_exit_code(code: str, status: int) -> None:
    with Relay() as relay:
        ended = subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert ended == status
    assert not relay.ended(ended)


# Starts a child that starts a child; they live until somebody ends them.
NESTED = """
import subprocess, sys
from phimr_nemo.errors import EXIT_PREEMPTED
from phimr_nemo.process.children import Relay, dying_with_parent
here, depth = sys.argv[1], int(sys.argv[2])
if depth:
    with Relay() as relay:
        below = [sys.executable, here, here, str(depth - 1)]
        child = subprocess.Popen(below, start_new_session=True, preexec_fn=dying_with_parent())
        relay.tell()
        code = child.wait()
    sys.exit(EXIT_PREEMPTED if relay.ended(code) else code)
open(here + ".ready", "w").close()
import time
time.sleep(600)
"""


@pytest.fixture
def nested(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    script = tmp_path / "nested.py"
    script.write_text(NESTED, "utf-8")
    top = start([sys.executable, script, script, "2"], ctrl_c=True)
    wait_for(Path(f"{script}.ready").exists, top)
    processes = tree(top)
    assert len(processes) == 3
    return top, processes


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_goes_down_to_the_last_child(
    number: signal.Signals, nested: tuple[subprocess.Popen[bytes], list[psutil.Process]]
) -> None:
    top, processes = nested
    top.send_signal(number)
    assert top.wait(60) == EXIT_PREEMPTED
    assert left_of(processes, 60) == []


def test_children_stand_still_and_go_on_with_their_parent(
    nested: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    top, processes = nested
    try:
        top.send_signal(signal.SIGTSTP)
        wait_for(lambda: all(p.status() == psutil.STATUS_STOPPED for p in processes), top, 60)
        top.send_signal(signal.SIGCONT)
        wait_for(lambda: not any(p.status() == psutil.STATUS_STOPPED for p in processes), top, 60)
    finally:
        top.kill()
        top.wait()


def test_children_end_with_a_parent_that_was_killed(
    nested: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    top, processes = nested
    top.kill()
    top.wait()
    assert left_of(processes, 60) == []


# As a test would do it: a server in the background, and then the test's own process is killed.
RUNNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from processes import start
server = start([sys.executable, "-c", "import time; time.sleep(600)"])
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a parent's death on Linux")
def test_a_server_that_a_test_starts_ends_with_the_test_by_sigkill_too() -> None:
    runner = start([sys.executable, "-c", RUNNER, TESTS], stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    server = psutil.Process(int(runner.stdout.readline()))
    assert server.is_running()
    runner.kill()
    runner.communicate()
    assert left_of([server], 60) == []


def test_every_process_that_a_test_leaves_running_is_started_that_way() -> None:
    """`subprocess.run` waits for its program; `Popen` is the helper's alone, a stand-in's of an engine, and that of a
    program whose child is to be ended by what is tested."""
    programs = {TESTS / "unit" / f"test_{name}.py" for name in ("children", "gpu_lane", "warm")}
    allowed = {TESTS / "processes.py", TESTS / "parity" / "trtllm_standin.py", *programs}
    found = {path for path in TESTS.rglob("*.py") if "subprocess.Popen(" in path.read_text("utf-8")}
    assert found - allowed == {Path(__file__).resolve()}


STOPPED_IN_EXEC = """
import os, signal
from phimr_nemo.errors import exit_with_message
from phimr_nemo.process.stopping import stoppable
with exit_with_message(), stoppable("sft"):
    exec("os.kill(os.getpid(), signal.SIGINT); [0 for _ in range(1000)]")
"""


def test_a_stop_inside_exec_of_a_text_keeps_its_exit_code(repository: Path, tmp_path: Path) -> None:
    """Where dataclasses are made while libraries load. Python would make it SIGINT's code, for `python -m` alone."""
    codes = []
    for exception in ("KeyboardInterrupt", "Interruption"):
        plant = f"import phimr_nemo.process.stopping as s; s.Interruption = {exception}\n"
        (tmp_path / "planted.py").write_text(
            (plant if exception != "Interruption" else "") + STOPPED_IN_EXEC, "utf-8"
        )
        done = subprocess.run(
            [sys.executable, "-m", "planted"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(repository)},
            check=False,
            capture_output=True,
        )
        codes.append(done.returncode)
    assert codes == [-signal.SIGINT, EXIT_PREEMPTED]


def test_a_child_that_starts_does_not_hear_what_its_parent_answers() -> None:
    """The signals wait for it already when its first instruction runs."""
    program = "import sys; sys.stdin.read(); print('lived')"
    with unheard_by_children():
        child = start([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deaf_no_more = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for number in STOP_SIGNALS:
        child.send_signal(number)
    assert child.communicate()[0] == "lived\n"
    assert not deaf_no_more & set(STOP_SIGNALS)


STOPPED_WHILE_LOADING = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
sys.argv = ["phimr", *{words!r}]
import phimr_nemo.cli.__main__
"""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("phimr_nemo.supervised.conversion", ["convert", "a", "b"]),
        ("phimr_nemo.model.adopt", ["adopt", "a", "b"]),
        ("phimr_nemo.model.files.gguf", ["import", "a", "b"]),
    ],
    ids=["convert", "adopt", "import"],
)
def test_a_command_that_is_stopped_while_it_loads_says_so(module: str, words: list[str], repository: Path) -> None:
    program = STOPPED_WHILE_LOADING.format(module=module, words=words)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert f"{words[0]} was interrupted" in done.stderr
