"""A command in a copy of a warm process is what it is in an interpreter of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import left_of, start, wait_for

from phimr_nemo.process import warm

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere every command has an interpreter of its own"
)

# What a command can see of how it was started.
SEEN = """
import atexit, json, os, signal, sys, threading
atexit.register(lambda: print("exit handler"))
names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGTSTP")
print(json.dumps({
    "argv": sys.argv[1:],
    "main": __name__,
    "spec": __spec__.name,
    "is main": sys.modules["__main__"].__dict__ is globals(),
    "environment": {name: value for name, value in os.environ.items() if name != "_"},
    "cwd": os.getcwd(),
    "handlers": [str(signal.getsignal(getattr(signal, name))) for name in names],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "leads a session": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(),
    "in the main thread": threading.current_thread() is threading.main_thread(),
}, sort_keys=True))
print("error", file=sys.stderr)
late = threading.Thread(target=lambda: print("thread"))
late.start()
"""
STARTER = """
import signal, subprocess, sys, os, json, time
from phimr_nemo.process.children import Relay
from phimr_nemo.process.warm import WarmProcess, command_of
how, module, *arguments = sys.argv[1:]
environment = {**os.environ, "GIVEN": "1"}
with open("out", "wb") as out, Relay() as relay:
    if how == "warm":
        def load():
            import json
            os.environ["BY_A_LIBRARY"] = os.environ["GIVEN"]
        program = WarmProcess(load, environment)
        assert "BY_A_LIBRARY" not in os.environ and "GIVEN" not in os.environ
        child = program.start(module, arguments, out.fileno())
    else:
        environment["BY_A_LIBRARY"] = "1"
        child = subprocess.Popen(
            command_of(module, arguments), env=environment, stdout=out, stderr=out, start_new_session=True
        )
    print(child.pid, flush=True)
    while child.poll() is None:
        time.sleep(0.01)
print(child.poll(), relay.ended(child.poll()))
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A place with modules to run."""
    (tmp_path / "seen.py").write_text(SEEN)
    (tmp_path / "seven.py").write_text("raise SystemExit(7)")
    (tmp_path / "word.py").write_text("import sys; sys.exit('a word')")
    (tmp_path / "fails.py").write_text("raise ValueError('of its own')")
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    (tmp_path / "sleeps.py").write_text("open('ready', 'w').close()\nimport time\ntime.sleep(600)")
    (tmp_path / "starter.py").write_text(STARTER)
    return tmp_path


def command(how: str, module: str, *arguments: str) -> list[str]:
    return [sys.executable, "starter.py", how, module, *arguments]


def environment(here: Path) -> dict[str, str]:
    paths = (str(here), os.environ.get("PYTHONPATH", str(Path(__file__).resolve().parents[2])))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def outcome(here: Path, how: str, module: str, *arguments: str) -> tuple[str, str]:
    """Exit code and output of a module that was started one way."""
    done = subprocess.run(
        command(how, module, *arguments), cwd=here, env=environment(here), capture_output=True, text=True, check=True
    )
    return done.stdout.split()[1], (here / "out").read_text()


def test_a_copy_sees_what_a_new_interpreter_sees(here: Path) -> None:
    assert outcome(here, "warm", "seen", "a", "b c") == outcome(here, "new", "seen", "a", "b c")
    lines = (here / "out").read_text().splitlines()
    # Errors come first where the output to a file is buffered.
    [told] = (line for line in lines if line.startswith("{"))
    seen: dict[str, Any] = json.loads(told)
    assert seen["environment"]["GIVEN"] == "1"
    assert {*lines} - {told} == {"error", "thread", "exit handler"}


@pytest.mark.parametrize(("module", "code"), [("seven", "7"), ("word", "1"), ("fails", "1"), ("killed", "-9")])
def test_its_exit_code_and_last_words_are_its_own(module: str, code: str, here: Path) -> None:
    found, text = outcome(here, "warm", module)
    expected, words = outcome(here, "new", module)
    assert found == expected == code
    assert text.splitlines()[-1:] == words.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_told_what_its_parent_is_told(number: signal.Signals, here: Path) -> None:
    with start(
        command("warm", "sleeps"), cwd=here, env=environment(here), ctrl_c=True, stdout=subprocess.PIPE, text=True
    ) as parent:
        wait_for((here / "ready").exists, parent, 60)
        parent.send_signal(number)
        said, _ = parent.communicate(timeout=60)
    assert said.split()[1:] == [str(-signal.SIGTERM), "True"]


def test_it_ends_with_a_parent_that_was_killed(here: Path) -> None:
    with start(
        command("warm", "sleeps"), cwd=here, env=environment(here), stdout=subprocess.PIPE, text=True
    ) as parent:
        wait_for((here / "ready").exists, parent, 60)
        assert parent.stdout is not None
        copy = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    assert left_of([copy], 60) == []


def test_a_process_with_threads_or_a_gpu_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(warm, "promised_gpus", lambda: "")
    assert warm.can_fork()
    monkeypatch.setattr(warm, "promised_gpus", lambda: "an NVIDIA driver")
    assert not warm.can_fork()
    monkeypatch.setattr(warm, "promised_gpus", lambda: "")
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert not warm.can_fork()
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not warm.can_fork()


def test_copies_draw_other_random_numbers(here: Path) -> None:
    """As interpreters do that take their seeds from the system."""
    (here / "draw.py").write_text("import random, numpy\nprint(random.random(), numpy.random.random())")
    program = here / "both.py"
    program.write_text(
        "import os, time\nfrom phimr_nemo.process.warm import WarmProcess\nimport numpy\n"
        "program = WarmProcess(lambda: None, os.environ)\n"
        "for _ in range(2):\n    child = program.start('draw', ())\n"
        "    while child.poll() is None:\n        time.sleep(0.01)\n"
    )
    done = subprocess.run(
        [sys.executable, program], cwd=here, env=environment(here), capture_output=True, text=True, check=True
    )
    first, second = (line.split() for line in done.stdout.splitlines())
    assert not {*first} & {*second}
