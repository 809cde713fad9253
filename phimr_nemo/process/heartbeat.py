"""Whether the ranks of a node still move: each beats once a second, and their launcher looks.

A rank that is dead is seen by its exit code. One that stands still (stopped, frozen in a driver, stuck with Python's
lock held) is seen by nobody but the other ranks, which wait for it, for minutes and without knowing for whom.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final

DIRECTORY: Final = "PHIMR_BEATS"
"""Environment variable of the ranks: where they beat."""

SECONDS: Final = "PHIMR_HANG_SECONDS"
"""Environment variable of the launcher: how long a rank may stand still."""

BEAT_SECONDS: Final = 1.0
DEFAULT_SECONDS: Final = 300.0
"""Longer than any call that holds Python's lock, and shorter than the collectives' patience of 10 to 30 minutes."""

LONGEST_LOOK_SECONDS: Final = 1.0
"""What one look counts at most: a launcher that was itself stopped, a machine that slept or has no time for either of
them blames no rank."""


def start_beating() -> None:
    """Beat in this process until it ends, where a launcher looks; in a thread of its own."""
    place, rank = os.environ.get(DIRECTORY), os.environ.get("RANK")
    if place is None or rank is None:
        return
    file = Path(place) / f"{rank}.{os.getpid()}"

    def work() -> None:
        with contextlib.suppress(OSError):  # the launcher and its directory are gone
            file.touch()
            count = 0
            while True:
                count += 1
                os.utime(file, ns=(count, count))
                time.sleep(BEAT_SECONDS)

    threading.Thread(target=work, name="heartbeat", daemon=True).start()


class Watch:
    """The launcher's side. Use as a context manager around the ranks.

    Attributes:
        still: the ranks that were ended because they stood still.
        seconds: how long they may.
    """

    def __init__(self) -> None:
        self.still: list[int] = []
        self.seconds = float(os.environ.get(SECONDS, DEFAULT_SECONDS))
        # Not tempfile's own class: a copy of this process would remove it at its exit.
        self._directory = Path(tempfile.mkdtemp(prefix="phimr-beats-"))
        self._silent: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self._looked = time.monotonic()

    def __enter__(self) -> Watch:
        os.environ[DIRECTORY] = str(self._directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.environ.pop(DIRECTORY, None)
        shutil.rmtree(self._directory, ignore_errors=True)

    def look(self) -> None:
        """End ranks that have not beaten for too long: torchrun and the other ranks understand their death."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LONGEST_LOOK_SECONDS), now
        for file in self._directory.iterdir():
            beat = file.stat().st_mtime_ns
            self._silent[file.name] = self._silent.get(file.name, 0.0) + passed
            if self._last.get(file.name) != beat:
                self._last[file.name], self._silent[file.name] = beat, 0.0
            elif self._silent[file.name] >= self.seconds:
                rank, pid = map(int, file.name.split("."))
                file.unlink()
                if _end_child(pid):
                    self.still.append(rank)


def _end_child(pid: int) -> bool:
    """SIGKILL to a child of this process; False where it has ended, and its number may be another's by now."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.ppid() == os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            process.kill()
            return True
    return False
