"""Shards of verdicts as files: their narrow columns, sorted by problem out of core, and rows of text by number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.lengths import TokenCounter
from phimr_nemo.data.curate.narrow import NARROW, Narrow, codes, narrow_of_file
from phimr_nemo.data.outofcore import engine, sorted_rows, whole_groups
from phimr_nemo.data.parallel import ALONE, Team
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_file, scratch_directory, write_json
from phimr_nemo.store.content import file_sha256
from phimr_nemo.store.shards import check_shard, read_manifest, shard_facts

if TYPE_CHECKING:
    import pyarrow as pa

Rows = npt.NDArray[np.int64]

SURVEY_VERSION: Final = 3
"""Another number whenever a narrow column changes meaning: surveys made before are made again."""
READ_ROWS: Final = 1024
MAX_ROLLOUTS: Final = 2**31 - 1
SHOWN_TEACHERS: Final = 20
SORT_DIRECTORY: Final = "sort"


@dataclass(frozen=True)
class Shard:
    """A shard of verdicts.

    Attributes:
        path: the parquet file.
        sha256: what the manifest says of it.
        start: the number of its first row over all shards.
        rows: how many rows it has.
    """

    path: Path
    sha256: str
    start: int
    rows: int


@dataclass(frozen=True)
class Survey:
    """The narrow columns of every shard.

    Attributes:
        shards: the shards of verdicts.
        files: the narrow columns of each.
        threads: of the reduce.
    """

    shards: Sequence[Shard]
    files: Sequence[Path]
    threads: int = 1

    @property
    def rows(self) -> int:
        """Rollouts over all shards."""
        return self.shards[-1].start + self.shards[-1].rows if self.shards else 0

    def buckets(self) -> Iterator[Narrow]:
        """All rollouts of some problems, then of others, in memory that does not grow with the rollouts.

        Those of one problem follow each other in the order of their rows.
        """
        with (
            scratch_directory(self.files[0].parent / SORT_DIRECTORY) as directory,
            engine(directory, self.threads) as connection,
        ):
            yield from whole_groups(sorted_rows(connection, self.files, NARROW, "problem, row"), "problem")


def shards_of(directories: Sequence[Path]) -> list[Shard]:
    """The shards of finished directories of verdicts, in order.

    Raises:
        UserError: a directory is not finished, or holds no row.
    """
    shards: list[Shard] = []
    start = 0
    for directory in directories:
        named = read_manifest(directory, "verdicts").shards
        for name in sorted(named, key=lambda name: (len(name), name)):
            rows = shard_facts(directory / name)["rows"]
            shards.append(Shard(directory / name, named[name], start, rows))
            start += rows
    if not 0 < start <= MAX_ROLLOUTS:
        raise UserError(
            f"{[str(path) for path in directories]} hold {start or 'no'} verdicts",
            rule=f"curation takes 1 to {MAX_ROLLOUTS:,} verdicts at once",
            remedy="look at the step that wrote them, or curate them in parts",
        )
    return shards


def survey(
    shards: Sequence[Shard],
    directory: Path,
    *,
    counter: TokenCounter,
    workers: int,
    team: Team = ALONE,
) -> Survey:
    """Take the narrow columns of every shard that has none yet.

    A file is kept when it was made of the same shard with the same settings and has not changed since.

    Args:
        shards: all shards of verdicts.
        directory: where the narrow columns go.
        counter: of the tokens in training.
        workers: processes.
        team: the processes that share the work.

    Raises:
        UserError: a shard is missing or damaged (it is named).
    """
    files = [directory / f"narrow-{number:05d}.parquet" for number in range(len(shards))]
    work = list(zip(shards, files, strict=True))
    team.share(
        partial(_survey_shard, counter=counter),
        work,
        is_done=lambda item: _facts_of(item[1]).get("made_of") == _made_of(item[0], counter),
        workers=workers,
        title="survey",
    )
    return Survey(shards, files, workers)


def _made_of(shard: Shard, counter: TokenCounter) -> dict[str, Any]:
    return {
        "version": SURVEY_VERSION,
        "shard": shard.sha256,
        "start": shard.start,
        "tokenizer": counter.sha256,
        "limits": [counter.limit, counter.prompt_limit],
    }


def _survey_shard(work: tuple[Shard, Path], *, counter: TokenCounter) -> None:
    """Write the narrow columns of one shard, in the order of its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard, path = work
    made_of, facts = _made_of(shard, counter), _facts_of(path)
    if facts.get("made_of") == made_of and path.is_file() and facts.get("sha256") == file_sha256(path):
        return
    check_shard(shard.path, shard.sha256)
    narrow = narrow_of_file(shard.path, counter)
    narrow["row"] += shard.start
    with atomic_file(path) as temporary:
        pq.write_table(pa.table({name: narrow[name].copy() for name in NARROW.names or ()}), temporary)
    write_json(path.with_suffix(".json"), {"made_of": made_of, "sha256": file_sha256(path)})


def _facts_of(path: Path) -> dict[str, Any]:
    facts = path.with_suffix(".json")
    return _read_facts(facts) if facts.is_file() else {}


def measured(shards: Sequence[Shard], files: Sequence[Path], rows: Rows, name: str) -> npt.NDArray[Any]:
    """One narrow column of some rows, in the order asked for."""
    import pyarrow.parquet as pq

    starts = np.array([shard.start for shard in shards])
    numbers = np.searchsorted(starts, rows, side="right") - 1
    values = np.empty(len(rows), NARROW[name])
    for number in np.unique(numbers):
        own = numbers == number
        column = pq.read_table(files[number], columns=[name]).column(name).to_numpy()
        values[own] = column[rows[own] - shards[number].start]
    return values


def teacher_codes(shards: Sequence[Shard], names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Whose each rollout is: the place of its teacher in `names`, their number for another's, [rows].

    Raises:
        UserError: a shard is missing or damaged (it is named), or a name is no rollout's.
    """
    import pyarrow.parquet as pq

    found, parts = set[str](), []
    for shard in shards:
        check_shard(shard.path, shard.sha256)
        column = pq.read_table(shard.path, columns=["teacher"]).column("teacher")
        found.update(column.unique().to_pylist())
        parts.append(codes(column, names))
    absent = [name for name in names if name not in found]
    if absent:
        raise UserError(
            f"no rollout of {' and none of '.join(absent)}",
            rule=f"a teacher is named as the rollouts name it: {', '.join(sorted(found)[:SHOWN_TEACHERS])}",
            remedy="use one of these names, or add the directory with the other's verdicts to verdicts=[...]",
        )
    return np.concatenate(parts)


def _read_facts(path: Path) -> dict[str, Any]:
    """What is known of a survey; nothing when the file is damaged, so that it is made again."""
    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def gather(shards: Sequence[Shard], rows: Rows, columns: Sequence[str]) -> pa.Table:
    """Some rows of the verdicts, in the order asked for. Memory is that of these rows and of one batch.

    Args:
        shards: all shards of verdicts.
        rows: numbers over all shards, distinct, at least one.
        columns: the columns to read.

    Raises:
        UserError: a shard is missing or damaged (it is named).
    """
    import pyarrow as pa

    wanted = np.sort(rows)
    starts = np.array([shard.start for shard in shards])
    batches: list[pa.RecordBatch] = []
    for number in np.unique(np.searchsorted(starts, wanted, side="right") - 1):
        shard = shards[number]
        first, last = np.searchsorted(wanted, [shard.start, shard.start + shard.rows])
        check_shard(shard.path, shard.sha256)
        batches += _read_rows(shard.path, wanted[first:last] - shard.start, columns)
    table = pa.Table.from_batches(batches)
    return table.take(np.argsort(np.argsort(rows))) if (rows[1:] < rows[:-1]).any() else table


def _read_rows(path: Path, local: Rows, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        start = 0
        for batch in file.iter_batches(READ_ROWS, columns=list(columns)):
            first, last = np.searchsorted(local, [start, start + batch.num_rows])
            if last > first:
                yield batch.take(local[first:last] - start)
            start += batch.num_rows
            if last == len(local):
                return
