"""Files and directories that exist whole or not at all: temporary name, flush to the disk, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.claims import hold, sweep

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
FILE_MODE: Final = 0o644
DIRECTORY_MODE: Final = 0o755
"""Before the umask. What a run leaves is never writable by others: they could change what the next step trusts."""

SCRATCH_MODE: Final = 0o600
OTHERS_MAY_WRITE: Final = 0o022
TEMPORARY: Final = re.compile(r"\..+\.([0-9a-f]{8})[0-9a-f]{8}\.tmp")
"""Names of what is being written; the first group marks the machine."""
SURROGATE: Final = re.compile("[\ud800-\udfff]")
IN_THE_WAY: Final = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about an output into one clear message.

    Args:
        path: the output; an error that names a file elsewhere passes unchanged.

    Raises:
        UserError: no space is left, the place cannot be written, or something else stands there.
    """
    try:
        yield
    except OSError as error:
        if not _is_about(error, path):
            raise
        if error.errno in NO_SPACE:
            raise UserError(
                f"no space left while writing {path} ({os.strerror(error.errno)})",
                rule="an output needs room on its disk; nothing half-written was kept",
                remedy="free space or choose another output directory, then run the same command again",
            ) from error
        if error.errno in NOT_ALLOWED:
            raise UserError(
                f"cannot write {path}: {os.strerror(error.errno)}",
                rule="the output directory must be writable",
                remedy="choose another output directory or change its permissions",
            ) from error
        if error.errno in IN_THE_WAY:
            raise UserError(
                f"cannot write {path}: {os.strerror(error.errno)} ({error.filename or path})",
                rule="an output's parents are directories, and nothing else stands in its place",
                remedy="choose another output or move away what is there",
            ) from error
        raise


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error concerns `path`, a directory above it, or a temporary name of it."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return True
    named, target = Path(error.filename).absolute(), path.absolute()
    if named == target or named in target.parents:
        return True
    below = named.relative_to(target.parent).parts if target.parent in named.parents else ()
    return bool(below) and (below[0] == target.name or below[0].startswith(f".{target.name}."))


def keep_others_from_writing() -> None:
    """Let no file that this process or its children make from now on be writable by group or others."""
    os.umask(os.umask(OTHERS_MAY_WRITE) | OTHERS_MAY_WRITE)


def _temporary_name(path: Path) -> str:
    return f".{path.name}.{_machine()}{secrets.token_hex(4)}.tmp"


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def remove_left_overs(directory: Path) -> None:
    """Remove temporary files and directories of processes that were killed; those of living ones stay."""
    sweep(directory, TEMPORARY, _machine())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_file(directory: Path, name: str) -> Iterator[BinaryIO]:
    """Yield a new file that other processes of this account may read by its name while it is open, and none keeps.

    What killed processes have left in the directory is removed first: in shared memory it is memory.

    Args:
        directory: where.
        name: a part of its name, which says what it holds.
    """
    remove_left_overs(directory)
    path = directory / _temporary_name(Path(name))
    try:
        with contextlib.ExitStack() as at_the_end:
            # What removes it is registered before it is there: a signal may come between any two lines.
            at_the_end.callback(path.unlink, missing_ok=True)
            file = at_the_end.enter_context(open(str(path), "x+b", opener=_open_for_oneself))
            at_the_end.callback(os.close, hold(path))
            yield file
    except BaseException:
        # Also between the end of the block and what the stack does then.
        path.unlink(missing_ok=True)
        raise


def _open_for_oneself(path: str, flags: int) -> int:
    return os.open(path, flags, SCRATCH_MODE)


def is_scratch_of(file_name: str, name: str) -> bool:
    """Whether a file's name is one that :func:`scratch_file` gives for `name`."""
    return TEMPORARY.fullmatch(file_name) is not None and file_name.startswith(f".{name}.")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to the disk and rename it into place.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    # What removes it is registered before it is there: a signal may come between any two lines.
    with explain_os_errors(path), contextlib.ExitStack() as at_the_end:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / _temporary_name(path)
        at_the_end.callback(temporary.unlink, missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)  # what the umask leaves
        os.close(descriptor)
        at_the_end.callback(os.close, hold(temporary))
        yield temporary
        _fsync(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
        _fsync(path.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON, readable and with sorted keys, whole or not at all.

    Half a surrogate pair, as of a file's name that is no UTF-8, is escaped: it is read back as it is.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    atomic_write_bytes(path, f"{SURROGATE.sub(_escaped, text)}\n".encode())


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1]


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path` that is this process's alone, and remove it.

    What a killed process left there is removed by the next one that asks.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with explain_os_errors(path), contextlib.ExitStack() as at_the_end:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(path.parent)
        temporary = path.parent / _temporary_name(path)
        at_the_end.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir()
        at_the_end.callback(os.close, hold(temporary))
        yield temporary


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success rename it into place.

    Raises:
        UserError: `path` exists and is not empty, the disk is full, or the place cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"output {path} exists already and is not empty",
            rule="a finished output is never overwritten",
            remedy="choose another output directory or remove this one",
        )
    with explain_os_errors(path), contextlib.ExitStack() as at_the_end:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(path.parent)
        temporary = path.parent / _temporary_name(path)
        at_the_end.callback(_remove_tree, temporary)
        temporary.mkdir(DIRECTORY_MODE)
        at_the_end.callback(os.close, hold(temporary))
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _fsync(entry)
            if not entry.is_symlink():
                entry.chmod(stat.S_IMODE(entry.stat().st_mode) & ~OTHERS_MAY_WRITE)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        _fsync(path.parent)


def _remove_tree(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
