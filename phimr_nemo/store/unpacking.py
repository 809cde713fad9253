"""Compressed rows in bounded memory: by bytes, since a file of a kilobyte can stand for gigabytes.

A parquet file repeats a value as often as it likes for a few bytes, in many rows or in one. Texts are therefore read
as parquet's own dictionaries, each value once, and counted before they are unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROW_BYTES: Final = 16 << 20
"""Brackets of JSON take twenty times as much as Python objects."""

BATCH_BYTES: Final = 64 << 20
BATCH_ROWS: Final = 1024
MAX_GROUP_BYTES: Final = 2 << 30
"""Of one row group before it is split into rows; writers make groups of some hundred megabytes at most."""

FREE_BYTES: Final = 256 << 20
MAX_RATIO: Final = 1000
"""gzip reaches it on zeros only; text comes to about 10, and to 100 where rows repeat."""

VALUE_BYTES: Final = 64
"""What a value takes at least once it is a Python object."""

LINE_BYTES: Final = 256
"""What a line of JSON counts at least: reading it takes as long as copying so much."""


class Allowance:
    """How much a file may still unpack to: `MAX_RATIO` times its size, and `FREE_BYTES` in any case.

    Args:
        path: the file.
        size: of the part of it that is read, in bytes; None = all.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        whole = path.stat().st_size
        # A file may say anything of its parts.
        self._path, self._size = path, whole if size is None else min(size, whole)
        self._limit = max(FREE_BYTES, MAX_RATIO * self._size)
        self._used = 0

    def spend(self, count: int) -> None:
        """Count unpacked bytes.

        Raises:
            UserError: they are too many for such a file.
        """
        self._used += count
        if self._used > self._limit:
            raise UserError(
                f"{self._path}, of {self._size:,} bytes, unpacks to more than {self._limit:,} bytes",
                rule=f"a file unpacks to at most {MAX_RATIO:,} times its size, or {FREE_BYTES >> 20} MiB",
                remedy="do not use this file unless you know where it comes from; then store it without compression",
            )


def parquet_batches(path: Path, start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file in batches of at most `BATCH_ROWS` rows and, unpacked, `BATCH_BYTES` or one row.

    Args:
        path: the file.
        start, stop: the row groups to read; None = to the last.

    Raises:
        UserError: a row, a row group or the file unpacks to too much.
        pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError: it is damaged.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        leaves = [file.schema.column(index) for index in range(len(file.schema))]
        everything = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    groups = everything[start:stop]
    part = None if len(groups) == len(everything) else sum(map(compressed_bytes, groups))
    allowance, row = Allowance(path, part), sum(group.num_rows for group in everything[:start])
    columns = [[group.column(index) for group in groups] for index in range(len(leaves))]
    texts = [leaf.path for leaf, chunks in zip(leaves, columns, strict=True) if _is_repeated_text(leaf, chunks)]
    Allowance(path, part).spend(VALUE_BYTES * sum(chunk.num_values for chunks in columns for chunk in chunks))
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for index, group in enumerate(groups):
            size = sum(_stated_bytes(chunks[index]) for chunks in columns)
            if size > MAX_GROUP_BYTES:
                raise _too_long(path, f"row group {start + index + 1}", MAX_GROUP_BYTES)
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // max(size, 1)))
            for batch in file.iter_batches(rows, row_groups=[start + index]):
                for rows_at_once in _parts(batch, path, row):
                    allowance.spend(max(unpacked_bytes(rows_at_once), LINE_BYTES * rows_at_once.num_rows))
                    yield rows_at_once.cast(schema)
                row += batch.num_rows


def compressed_bytes(group: Any) -> int:
    """What a row group takes in its file."""
    return sum(int(group.column(index).total_compressed_size) for index in range(group.num_columns))


def _is_repeated_text(leaf: Any, chunks: Sequence[Any]) -> bool:
    """Whether a column's values are texts that stand in a dictionary of the file's."""
    encodings = {encoding for chunk in chunks for encoding in chunk.encodings}
    is_text = leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"
    return is_text and any(encoding.endswith("DICTIONARY") for encoding in encodings)


def _stated_bytes(column: Any) -> int:
    """What a column takes by the file's own words: its pages, or its numbers, which a page can repeat for nothing."""
    width = 0 if column.physical_type == "BYTE_ARRAY" else 8
    return max(int(column.total_uncompressed_size), width * int(column.num_values))


def _parts(batch: pa.RecordBatch, path: Path, row: int) -> Iterator[pa.RecordBatch]:
    """A batch, halved until every part fits into `BATCH_BYTES`.

    Args:
        batch: rows with texts as dictionaries.
        path: where from.
        row: rows of the file before this batch.
    """
    size = unpacked_bytes(batch)
    if size > MAX_ROW_BYTES and batch.num_rows == 1:
        raise _too_long(path, f"row {row + 1}", MAX_ROW_BYTES)
    if size <= BATCH_BYTES:
        yield batch
    else:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half), path, row)
        yield from _parts(batch.slice(half), path, row + half)


def unpacked_bytes(values: Any) -> int:
    """How many bytes a batch or an array takes when each value stands for itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(values, pa.RecordBatch):
        return sum(unpacked_bytes(column) for column in values.columns)
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(values.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(values.indices)).as_py() or 0) + VALUE_BYTES * len(values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return unpacked_bytes(values.flatten()) + VALUE_BYTES * len(values)
    if pa.types.is_map(kind):
        first, last = values.offsets[0].as_py(), values.offsets[-1].as_py()
        parts = (values.keys, values.items)
        return sum(unpacked_bytes(part.slice(first, last - first)) for part in parts) + VALUE_BYTES * len(values)
    if pa.types.is_struct(kind):
        return sum(unpacked_bytes(field) for field in values.flatten()) + VALUE_BYTES * len(values)
    return max(int(values.nbytes), VALUE_BYTES * len(values))


def _too_long(path: Path, place: str, limit: int) -> UserError:
    return UserError(
        f"{path}, {place} unpacks to more than {limit:,} bytes",
        rule=f"a row has at most {MAX_ROW_BYTES:,} bytes, and a row group of parquet {MAX_GROUP_BYTES:,}",
        remedy="do not use this file unless you know where it comes from; then write it in smaller row groups",
    )


MAX_CONFIG_BYTES: Final = 4 << 20
"""A model's configuration, with LongRoPE's factors, has some kilobytes; an index of shards a few hundred."""

MAX_TOKENIZER_BYTES: Final = 128 << 20
"""Those of a vocabulary of 200,000 entries have 16 million."""


def read_json(file: Path, *, limit: int = MAX_CONFIG_BYTES) -> Any:
    """The content of a JSON file.

    Args:
        file: to read.
        limit: bytes that it has at most.

    Raises:
        ValueError: it is longer, no JSON, nested too deeply, or no UTF-8.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
