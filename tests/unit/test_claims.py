"""Locks: who is kept out and why, file systems without them, and what killed processes have left half-written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import start

from phimr_nemo.errors import UserError
from phimr_nemo.store import claims
from phimr_nemo.store.atomic import atomic_directory, atomic_file, is_scratch_of, remove_left_overs, scratch_file
from phimr_nemo.store.claims import LOCK_FILE, WHOLE, claimed, read_holder

NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]


@pytest.mark.parametrize(
    ("ours", "theirs", "kept_out"),
    [
        (WHOLE, WHOLE, True),
        (WHOLE, (1, 2), True),
        ((1, 2), WHOLE, True),
        ((0, 2), (1, 2), False),
        ((0, 2), (0, 2), True),
        # Of another array, which divides the shards by leases of other names.
        ((0, 2), (1, 3), True),
        ((3, 4), (1, 2), True),
    ],
)
def test_tasks_of_one_array_work_side_by_side_and_nobody_else(
    ours: tuple[int, int], theirs: tuple[int, int], kept_out: bool, tmp_path: Path
) -> None:
    with claimed(tmp_path, ours):
        if kept_out:
            with (
                pytest.raises(UserError, match=f"process {os.getpid()} on {platform.node()}"),
                claimed(tmp_path, theirs),
            ):
                pass
        else:
            with claimed(tmp_path, theirs):
                pass
    with claimed(tmp_path, theirs):
        pass


def test_who_is_refused_leaves_the_holders_word(tmp_path: Path) -> None:
    with claimed(tmp_path):
        holder = read_holder(tmp_path / LOCK_FILE)
        for _ in range(2):
            with pytest.raises(UserError, match=str(holder["since"])), claimed(tmp_path):
                pass
        assert read_holder(tmp_path / LOCK_FILE) == holder
    assert read_holder(tmp_path / LOCK_FILE) == {}


def failing(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(claims.fcntl, "flock", flock)


@pytest.mark.parametrize("code", NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_said_and_stops_nobody(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, code)
    with claimed(tmp_path):
        assert os.strerror(code) in capsys.readouterr().err
    # What a process that is gone has left behind.
    (tmp_path / LOCK_FILE).write_text(json.dumps({"process": 2**22 + 1, "host": platform.node(), "started": "1"}))
    with claimed(tmp_path):
        pass
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("x")
    with atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "directory" / "file").read_text() == "x"


def test_without_locks_a_living_process_of_this_machine_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, errno.ENOLCK)
    other = start([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = {"process": other.pid, "host": platform.node(), "since": "then", "started": claims._started(other.pid)}
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder))
    with pytest.raises(UserError, match=f"process {other.pid}"), claimed(tmp_path):
        pass
    other.kill()
    other.communicate()
    with claimed(tmp_path):
        pass


def test_another_error_is_not_taken_for_a_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"), claimed(tmp_path):
        pass


@pytest.mark.parametrize(
    ("holder", "squeue", "is_passed_over"),
    [
        ({"host": "gone", "job": ["7", "0"]}, "", True),  # this job, requeued: its restart count is 1
        ({"host": "gone", "job": ["7", "1"]}, "", False),  # another step of this allocation
        ({"host": "gone", "job": ["6", "0"]}, "", True),
        ({"host": "gone", "job": ["6", "0"]}, "echo RUNNING", False),
        ({"host": "gone", "job": None}, "", False),
        ({"host": platform.node(), "job": ["6", "0"]}, "", False),
        ({}, "", False),
    ],
)
def test_a_lock_that_a_lost_node_keeps_does_not_stop_its_requeued_job(
    holder: dict[str, Any], squeue: str, is_passed_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = tmp_path / "run" / LOCK_FILE
    path.parent.mkdir()
    path.write_text(json.dumps(holder))
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if is_passed_over:
            with claimed(path.parent):
                pass
        else:
            with pytest.raises(UserError, match="another process is at work"), claimed(path.parent):
                pass


ORPHANED = """
import os, sys, time
from pathlib import Path
from phimr_nemo.store.claims import claimed
with claimed(Path(sys.argv[1])):
    if not os.fork():
        while not Path(sys.argv[2]).exists():
            time.sleep(0.02)
        os._exit(0)
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ends", [True, False])
def test_what_a_killed_process_has_started_is_waited_for(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child has its parent's lock, and may write for a moment more."""
    run, sign = tmp_path / "run", tmp_path / "end"
    command = [sys.executable, "-c", ORPHANED, str(run), str(sign)]
    other = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"claimed\n"
    other.kill()
    other.wait()
    if ends:
        # The child ends while it is waited for.
        outlasts = claims._outlasts

        def told_to_end(descriptor: int) -> bool:
            sign.touch()
            return outlasts(descriptor)

        monkeypatch.setattr(claims, "_outlasts", told_to_end)
    else:
        monkeypatch.setattr(claims, "ORPHAN_SECONDS", 0.2)
    try:
        if ends:
            with claimed(run):
                assert read_holder(run / LOCK_FILE)["process"] == os.getpid()
        else:
            with pytest.raises(UserError, match=f"process {other.pid}"), claimed(run):
                pass
    finally:
        sign.touch()


# What killed processes have left ----------------------------------------------------------------------------

HALF_WRITTEN = """
import sys
from pathlib import Path
from phimr_nemo.store.atomic import atomic_directory, atomic_file
with atomic_directory(Path(sys.argv[1]) / "model") as directory, atomic_file(Path(sys.argv[1]) / "file") as file:
    (directory / "weights").write_bytes(b"half")
    file.write_bytes(b"half")
    print("half", flush=True)
    sys.stdin.read()
"""


def hidden(directory: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in directory.iterdir() if path.name.startswith("."))


def test_what_a_killed_process_left_half_written_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    writers = [
        start([sys.executable, "-c", HALF_WRITTEN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
    (tmp_path / ".mine.tmp").write_text("")
    (tmp_path / ".model.0123456789abcdef.tmp").symlink_to(tmp_path)
    everything = ["file", "file", "mine", "model", "model", "model"]
    assert hidden(tmp_path) == everything
    remove_left_overs(tmp_path)
    assert hidden(tmp_path) == everything
    writers[0].send_signal(signal.SIGKILL)
    writers[0].communicate()
    with atomic_directory(tmp_path / "other") as directory:
        assert hidden(tmp_path) == ["file", "mine", "model", "model", "other"]
        (directory / "weights").write_text("whole")
    writers[1].communicate(b"")
    assert hidden(tmp_path) == ["mine", "model"]
    assert (tmp_path / "model" / "weights").read_bytes() == b"half"


def test_a_killed_process_leaves_no_scratch_file_to_the_next(tmp_path: Path) -> None:
    """Buckets of weights lie in shared memory, which nobody else would free."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom phimr_nemo.store.atomic import scratch_file\n"
        "with scratch_file(Path(sys.argv[1]), 'weights') as file:\n"
        "    print(file.name, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    killed, living = (start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2))
    names = []
    for writer in (killed, living):
        assert writer.stdout is not None
        names.append(Path(writer.stdout.readline().decode().strip()))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert all(name.is_file() for name in names)
    with scratch_file(tmp_path, "weights") as file:
        assert sorted(tmp_path.iterdir()) == sorted((names[1], Path(file.name)))
        assert is_scratch_of(Path(file.name).name, "weights")
        assert not is_scratch_of(Path(file.name).name, "weight")
    living.communicate(b"")
    assert list(tmp_path.iterdir()) == []


def test_another_machines_half_written_files_are_left_for_a_day(tmp_path: Path) -> None:
    path = tmp_path / ".model.0123456789abcdef.tmp"
    path.mkdir()
    remove_left_overs(tmp_path)
    assert path.is_dir()
    then = time.time() - 2 * claims.DAY_SECONDS
    os.utime(path, (then, then))
    remove_left_overs(tmp_path)
    assert not path.exists()


def test_two_conversions_into_one_directory_leave_one_whole(tmp_path: Path) -> None:
    """Neither needs a lock: what is renamed last finds the place taken."""
    target = tmp_path / "model"
    second = atomic_directory(target)
    ours = second.__enter__()
    (ours / "weights").write_text("second")
    with atomic_directory(target) as first:
        (first / "weights").write_text("first")
    with pytest.raises(UserError, match="cannot write"):
        second.__exit__(None, None, None)
    assert (target / "weights").read_text() == "first"
    assert hidden(tmp_path) == []
