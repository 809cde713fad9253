"""Rows by number are the rows in order, read only where they are asked for; bad data is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage_settings import load

from phimr_nemo.data.chat import render_messages
from phimr_nemo.data.rows.batches import EpochOrder
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.store.shards import finish, iter_shards, rows_to_table, write_shard
from phimr_nemo.supervised.data import RowDataset, SupervisedDataModule
from phimr_nemo.supervised.rowsource import ByteCache, Conversations, PackedRows, RecordTable

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


def modules(root: Path, stage: str, questions: list[list[int]]) -> SupervisedDataModule:
    """A stage's data, of rows with documents to these questions: 3 tokens each, the question's number first."""
    rows = [
        {
            "input_ids": [token for number in row for token in (number, 1, 2)],
            "loss_mask": [0, 1, 1] * len(row),
            "document_lengths": [3] * len(row),
            "questions": row,
        }
        for row in questions
    ]
    write_shard(root, 0, rows_to_table(rows, "rows"), kind="rows")
    finish(root, kind="rows", config={})
    config = load(stage, f"data={root}", "global_batch=4", "micro_batch=2", "validation_rows=4", "epochs=2")
    return SupervisedDataModule(PackedRows(root, config.loss_on), config, None)


def test_no_question_is_both_validated_on_and_learnt(tmp_path: Path) -> None:
    """Counted document by document; everything else is learnt, and no row moves."""
    drawn = np.random.default_rng(0).integers(10, 60, size=(30, 3)).tolist()
    module = modules(tmp_path, "midtrain", drawn)
    validated = {int(n) for row in module.validation.rows for n in drawn[row]}
    learnt, seen = set(), set()
    for sample in range(module.train.order.rows):
        row = module.train[sample]
        for place, number in enumerate(drawn[module.train.row_number(sample)]):
            seen.add(number)
            if row.loss_mask[3 * place : 3 * place + 3].any():
                learnt.add(number)
    assert seen & validated
    assert learnt == seen - validated
    training = np.sort(module.train.rows)
    assert sorted([*training, *module.validation.rows]) == list(range(30))
    assert module.unseen_documents == sum(n in validated for row in training for n in drawn[row])
    for sample in range(4):
        assert module.validation[sample].loss_mask.sum() == 6


def test_rows_that_do_not_know_their_questions_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard in range(SHARDS):
        write_shard(tmp_path, shard, rows_to_table(records(shard), "rows"), kind="rows")
    finish(tmp_path, kind="rows", config={})
    config = load("midtrain", f"data={tmp_path}", "global_batch=2", "micro_batch=1", "validation_rows=2")
    module = SupervisedDataModule(PackedRows(tmp_path, "response"), config, None)
    assert module.unseen_documents == 0
    assert "pack the conversations again" in caplog.text


def test_validation_that_leaves_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every question"):
        modules(tmp_path, "midtrain", [[7, 7]] * 12)


def test_what_no_step_trains_on_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """26 rows twice are 13 batches of 4; of 27 rows twice two samples are left."""
    whole = modules(tmp_path / "whole", "midtrain", [[n] for n in range(10, 40)])
    assert (whole.steps, whole.left_over, caplog.text) == (13, 0, "")
    rest = modules(tmp_path / "rest", "midtrain", [[n] for n in range(10, 41)])
    assert (rest.steps, rest.left_over) == (13, 2)
    assert "2 of 27 rows are trained on 1 times instead of 2" in caplog.text


def test_a_conversation_of_several_turns_is_a_row(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(synthetic_corpus())
    history = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows: list[dict[str, Any]] = [
        {"id": "a", "problem_id": "p", "question": "And 1 more?", "response": "5", "history": history},
        {"id": "b", "problem_id": "p", "question": "And 1 more?", "response": "5"},
        {"id": "c", "problem_id": "p", "question": "And 1 more?", "response": "5", "finish_reason": "length"},
    ]
    write_shard(tmp_path, 0, rows_to_table(rows, "conversations"), kind="conversations")
    finish(tmp_path, kind="conversations", config={})
    source = Conversations(tmp_path, tokenizer, "response")
    last = [{"role": "user", "content": "And 1 more?"}, {"role": "assistant", "content": "5"}]
    assert source[0].input_ids.tolist() == render_messages(tokenizer, [*history, *last])[0]
    assert source[1].input_ids.tolist() == render_messages(tokenizer, last)[0]
    assert source[0].loss_mask.sum() == 2 * source[1].loss_mask.sum() == 4
    assert source[2].input_ids.tolist() == source[1].input_ids[:-1].tolist()
    source.check(len(source[0].input_ids), 0, 1)
    with pytest.raises(UserError, match="row 0"):
        source.check(len(source[0].input_ids) - 1, 0, 1)


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
