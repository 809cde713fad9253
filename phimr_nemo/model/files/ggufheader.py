"""The header of a GGUF file walked through before the package gguf builds objects of it.

The package believes every count in a file: 49 bytes can ask it for 2^61 numbers. Here each count is compared with the
bytes that are there, and a value is stepped over, not built.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, Final

from phimr_nemo.errors import UserError

MAX_FIELDS: Final = 10_000
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 8
MAX_ARRAY_ITEMS: Final = 1_000_000
"""A vocabulary has some hundred thousand entries; the package makes two objects of each."""

MAX_ITEMS: Final = 3_000_000
"""Of all arrays of a file together."""

MAX_NAME_BYTES: Final = 65_535
MAX_TEXT_BYTES: Final = 16 << 20
MAGIC: Final = b"GGUF"
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of GGUF's numbers, by their types."""

_TEXT, _ARRAY = 8, 9
_COUNT, _KIND = struct.Struct("<Q"), struct.Struct("<I")


def check_header(path: Path) -> None:
    """Refuse a file whose header claims more than it can hold, or more than any model needs.

    Raises:
        UserError: it does.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        _Walk(path, file, size).header()


class _Walk:
    """A position in a file, and what is left behind it."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._items = 0

    def header(self) -> None:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise self._wrong("no magic number", "a GGUF file begins with GGUF")
        version = self._number(_KIND)
        if not version & 0xFFFF > 0:
            raise self._wrong("the other byte order", "files are little-endian")
        tensors, fields = self._number(_COUNT), self._number(_COUNT)
        self._at_most(fields, MAX_FIELDS, "fields", least=13)
        self._at_most(tensors, MAX_TENSORS, "tensors", least=24)
        for _ in range(fields):
            self._text(MAX_NAME_BYTES)
            self._value(self._number(_KIND))
        for _ in range(tensors):
            self._text(MAX_NAME_BYTES)
            dimensions = self._number(_KIND)
            self._at_most(dimensions, MAX_DIMENSIONS, "dimensions of a tensor", least=8)
            self._skip(_COUNT.size * dimensions + _KIND.size + _COUNT.size)

    def _value(self, kind: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._text(MAX_TEXT_BYTES)
        elif kind == _ARRAY:
            self._array()
        else:
            raise self._wrong(f"a field of type {kind}", f"types are numbers up to {max(_SIZES)}")

    def _array(self) -> None:
        kind, count = self._number(_KIND), self._number(_COUNT)
        if kind == _ARRAY:
            raise self._wrong("an array of arrays", "arrays hold numbers or texts")
        if kind != _TEXT and kind not in _SIZES:
            raise self._wrong(f"an array of type {kind}", f"types are numbers up to {max(_SIZES)}")
        self._at_most(count, MAX_ARRAY_ITEMS, "items of an array", least=_SIZES.get(kind, _COUNT.size))
        self._items += count
        self._at_most(self._items, MAX_ITEMS, "items of arrays", least=0)
        if kind != _TEXT:
            self._skip(count * _SIZES[kind])
            return
        for _ in range(count):
            self._text(MAX_TEXT_BYTES)

    def _text(self, limit: int) -> None:
        length = self._number(_COUNT)
        self._at_most(length, limit, "bytes of a text", least=1)
        self._skip(length)

    def _number(self, form: struct.Struct) -> int:
        data = self._file.read(form.size)
        if len(data) < form.size:
            raise self._cut()
        return int(form.unpack(data)[0])

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise self._cut()
        self._file.seek(count, os.SEEK_CUR)

    def _at_most(self, count: int, limit: int, name: str, *, least: int) -> None:
        """Compare a count with a limit, and with the bytes that are left for it.

        Args:
            count: what the file claims.
            limit: the most that is read.
            name: of what is counted.
            least: bytes that each takes at least.
        """
        if count > limit:
            raise self._wrong(f"{count} {name}", f"there are at most {limit}")
        left = self._size - self._file.tell()
        if count * least > left:
            raise self._wrong(f"{count} {name} in the {left} bytes left", "they are all there")

    def _cut(self) -> UserError:
        return self._wrong(f"an end after {self._size} bytes, within its header", "it is complete")

    def _wrong(self, found: str, rule: str) -> UserError:
        return UserError(
            f"{self._path} cannot be read as GGUF: it has {found}",
            rule=f"in a GGUF file {rule}" if not rule.startswith("a GGUF") else rule,
            remedy="download it again; do not use it unless you know where it comes from",
        )
