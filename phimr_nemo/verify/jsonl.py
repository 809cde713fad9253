"""JSON lines, plain or compressed, in bounded memory and with errors that name the line."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TextIO

from phimr_nemo.errors import UserError
from phimr_nemo.store.unpacking import BATCH_BYTES, BATCH_ROWS, LINE_BYTES, MAX_ROW_BYTES, Allowance

_COMPRESSIONS: Final = (".gz", ".zst")
_JSON: Final = (".jsonl", ".json", ".ndjson")
_BYTE_ORDER_MARK: Final = "\ufeff"
_UNPACK: Final = {".gz": "gzip -dc", ".zst": "zstd -dc"}
_AS_LINES: Final = (
    "import json, sys; found = json.load(sys.stdin); "
    "[print(json.dumps(row)) for row in (found if isinstance(found, list) else [found])]"
)


def is_json_lines(path: Path) -> bool:
    """Whether a name stands for JSON lines."""
    name = Path(path.stem) if path.suffix in _COMPRESSIONS else path
    return name.suffix in _JSON


@contextlib.contextmanager
def open_json_lines(path: Path, mode: Literal["r", "w"], *, named: Path | None = None) -> Iterator[TextIO]:
    """Open JSON lines for reading ("r") or writing ("w"), compressed as the suffix of `named` (or of `path`) says."""
    suffix = (named or path).suffix
    if suffix == ".gz":
        with gzip.GzipFile(path, f"{mode}b") as packed, io.TextIOWrapper(packed, "utf-8", newline="\n") as stream:
            yield stream
    elif suffix == ".zst":
        import pyarrow as pa

        opened = pa.input_stream if mode == "r" else pa.output_stream
        with opened(str(path), compression="zstd") as raw, io.TextIOWrapper(raw, "utf-8", newline="\n") as stream:
            yield stream
    else:
        with path.open(f"{mode}b") as plain, io.TextIOWrapper(plain, "utf-8", newline="\n") as stream:
            yield stream


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their line numbers, from 1; blank lines are left out.

    Raises:
        UserError: a line is no JSON object or too long, or the file is not what its suffix says or too large.
    """
    for batch in read_batches(path):
        yield from batch


def read_batches(path: Path) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """The rows of a file as `read_rows` gives them, `BATCH_ROWS` or `BATCH_BYTES` at a time.

    Raises:
        UserError: as `read_rows`.
    """
    batch, size = [], 0
    for number, line in _lines(path):
        batch.append((number, _row(path, number, line)))
        size += len(line)
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number, allowance, is_first = 0, Allowance(path), True
    try:
        with open_json_lines(path, "r") as stream:
            while line := stream.readline(MAX_ROW_BYTES + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                allowance.spend(max(len(line), LINE_BYTES))
                if len(line) > MAX_ROW_BYTES:
                    raise _malformed(path, number, f"longer than {MAX_ROW_BYTES} characters")
                if not (text := line.strip()):
                    continue
                if is_first and (text.startswith("[") or text == "{"):
                    raise _one_document(path)
                is_first = False
                yield number, line
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise _malformed(path, number + 1, str(error)) from error


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, number, str(error)) from error
    if not isinstance(row, dict):
        raise _malformed(path, number, f"a {type(row).__name__} instead of an object")
    return row


def _malformed(path: Path, number: int, problem: str) -> UserError:
    return UserError(
        f"{path}, line {number}: {problem}",
        rule="every line is one JSON object in UTF-8",
        remedy="repair or drop this line",
    )


def _one_document(path: Path) -> UserError:
    """The error for a JSON array, or one object over several lines."""
    packed = path.suffix in _COMPRESSIONS
    name = Path(path.stem).stem if packed else path.stem
    feed = f"{_UNPACK[path.suffix] if packed else 'cat'} {shlex.quote(str(path))}"
    target = path.with_name(f"{name}-lines.jsonl")
    return UserError(
        f"{path}, line 1: one JSON document begins instead of JSON lines",
        rule="every line is one JSON object in UTF-8",
        remedy=f"convert it: {feed} | {shlex.join(('python', '-c', _AS_LINES))} > {shlex.quote(str(target))}",
    )


def write_row(stream: TextIO, row: Mapping[str, Any]) -> None:
    """Write one row; text that is no valid Unicode is written escaped, as it came."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row)
    stream.write(text + "\n")
