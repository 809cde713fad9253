"""Rows of a user's own file: JSON, JSONL (either compressed with gzip or zstd) and parquet, in bounded memory.

Every row comes with its place ("line 12"), so that a message can name it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from phimr_nemo.data.sources.misfits import malformed, not_utf8
from phimr_nemo.errors import UserError
from phimr_nemo.store.inputs import table_remedy
from phimr_nemo.store.unpacking import LINE_BYTES, MAX_ROW_BYTES, Allowance, compressed_bytes, parquet_batches

Row = dict[str, Any]

CHUNK_BYTES: Final = 1 << 20
PART_BYTES: Final = 32 << 20
"""Of a file, for one process at a time: some ten thousand rows."""
MAX_DIGITS: Final = 4_000
COMPRESSIONS: Final = (".gz", ".zst")
DESCRIPTIONS: Final = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""Files beside shards in which `datasets` and the hub describe them."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """A part of a file that is read by itself.

    Attributes:
        start, stop: bytes of a file of lines, row groups of a parquet file; None = to the end.
        before: lines or rows of the file before it.
    """

    start: int = 0
    stop: int | None = None
    before: int = 0


WHOLE: Final = Part()


def format_of(path: Path) -> str:
    """The file's format, its compression aside: ".json", ".jsonl" or ".parquet".

    Raises:
        UserError: another ending.
    """
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    ending = name.suffix.lower().replace(".ndjson", ".jsonl")
    if ending not in (".json", ".jsonl", ".parquet") or (ending == ".parquet" and name != path):
        raise UserError(
            f"cannot tell the format of {path}",
            rule="a file ends in .json, .jsonl, .json.gz, .jsonl.gz, .json.zst, .jsonl.zst or .parquet",
            remedy=table_remedy(path),
        )
    return ending


def files_in(directory: Path) -> list[Path]:
    """The files of rows in a directory and below it, by name; others (README.md, .gitattributes) are passed over.

    Raises:
        UserError: there are none.
    """
    endings = (".json", ".jsonl", ".ndjson", ".parquet")
    files = []
    for path in sorted(directory.rglob("*")):
        name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
        hidden = any(
            part.startswith((".", "_")) or part in DESCRIPTIONS for part in path.relative_to(directory).parts
        )
        if path.is_file() and name.suffix.lower() in endings and not hidden:
            files.append(path)
    if not files:
        raise UserError(
            f"{directory} holds no files of rows",
            rule="a directory of shards holds .parquet, .json or .jsonl files (.gz, .zst)",
            remedy="correct the path",
        )
    return files


def parts_of(path: Path) -> Iterator[Part]:
    """A file in parts of about `PART_BYTES`, in order: parquet between row groups, JSON lines between lines.

    Compressed text and a JSON array can be read from the beginning only, and are one part.

    Raises:
        UserError: the file is damaged or of an unknown format.
    """
    ending = format_of(path)
    with _explained(path):
        if ending == ".parquet":
            yield from _parts_of_parquet(path)
        elif path.suffix.lower() in COMPRESSIONS:
            yield WHOLE
        else:
            with path.open("rb") as file:
                whole = ending == ".json" and (_is_array(file) or _is_one_object(file))
                yield from [WHOLE] if whole else _parts_of_lines(file, path.stat().st_size)


def _parts_of_parquet(path: Path) -> Iterator[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, ValueError) as error:
        raise _damaged(path, error) from error
    start = held = before = rows = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        held, rows = held + compressed_bytes(group), rows + group.num_rows
        if held >= PART_BYTES and index + 1 < metadata.num_row_groups:
            yield Part(start, index + 1, before)
            start, held, before, rows = index + 1, 0, before + rows, 0
    yield Part(start, None, before)


def _parts_of_lines(file: BinaryIO, size: int) -> Iterator[Part]:
    start = before = 0
    while size - start > PART_BYTES:
        lines, left = 0, PART_BYTES
        while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
            lines, left = lines + chunk.count(b"\n"), left - len(chunk)
        # To the end of the line, however long it is.
        while (chunk := file.readline(CHUNK_BYTES)) and not chunk.endswith(b"\n"):
            pass
        stop = file.tell()
        if stop >= size:
            break
        yield Part(start, stop, before)
        start, before = stop, before + lines + 1
    yield Part(start, None, before)


def read_rows(path: Path, *, array_column: str | None = None, part: Part = WHOLE) -> Iterator[tuple[str, Row]]:
    """Each row of a file, or of a part of it, with its place in the file.

    Args:
        path: JSON, JSONL (.gz, .zst) or parquet.
        array_column: take rows that are JSON arrays, as the only column of this name.
        part: one of :func:`parts_of`.

    Raises:
        UserError: the file is missing, empty, damaged or of an unknown format, or a row is malformed
            or no object; the line is named.
    """
    if not path.is_file():
        raise UserError(
            f"{path} {'is a directory' if path.is_dir() else 'does not exist'}",
            rule="this step reads one file of rows",
            remedy="correct the path",
        )
    ending = format_of(path)
    rows = 0
    with _explained(path):
        found = _rows_of_parquet(path, part) if ending == ".parquet" else _rows_of_text(path, ending, part)
        for place, row in found:
            if array_column is not None and isinstance(row, list):
                row = {array_column: row}
            if not isinstance(row, dict):
                raise malformed(path, place, f"is a JSON {type(row).__name__}, not an object")
            rows += 1
            yield place, row
    if not rows and part == WHOLE:
        raise UserError(f"{path} holds no rows", rule="an input has at least one row", remedy="correct the path")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise what readers say of a damaged file as a message.

    Raises:
        UserError: it is damaged.
    """
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # pyarrow reports a damaged zstd stream as an OSError without errno.
        if error.errno is None:
            raise _damaged(path, error) from error
        raise


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Each row of a CSV file with a header, such as GPQA's, with its place.

    Raises:
        UserError: the file is missing, is no such text, or is empty.
    """
    rows = 0
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for rows, row in enumerate(csv.DictReader(file), 1):
                yield f"row {rows}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {str(error)[:200]}",
            rule="it is a CSV file in UTF-8 whose first line names the columns",
            remedy="download it again, or correct the path",
        ) from error
    if not rows:
        raise UserError(f"{path} holds no rows", rule="an input has at least one row", remedy="correct the path")


def _rows_of_text(path: Path, ending: str, part: Part) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        if part != WHOLE:
            file.seek(part.start)
            yield from _rows_of_lines(path, file, part)
        elif ending == ".json" and _is_array(file):
            yield from _rows_of_array(path, file)
        elif ending == ".json" and _is_one_object(file):
            text = file.read(MAX_ROW_BYTES + 1)
            if len(text) > MAX_ROW_BYTES:
                raise malformed(path, "the file", f"is one object of more than {MAX_ROW_BYTES} bytes")
            yield "the file", _parse(path, "the file", text)
        else:
            yield from _rows_of_lines(path, file, part)


def _open(path: Path) -> io.BufferedReader:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(cast("io.RawIOBase", gzip.open(path, "rb")))
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")
        return io.BufferedReader(cast("io.RawIOBase", stream))
    return path.open("rb")


def _is_array(file: io.BufferedReader) -> bool:
    """Whether the text starts like a JSON array; many a .json file holds one object a line instead."""
    return file.peek(64).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _is_one_object(file: io.BufferedReader) -> bool:
    """Whether the text is one object over several lines, as MATH has a file a problem."""
    return file.peek(64).removeprefix(_BYTE_ORDER_MARK).lstrip().partition(b"\n")[0].strip() == b"{"


def _rows_of_array(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array, one at a time."""
    decoder = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_named_once)
    allowance, number = Allowance(path), 0
    stream = codecs.getreader("utf-8-sig")(file)
    text = _refill(path, stream, "", allowance).lstrip().removeprefix("[")
    first = True
    while True:
        text = text.lstrip() or _refill(path, stream, "", allowance).lstrip()
        if text.startswith("]"):
            break
        if not first:
            if not text.startswith(","):
                raise malformed(path, "the file", f"is not JSON: no comma after item {number}")
            text = text[1:]
        first, number = False, number + 1
        allowance.spend(LINE_BYTES)
        value, text = _item(path, stream, text, decoder, number, allowance)
        yield f"item {number}", value
    if text[1:].strip() or _refill(path, stream, "", allowance).strip():
        raise malformed(path, "the file", "is not JSON: more after its array")


def _item(
    path: Path, stream: codecs.StreamReader, text: str, decoder: json.JSONDecoder, number: int, allowance: Allowance
) -> tuple[Any, str]:
    """One item, and the text behind it. Reads on until the item is whole."""
    while True:
        text = text.lstrip()
        try:
            value, end = decoder.raw_decode(text)
            # A number may go on.
            if end < len(text):
                return value, text[end:]
            problem = ""
        except _NamedTwiceError as error:
            raise malformed(path, f"item {number}", str(error)) from error
        except RecursionError as error:
            raise malformed(path, f"item {number}", f"is not JSON: {error}") from error
        except ValueError as error:
            problem = str(error)[:200]
        if len(text) > MAX_ROW_BYTES:
            raise malformed(
                path, f"item {number}", f"is longer than {MAX_ROW_BYTES} bytes, or is not JSON: {problem}"
            )
        # Twice as much each time, so that a long item is not read over and over.
        more = _refill(path, stream, text, allowance)
        if len(more) == len(text):
            raise malformed(path, "the file", f"is not JSON: it ends within item {number}: {problem}")
        text = more


def _refill(path: Path, stream: codecs.StreamReader, text: str, allowance: Allowance) -> str:
    """The text and as much again of the file."""
    try:
        more = stream.read(max(CHUNK_BYTES, len(text)))
    except UnicodeDecodeError as error:
        raise not_utf8(path, "the file", error) from error
    allowance.spend(len(more))
    return text + more


def _rows_of_lines(path: Path, file: BinaryIO, part: Part) -> Iterator[tuple[str, Any]]:
    number, place, allowance = part.before, part.start, Allowance(path)
    while (part.stop is None or place < part.stop) and (line := file.readline(MAX_ROW_BYTES + 1)):
        number, place = number + 1, place + len(line)
        allowance.spend(max(len(line), LINE_BYTES))
        if len(line) > MAX_ROW_BYTES:
            raise malformed(path, f"line {number}", f"is longer than {MAX_ROW_BYTES} bytes")
        if line.strip():
            yield f"line {number}", _parse(path, f"line {number}", line)


def _parse(path: Path, place: str, data: bytes) -> Any:
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=_named_once)
    except UnicodeDecodeError as error:
        raise not_utf8(path, place, error) from error
    except (ValueError, RecursionError) as error:
        raise malformed(path, place, f"is not JSON: {str(error)[:200]}") from error
    except _NamedTwiceError as error:
        raise malformed(path, place, str(error)) from error


def _whole_number(digits: str) -> int | str:
    """A number; its digits where there are more than Python converts."""
    return int(digits) if len(digits) <= MAX_DIGITS else digits


class _NamedTwiceError(Exception):
    """Two values under one name. Not a ValueError, which says that more of the text is needed."""


def _named_once(pairs: list[tuple[str, Any]]) -> Row:
    """An object; JSON leaves open which of two values of one name counts.

    Raises:
        _NamedTwiceError: a name stands twice with different values.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        for name, value in pairs:
            if value != row[name]:
                raise _NamedTwiceError(f"has two values of {name!r:.80}")
    return row


def _rows_of_parquet(path: Path, part: Part) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    number = part.before
    try:
        for batch in parquet_batches(path, part.start, part.stop):
            names = batch.schema.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise malformed(path, "its schema", f"has two columns {twice!r:.80}")
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except MemoryError as error:
        raise UserError(
            f"{path} needs more memory than there is: {str(error)[:200]}",
            rule="a batch of rows is in memory at a time",
            remedy="write it in smaller row groups",
        ) from error
    except (pa.ArrowException, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged: {str(error)[:200]}",
        rule="a compressed or parquet file must be whole",
        remedy="copy or download it again",
    )
