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
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from phimr_nemo.errors import UserError
from phimr_nemo.store.inputs import table_remedy
from phimr_nemo.store.unpacking import LINE_BYTES, MAX_ROW_BYTES, Allowance, parquet_batches

Row = dict[str, Any]

CHUNK_BYTES: Final = 1 << 20
MAX_DIGITS: Final = 4_000
COMPRESSIONS: Final = (".gz", ".zst")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


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
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        if path.is_file() and name.suffix.lower() in endings and not hidden:
            files.append(path)
    if not files:
        raise UserError(
            f"{directory} holds no files of rows",
            rule="a directory of shards holds .parquet, .json or .jsonl files (.gz, .zst)",
            remedy="correct the path",
        )
    return files


def read_rows(path: Path, *, array_column: str | None = None) -> Iterator[tuple[str, Row]]:
    """Each row of a file with its place in it.

    Args:
        path: JSON, JSONL (.gz, .zst) or parquet.
        array_column: take rows that are JSON arrays, as the only column of this name.

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
    try:
        for place, row in _rows_of_parquet(path) if ending == ".parquet" else _rows_of_text(path, ending):
            if array_column is not None and isinstance(row, list):
                row = {array_column: row}
            if not isinstance(row, dict):
                raise _malformed(path, place, f"is a JSON {type(row).__name__}, not an object")
            rows += 1
            yield place, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # pyarrow reports a damaged zstd stream as an OSError without errno.
        if error.errno is None:
            raise _damaged(path, error) from error
        raise
    if not rows:
        raise UserError(f"{path} holds no rows", rule="an input has at least one row", remedy="correct the path")


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


def _rows_of_text(path: Path, ending: str) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        if ending == ".json" and _is_array(file):
            yield from _rows_of_array(path, file)
        elif ending == ".json" and _is_one_object(file):
            text = file.read(MAX_ROW_BYTES + 1)
            if len(text) > MAX_ROW_BYTES:
                raise _malformed(path, "the file", f"is one object of more than {MAX_ROW_BYTES} bytes")
            yield "the file", _parse(path, "the file", text)
        else:
            yield from _rows_of_lines(path, file)


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
    allowance, decoder, number = Allowance(path), json.JSONDecoder(parse_int=_whole_number), 0
    stream = codecs.getreader("utf-8-sig")(file)
    text = _refill(path, stream, "", allowance).lstrip().removeprefix("[")
    first = True
    while True:
        text = text.lstrip() or _refill(path, stream, "", allowance).lstrip()
        if text.startswith("]"):
            break
        if not first:
            if not text.startswith(","):
                raise _malformed(path, "the file", f"is not JSON: no comma after item {number}")
            text = text[1:]
        first, number = False, number + 1
        allowance.spend(LINE_BYTES)
        value, text = _item(path, stream, text, decoder, number, allowance)
        yield f"item {number}", value
    if text[1:].strip() or _refill(path, stream, "", allowance).strip():
        raise _malformed(path, "the file", "is not JSON: more after its array")


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
        except RecursionError as error:
            raise _malformed(path, f"item {number}", f"is not JSON: {error}") from error
        except ValueError as error:
            problem = str(error)[:200]
        if len(text) > MAX_ROW_BYTES:
            raise _malformed(
                path, f"item {number}", f"is longer than {MAX_ROW_BYTES} bytes, or is not JSON: {problem}"
            )
        # Twice as much each time, so that a long item is not read over and over.
        more = _refill(path, stream, text, allowance)
        if len(more) == len(text):
            raise _malformed(path, "the file", f"is not JSON: it ends within item {number}: {problem}")
        text = more


def _refill(path: Path, stream: codecs.StreamReader, text: str, allowance: Allowance) -> str:
    """The text and as much again of the file."""
    try:
        more = stream.read(max(CHUNK_BYTES, len(text)))
    except UnicodeDecodeError as error:
        raise _malformed(path, "the file", f"is not JSON: {str(error)[:200]}") from error
    allowance.spend(len(more))
    return text + more


def _rows_of_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    number, allowance = 0, Allowance(path)
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        allowance.spend(max(len(line), LINE_BYTES))
        if len(line) > MAX_ROW_BYTES:
            raise _malformed(path, f"line {number}", f"is longer than {MAX_ROW_BYTES} bytes")
        if line.strip():
            yield f"line {number}", _parse(path, f"line {number}", line)


def _parse(path: Path, place: str, data: bytes) -> Any:
    try:
        return json.loads(data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"), parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, place, f"is not JSON: {str(error)[:200]}") from error


def _whole_number(digits: str) -> int | str:
    """A number; its digits where there are more than Python converts."""
    return int(digits) if len(digits) <= MAX_DIGITS else digits


def _rows_of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    number = 0
    try:
        for batch in parquet_batches(path):
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


def _malformed(path: Path, place: str, problem: str) -> UserError:
    return UserError(
        f"{path}, {place} {problem}",
        rule="every row is a JSON object",
        remedy="correct or remove it",
    )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged: {str(error)[:200]}",
        rule="a compressed or parquet file must be whole",
        remedy="copy or download it again",
    )
