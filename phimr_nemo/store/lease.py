"""Leases: processes that share a directory, on one machine or on many, divide its work as they go.

A lease is a file beside the work, named after one unit of it. Whoever creates the file (exclusively, which a shared
file system decides for all) has the unit, and touches the file while it works. A holder that is killed touches no
longer; after :data:`LEASE_SECONDS` its lease has expired, and another takes it over. A holder that is started again
under its own name goes on at once.

Leases only save work. Shards are written atomically and follow from content, so where two processes do come to hold
one unit (one was stopped for longer than a lease, and awoke), both write the same bytes. Ages are told by the file
system's own clock, so the clocks of the machines may differ.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from phimr_nemo.store.atomic import FILE_MODE

LEASE_SECONDS: Final = 120.0
TOUCHES: Final = 4
"""In the life of a lease: three may be late."""
POLL_SECONDS: Final = 2.0
SUFFIX: Final = ".lease"


class Leases:
    """The leases of one process. Use as a context manager.

    Args:
        directory: of the leases, on a file system that all processes see; made if it does not exist.
        holder: this process's name, the same when it is started again, and no other's.
        seconds: after which a lease that nobody touches has expired; None = :data:`LEASE_SECONDS`.
    """

    def __init__(self, directory: Path, holder: str, seconds: float | None = None) -> None:
        self._directory, self._holder = directory, holder
        self._seconds = LEASE_SECONDS if seconds is None else seconds
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._toucher = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Leases:
        self._toucher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._toucher.join()
        for name in sorted(self._held):
            self.release(name)
        self._clock().unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def take(self, name: str) -> bool:
        """Whether this process now holds the unit `name`."""
        path = self._directory / (name + SUFFIX)
        if not (self._create(path) or self._is_own(path) or (self._is_expired(path) and self._take_over(path))):
            return False
        with self._lock:
            self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give a unit back, done or not."""
        with self._lock:
            self._held.discard(name)
        path = self._directory / (name + SUFFIX)
        if self._is_own(path):
            path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # The last one to leave removes the directory, and another may come after it.
            self._directory.mkdir(parents=True, exist_ok=True)
            return self._create(path)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._holder)
        return True

    def _is_own(self, path: Path) -> bool:
        try:
            if path.read_text("utf-8") != self._holder:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _is_expired(self, path: Path) -> bool:
        """By the time that the file system gives a file that is written now."""
        clock = self._clock()
        try:
            clock.write_text(self._holder, "utf-8")
            return clock.stat().st_mtime - path.stat().st_mtime > self._seconds
        except FileNotFoundError:
            return False

    def _clock(self) -> Path:
        return self._directory / f"{self._holder}.clock"

    def _take_over(self, path: Path) -> bool:
        """Of all that find a lease expired, one can move it away; then whoever creates it has it."""
        aside = path.with_name(f"{path.name}.{self._holder}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        aside.unlink(missing_ok=True)
        return self._create(path)

    def _touch(self) -> None:
        while not self._ended.wait(self._seconds / TOUCHES):
            with self._lock:
                held = sorted(self._held)
            for name in held:
                # A file system that is away for a moment is asked again: three touches may fail.
                with contextlib.suppress(OSError):
                    self._is_own(self._directory / (name + SUFFIX))


class FreeUnits:
    """The units of a work that nobody has done or holds, one after another as they are asked for.

    A unit is held from then on until it is given back.

    Args:
        units: all of them; the order in which they are tried.
        leases: this process's; None = nobody shares the work.
        name: of the work, in front of a unit's number.
        is_done: whether a unit needs no work; asked often.
        wait: go on until all units are done, by whomever; else end when the rest is held by others.
    """

    def __init__(
        self,
        units: Sequence[int],
        leases: Leases | None,
        *,
        name: str,
        is_done: Callable[[int], bool],
        wait: bool = False,
    ) -> None:
        self._units, self._leases, self._name, self._is_done, self._wait = units, leases, name, is_done, wait

    def __iter__(self) -> Iterator[int]:
        left = list(self._units)
        while left:
            took = False
            for unit in list(left):
                if self._is_done(unit):
                    left.remove(unit)
                elif self._leases is None or self._leases.take(self._key(unit)):
                    left.remove(unit)
                    took = True
                    # It may have been done between the question and the lease.
                    if self._is_done(unit):
                        self.release(unit)
                    else:
                        yield unit
            if left and not took:
                if not self._wait:
                    return
                time.sleep(POLL_SECONDS)

    def release(self, unit: int) -> None:
        """Give a unit back, done or not; this process is not asked for it again."""
        if self._leases is not None:
            self._leases.release(self._key(unit))

    def one_by_one(self) -> Iterator[int]:
        """The units, each given back when the next one is asked for."""
        for unit in self:
            try:
                yield unit
            finally:
                self.release(unit)

    def _key(self, unit: int) -> str:
        return f"{self._name}-{unit:05d}"


def rotated(units: Sequence[int], index: int, count: int) -> list[int]:
    """The units, beginning where process `index` of `count` does, so that they do not start with the same one."""
    first = len(units) * index // count
    return [*units[first:], *units[:first]]
