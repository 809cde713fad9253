"""An append-only file of JSON records that a kill at any moment leaves readable.

Each line is a checksum and a record. A record is appended with one write, so a killed process leaves whole lines
and at most one torn one, which the reader passes over; so it does with lines damaged in any other way. The data
reach the disk when the journal is closed: a crash of the machine may cost the last lines, never a wrong one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from phimr_nemo.store.atomic import explain_os_errors

CHECKSUM_BYTES: Final = 8
CHECKSUM_CHARS: Final = 2 * CHECKSUM_BYTES


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=CHECKSUM_BYTES).hexdigest().encode("ascii")


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a journal, in order; nothing when there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            checksum, text = line[:CHECKSUM_CHARS], line[CHECKSUM_CHARS + 1 : -1]
            # A torn line may lack its end; its checksum then covers more than is there.
            if line.endswith(b"\n") and checksum == _checksum(text):
                yield json.loads(text)


class Journal:
    """Appends records to a journal file.

    Args:
        path: the file; made if absent.

    Raises:
        UserError: the place cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._file).st_size
            # What follows a torn line must not become a part of it.
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self._write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            UserError: the disk is full.
        """
        text = json.dumps(record).encode("ascii")
        with explain_os_errors(self._path):
            self._write(_checksum(text) + b" " + text + b"\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        """Bring everything to the disk and close the file."""
        with explain_os_errors(self._path):
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
