"""The reduce of a data step: narrow columns of all shards, sorted out of core and streamed into rules in numpy.

The engine is DuckDB: it reads parquet, spills to the disk under a limit on memory, streams what it has sorted, and is
one package without dependencies. Polars' streaming engine does the same; its memory cannot be limited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import duckdb

Narrow = npt.NDArray[np.void]

MEMORY: Final = "1GiB"
GROUP_ROWS: Final = 1 << 17
"""Rows that are handed on at once, and more where one group has more."""


@contextmanager
def engine(directory: Path, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of bounded memory.

    Args:
        directory: where it spills; no other process's.
        threads: that it uses.
    """
    import duckdb

    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY,
        "threads": threads,
        "temp_directory": str(directory),
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    with duckdb.connect(config=settings) as connection:
        yield connection


def streamed(
    connection: duckdb.DuckDBPyConnection, query: str, dtype: np.dtype[Any], parameters: Mapping[str, Any]
) -> Iterator[Narrow]:
    """The rows of a query in its order, batch by batch.

    Args:
        connection: the engine.
        query: names the columns of `dtype`, in any order.
        dtype: of the rows.
        parameters: of the query.
    """
    found = connection.execute(query, dict(parameters))
    for batch in found.to_arrow_reader(GROUP_ROWS):
        narrow = np.empty(batch.num_rows, dtype)
        for name in dtype.names or ():
            narrow[name] = batch.column(name).to_numpy(zero_copy_only=False)
        yield narrow


def sorted_rows(
    connection: duckdb.DuckDBPyConnection, files: Sequence[Path], dtype: np.dtype[Any], order: str
) -> Iterator[Narrow]:
    """The columns of `dtype` of all rows of parquet files, sorted; every file is read once.

    Args:
        connection: the engine.
        files: with the same columns.
        dtype: of the rows; its names are columns.
        order: by which it is sorted, as in SQL.
    """
    query = f"SELECT {', '.join(dtype.names or ())} FROM read_parquet($files) ORDER BY {order}"
    return streamed(connection, query, dtype, {"files": [str(path) for path in files]})


def whole_groups(parts: Iterable[Narrow], key: str) -> Iterator[Narrow]:
    """Rows that are sorted by `key`, cut anew so that rows of one key come together. Memory is that of a part."""
    held: list[Narrow] = []
    rows = 0
    for part in parts:
        held.append(part)
        rows += len(part)
        if rows < GROUP_ROWS:
            continue
        narrow = np.concatenate(held)
        # The last group may go on in the next part.
        whole = int(np.searchsorted(narrow[key], narrow[key][-1]))
        if whole:
            yield narrow[:whole]
        held, rows = [narrow[whole:]], len(narrow) - whole
    if rows:
        yield np.concatenate(held)


def first_of_runs(*keys: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Of rows that are sorted by keys: for each row the place of the first one with its keys, [rows]."""
    count = len(keys[0])
    starts = np.zeros(count, np.bool_)
    starts[:1] = True
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return np.asarray(np.maximum.accumulate(np.where(starts, np.arange(count), 0)), np.int64)
