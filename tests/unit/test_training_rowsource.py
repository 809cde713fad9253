"""Rows by number are the rows in order, read only where they are asked for; bad data is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.data.rows.batches import EpochOrder
from phimr_nemo.errors import UserError
from phimr_nemo.store.shards import finish, iter_shards, rows_to_table, write_shard
from phimr_nemo.supervised.data import RowDataset
from phimr_nemo.supervised.rowsource import ByteCache, PackedRows, RecordTable

SHARDS, ROWS = 3, 5


def records(shard: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(shard)
    rows = []
    for _ in range(ROWS):
        lengths = [int(n) for n in rng.integers(2, 9, size=2)]
        ids = [int(n) for n in rng.integers(0, 100, size=sum(lengths))]
        mask = [int(n) for n in rng.integers(0, 2, size=sum(lengths))]
        rows.append({"input_ids": ids, "loss_mask": mask, "document_lengths": lengths})
    return rows


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        write_shard(tmp_path, shard, rows_to_table(records(shard), "rows"), kind="rows")
    finish(tmp_path, kind="rows", config={})
    return tmp_path


def test_rows_by_number_are_the_rows_in_order(directory: Path) -> None:
    source = PackedRows(directory, "response")
    expected = [row for shard in range(SHARDS) for row in records(shard)]
    assert len(source) == len(expected) == sum(t.num_rows for t in iter_shards(directory, "rows"))
    for number in np.random.default_rng(0).permutation(len(expected)):
        row, wanted = source[int(number)], expected[number]
        assert row.input_ids.tolist() == wanted["input_ids"]
        assert row.loss_mask.tolist() == wanted["loss_mask"]
        assert row.document_lengths.tolist() == wanted["document_lengths"]
        assert source.describe(int(number)) == {"row": number, "shard": f"part-{number // ROWS:05d}.parquet"}


def test_loss_on_all_predicts_every_token(directory: Path) -> None:
    assert PackedRows(directory, "all")[4].loss_mask.tolist() == [1] * len(records(0)[4]["input_ids"])


def test_row_groups_of_any_size_are_found(directory: Path) -> None:
    """A shard in groups of two rows: the number is the same."""
    path = directory / "part-00001.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    source = PackedRows(directory, "response")
    assert [source[ROWS + n].input_ids.tolist() for n in range(ROWS)] == [r["input_ids"] for r in records(1)]


def test_a_sample_reads_its_own_row_group_and_no_other(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To start at any sample reads nothing of the samples before it."""
    read: list[int] = []
    right = RecordTable._read

    def noted(self: RecordTable, group: int) -> tuple[pa.Table, int]:
        read.append(group)
        return right(self, group)

    monkeypatch.setattr(RecordTable, "_read", noted)
    source = PackedRows(directory, "response")
    rows = np.arange(len(source))
    dataset = RowDataset(source, rows, EpochOrder(len(source), 1000, seed=3))
    sample = 999 * len(source) + 7
    row = dataset.row_number(sample)
    assert read == []
    assert dataset[sample].input_ids.tolist() == records(row // ROWS)[row % ROWS]["input_ids"]
    assert read == [row // ROWS]


def test_a_row_that_is_too_long_is_refused_whoever_looks_at_it(directory: Path) -> None:
    lengths = [len(row["input_ids"]) for shard in range(SHARDS) for row in records(shard)]
    longest = max(lengths)
    source = PackedRows(directory, "response")
    for share in range(2):
        source.check(longest, share, 2)
    refused = []
    for share in range(2):
        try:
            source.check(longest - 1, share, 2)
        except UserError as error:
            refused.append(error)
    assert refused
    assert f"{longest} tokens (row {lengths.index(longest)})" in refused[0].problem


def test_a_damaged_shard_is_refused_by_the_process_that_looks_at_it(directory: Path) -> None:
    path = directory / "part-00002.parquet"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    source = PackedRows(directory, "response")
    source.check(100, 0, SHARDS)
    with pytest.raises(UserError, match="part-00002"):
        source.check(100, 2, SHARDS)


def test_the_cache_keeps_the_newest_within_its_bytes() -> None:
    cache: ByteCache[str] = ByteCache(10)
    made: list[int] = []

    def get(key: int, size: int) -> str:
        def make() -> tuple[str, int]:
            made.append(key)
            return str(key), size

        return cache.get(key, make)

    assert [get(1, 4), get(2, 4), get(1, 4), get(3, 4)] == ["1", "2", "1", "3"]
    # 2 was used longest ago; a value larger than everything stays alone.
    assert [get(1, 4), get(2, 4), get(9, 99), get(9, 99), get(2, 4)] == ["1", "2", "9", "9", "2"]
    assert made == [1, 2, 3, 2, 9, 2]
