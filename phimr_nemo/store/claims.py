"""Locks of the kernel's: who is at work in a run directory, and which half-written files nobody is at work on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError

LOCK_FILE: Final = ".lock"
"""Of a whole run; of a share of it `.lock-INDEX-of-COUNT`. It says who holds it."""
SHARE_LOCK: Final = re.compile(r"\.lock-(\d+)-of-(\d+)")
NO_LOCKS: Final = frozenset(
    (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.ESTALE)
)
"""What file systems without working locks say."""
WHOLE: Final = (0, 1)
LOCK_MODE: Final = 0o644
START_FIELD: Final = 19
"""Of /proc/PID/stat behind the name: field 22 of proc(5)."""
QUEUE_SECONDS: Final = 10.0
ORPHAN_SECONDS: Final = 60.0
"""How long the children of a killed process may take to notice: writers of checkpoints, graders."""
POLL_SECONDS: Final = 0.1
Share = tuple[int, int]


@contextlib.contextmanager
def claimed(directory: Path, share: Share = WHOLE) -> Iterator[None]:
    """Keep other processes out; the kernel ends it when this process does, however that happens.

    A file system without locks keeps nobody out, which is said.

    Args:
        directory: of a run; made if it is absent.
        share: (index, count) of an array's task: tasks of one array work side by side, others do not.

    Raises:
        UserError: another process is at work on some of the same; who that is, where and since when.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _lock_name(share)
    with _opened(path) as descriptor:
        _take(descriptor, path)
        for other in _overlapping(directory, share):
            with contextlib.suppress(FileNotFoundError), _opened(other) as probe:
                _take(probe, other)
        _write_holder(descriptor)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)


def was_left(directory: Path) -> bool:
    """Whether all that were at work in a run directory have ended in order: who does empties his lock file."""
    try:
        sizes = [path.stat().st_size for path in directory.glob(f"{LOCK_FILE}*")]
    except OSError:
        return False
    return bool(sizes) and not any(sizes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, LOCK_MODE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_name(share: Share) -> str:
    return LOCK_FILE if share == WHOLE else f"{LOCK_FILE}-{share[0]}-of-{share[1]}"


def _overlapping(directory: Path, share: Share) -> Iterator[Path]:
    """The other locks there, those of tasks of the same array excepted: leases divide the shards among them."""
    for path in directory.glob(f"{LOCK_FILE}*"):
        match = SHARE_LOCK.fullmatch(path.name)
        other = WHOLE if path.name == LOCK_FILE else (int(match[1]), int(match[2])) if match else share
        if other[1] != share[1]:
            yield path


def _take(descriptor: int, path: Path) -> None:
    """Lock an open lock file.

    Raises:
        UserError: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = read_holder(path)
        if _is_gone_from_here(holder) and _outlasts(descriptor):
            return
        if not _is_left_behind(holder):
            raise _refusal(path, holder) from None
        _warn(f"{path.parent}: the lock of {_who(holder)} is that of a lost node and is passed over")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        holder = read_holder(path)
        if _is_alive_here(holder):
            raise _refusal(path, holder) from None
        _warn(
            f"{path.parent}: its file system has no working locks ({os.strerror(error.errno)}): "
            "a command there on another machine is not kept out"
        )


def _is_gone_from_here(holder: Mapping[str, Any]) -> bool:
    """Whether a lock's holder was a process of this machine that has ended: its children have the lock too."""
    process = holder.get("process")
    if holder.get("host") != platform.node() or not isinstance(process, int) or "started" not in holder:
        return False
    return _started(process) != holder["started"]


def _outlasts(descriptor: int) -> bool:
    """Wait for what a killed process has left, which ends by itself; whether it did in time."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write_holder(descriptor: int) -> None:
    holder = {
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "job": _job(),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _job() -> list[str] | None:
    """The Slurm job that this is a part of, and how often it was requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else [job, os.environ.get("SLURM_RESTART_COUNT", "0")]


def _started(process: int) -> str:
    """When a process started, in the kernel's ticks: another one of its number has another start; "" for none."""
    try:
        # The name, which may hold anything, ends with the last bracket.
        return Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[START_FIELD]
    except (OSError, IndexError):
        return ""


def _is_alive_here(holder: Mapping[str, Any]) -> bool:
    """Whether a holder is a living process of this machine, other than this one."""
    process, started = holder.get("process"), holder.get("started")
    if holder.get("host") != platform.node() or not isinstance(process, int) or process == os.getpid():
        return False
    return bool(started) and _started(process) == started


def _refusal(path: Path, holder: Mapping[str, Any]) -> UserError:
    return UserError(
        f"another process is at work in {path.parent}: {_who(holder)}",
        rule="a run directory belongs to one process at a time",
        remedy="wait for it or stop it, then run the same command again; or choose another run.output",
    )


def _is_left_behind(holder: Mapping[str, Any]) -> bool:
    """Whether a lock is one that a node took with it, which its file system still keeps: the requeued job must start.

    Two steps of one allocation are at work at once; a requeued job is not at work beside itself.
    """
    job, own = holder.get("job"), _job()
    if own is None or holder.get("host") == platform.node() or not isinstance(job, list):
        return False
    if job == own:
        return False
    return job[:1] == own[:1] or not _is_queued(str(job[0]))


def _is_queued(job: str) -> bool:
    """Whether Slurm knows a job that has not ended; True where it cannot be asked."""
    try:
        done = subprocess.run(
            ("squeue", "--noheader", "--format=%T", f"--jobs={job}"),
            capture_output=True,
            text=True,
            timeout=QUEUE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return True
    return done.returncode == 0 and bool(done.stdout.strip())


def read_holder(path: Path) -> dict[str, Any]:
    """What a lock file says of its holder; nothing where it says nothing that can be read."""
    try:
        holder = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _who(holder: Mapping[str, Any]) -> str:
    if not {"process", "host", "since"} <= holder.keys():
        return "who that is, its lock file does not say"
    job = holder.get("job")
    in_job = f" (Slurm job {job[0]})" if isinstance(job, list) and job else ""
    return f"process {holder['process']} on {holder['host']}{in_job}, since {holder['since']}"


# What a killed process left half-written ---------------------------------------------------------------------

DAY_SECONDS: Final = 86_400.0
"""Another machine's half-written file is left alone for so long: not every file system shares its locks."""


def hold(path: Path) -> int:
    """Mark a temporary file or directory as being written, until the descriptor is closed or this process ends."""
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def sweep(directory: Path, temporary: re.Pattern[str], own_machine: str) -> None:
    """Remove what processes that were killed have left half-written in a directory.

    Args:
        directory: not looked into any deeper.
        temporary: the names of temporary files and directories, with the machine's mark as the first group.
        own_machine: the mark of this machine.
    """
    try:
        entries = [entry for entry in os.scandir(directory) if entry.name.startswith(".")]
    except OSError:
        return
    for entry in entries:
        match = temporary.fullmatch(entry.name)
        if match is None or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):
            is_own = match[1] == own_machine
            if (is_own or time.time() - entry.stat().st_mtime > DAY_SECONDS) and _is_nobodys(Path(entry.path)):
                _remove(Path(entry.path))


def _is_nobodys(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
