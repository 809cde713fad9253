"""Shards of verdicts as files: their narrow columns, bucket by bucket, and rows of text by number."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.narrow import NARROW, Narrow, narrow_of_file
from phimr_nemo.data.parallel import in_processes
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_bytes, write_json
from phimr_nemo.store.content import file_sha256
from phimr_nemo.store.shards import check_shard, read_manifest, shard_facts

if TYPE_CHECKING:
    import pyarrow as pa

Rows = npt.NDArray[np.int64]

SURVEY_VERSION: Final = 2
"""Another number whenever a narrow column changes meaning: surveys made before are made again."""
BUCKET_ROWS: Final = 1 << 17
READ_ROWS: Final = 1024
MAX_ROLLOUTS: Final = 2**31 - 1


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
        bounds: where each bucket begins and ends in each file, [shards, buckets + 1].
    """

    shards: Sequence[Shard]
    files: Sequence[Path]
    bounds: Rows

    @property
    def rows(self) -> int:
        """Rollouts over all shards."""
        return self.shards[-1].start + self.shards[-1].rows if self.shards else 0

    def buckets(self) -> Iterator[Narrow]:
        """The rollouts of one bucket of problems after the other, in the order of their rows."""
        for bucket in range(self.bounds.shape[1] - 1):
            parts = []
            for number, (shard, path) in enumerate(zip(self.shards, self.files, strict=True)):
                start, end = self.bounds[number, bucket : bucket + 2]
                part = np.array(np.load(path, mmap_mode="r", allow_pickle=False)[start:end])
                part["row"] += shard.start
                parts.append(part)
            yield np.concatenate(parts)


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


def survey(shards: Sequence[Shard], directory: Path, *, quality: bool, workers: int) -> Survey:
    """Take the narrow columns of every shard that has none yet.

    A file is kept when it was made of the same shard with the same settings and has not changed since.

    Args:
        shards: all shards of verdicts.
        directory: where the narrow columns go.
        quality: measure repetition and boxes.
        workers: processes.

    Raises:
        UserError: a shard is missing or damaged (it is named).
    """
    buckets = max(1, -(-(shards[-1].start + shards[-1].rows) // BUCKET_ROWS))
    files = [directory / f"narrow-{number:05d}.npy" for number in range(len(shards))]
    task = partial(_survey_shard, buckets=buckets, quality=quality)
    bounds = in_processes(task, list(zip(shards, files, strict=True)), workers, title="survey")
    return Survey(shards, files, np.array(bounds, np.int64).reshape(len(shards), buckets + 1))


def _survey_shard(work: tuple[Shard, Path], *, buckets: int, quality: bool) -> list[int]:
    """Write the narrow columns of one shard, sorted by bucket; where each bucket begins."""
    shard, path = work
    made_of = {"version": SURVEY_VERSION, "shard": shard.sha256, "buckets": buckets, "quality": quality}
    facts_path = path.with_suffix(".json")
    if facts_path.is_file() and path.is_file():
        facts = _read_facts(facts_path)
        if facts.get("made_of") == made_of and facts.get("sha256") == file_sha256(path):
            return list(facts["bounds"])
    check_shard(shard.path, shard.sha256)
    narrow = narrow_of_file(shard.path, quality=quality)
    bucket = (narrow["problem"] % np.uint64(buckets)).astype(np.int64)
    order = np.argsort(bucket, kind="stable")
    bounds = np.searchsorted(bucket[order], np.arange(buckets + 1)).tolist()
    # Not numpy's own writing into a file: on a full disk it raises an error that does not say so.
    content = io.BytesIO()
    np.save(content, narrow[order].astype(NARROW), allow_pickle=False)
    atomic_write_bytes(path, content.getvalue())
    write_json(facts_path, {"made_of": made_of, "sha256": file_sha256(path), "bounds": bounds})
    return list(bounds)


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
