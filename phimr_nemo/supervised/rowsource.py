"""Rows of a record directory by number: a rank reads what it trains on, when it trains on it, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from phimr_nemo.data.chat import forbidden_tokens, render_conversation, render_messages
from phimr_nemo.data.rows.batches import Row
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import question_number
from phimr_nemo.store.records import Kind, with_optional
from phimr_nemo.store.shards import check_shard, read_manifest

CACHE_BYTES: Final = 256 * 2**20
"""Of decoded row groups, and of rendered conversations, that a process keeps."""

CONVERSATION: Final = ("id", "question", "response", "history", "finish_reason")
"""What is read of a conversation."""

LossOn = Literal["response", "all"]
T = TypeVar("T")


class ByteCache(Generic[T]):
    """The most recently used values, up to a number of bytes (the newest one always stays)."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._values: OrderedDict[int, tuple[T, int]] = OrderedDict()

    def get(self, key: int, make: Callable[[], tuple[T, int]]) -> T:
        """The value of a key; `make` gives it with its size where it is not kept."""
        if key not in self._values:
            self._values[key] = make()
            self._bytes += self._values[key][1]
            while self._bytes > self._limit and len(self._values) > 1:
                _, (_, size) = self._values.popitem(last=False)
                self._bytes -= size
        self._values.move_to_end(key)
        return self._values[key][0]


class RecordTable:
    """The rows of a finished record directory, by number.

    Args:
        directory: the record directory.
        kind: the kind it must hold.
        columns: those that are read.

    Raises:
        UserError: the directory is not finished, of another kind, or a shard is missing.
    """

    def __init__(self, directory: Path, kind: Kind, columns: Sequence[str]) -> None:
        self.directory, self.kind, self.columns = directory, kind, list(columns)
        self._shards = dict(
            sorted(read_manifest(directory, kind).shards.items(), key=lambda item: (len(item[0]), item[0]))
        )
        self._groups: list[tuple[str, int]] = []
        starts, row = [], 0
        for name, sha256 in self._shards.items():
            if not (directory / name).is_file():
                check_shard(directory / name, sha256)
            metadata = pq.read_metadata(directory / name)
            for group in range(metadata.num_row_groups):
                self._groups.append((name, group))
                starts.append(row)
                row += metadata.row_group(group).num_rows
        self._starts, self._rows = np.asarray(starts, dtype=np.int64), row
        self._cache: ByteCache[pa.Table] = ByteCache(CACHE_BYTES)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, pa.Scalar]:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        table = self._cache.get(group, lambda: self._read(group))
        place = row - int(self._starts[group])
        return {name: table.column(name)[place] for name in self.columns}

    def _read(self, group: int) -> tuple[pa.Table, int]:
        name, number = self._groups[group]
        # A file handle of its own each time: worker processes are forked and would share a position.
        with pq.ParquetFile(self.directory / name) as file:
            table = file.read_row_group(number, columns=self.columns, use_threads=False)
        table = with_optional(table, self.kind, self.columns)
        return table, table.nbytes

    def shard_of(self, row: int) -> str:
        """The name of the file that holds a row."""
        return self._groups[int(np.searchsorted(self._starts, row, side="right")) - 1][0]

    def check(self, share: int, shares: int) -> None:
        """Compare every `shares`-th shard with its checksum, from number `share` on.

        Raises:
            UserError: one is damaged.
        """
        for name, sha256 in list(self._shards.items())[share::shares]:
            check_shard(self.directory / name, sha256)

    def column(self, name: str, share: int, shares: int) -> list[tuple[int, pa.Scalar]]:
        """(row, value) of a narrow column, of every `shares`-th row group from number `share` on."""
        found: list[tuple[int, pa.Scalar]] = []
        for group in range(share, len(self._groups), shares):
            shard, number = self._groups[group]
            with pq.ParquetFile(self.directory / shard) as file:
                table = file.read_row_group(number, columns=[name], use_threads=False)
                if not table.num_columns:
                    table = pa.table({name: pa.nulls(file.metadata.row_group(number).num_rows)})
            values = table.column(name)
            found.extend((int(self._starts[group]) + place, value) for place, value in enumerate(values))
        return found


class RowSource(ABC):
    """Training rows by number."""

    table: RecordTable

    def __len__(self) -> int:
        return len(self.table)

    @abstractmethod
    def __getitem__(self, row: int) -> Row: ...

    @abstractmethod
    def questions(self) -> list[tuple[int, ...] | None]:
        """The numbers of the questions of every row's documents, by row; None where they are not known."""

    @abstractmethod
    def check(self, limit: int, share: int, shares: int) -> None:
        """Look at a share of the data before training.

        Args:
            limit: tokens a row may have.
            share, shares: which part this process looks at.

        Raises:
            UserError: a shard is damaged, or a row is too long.
        """

    def describe(self, row: int) -> dict[str, Any]:
        """What names a row to a person: its number, and its shard."""
        return {"row": row, "shard": self.table.shard_of(row)}

    def _refuse(self, row: int, tokens: int, limit: int) -> None:
        raise UserError(
            f"{self.table.directory} holds a row of {tokens} tokens (row {row})",
            rule=f"a row has at most sequence_length={limit} tokens",
            remedy="raise sequence_length, or curate and pack the data for this length",
        )


class PackedRows(RowSource):
    """Packed rows of a `rows` directory.

    Args:
        directory: a finished `rows` record directory.
        loss_on: "response" takes the stored mask, "all" predicts every token that has one before it.

    Raises:
        UserError: the directory is not finished or of another kind.
    """

    def __init__(self, directory: Path, loss_on: LossOn) -> None:
        self.table = RecordTable(directory, "rows", ("input_ids", "loss_mask", "document_lengths"))
        self._loss_on = loss_on

    def __getitem__(self, row: int) -> Row:
        record = self.table[row]
        ids = np.asarray(record["input_ids"].values, dtype=np.int32)
        mask = np.asarray(record["loss_mask"].values, dtype=np.uint8)
        lengths = np.asarray(record["document_lengths"].values, dtype=np.int32)
        return Row(ids, np.ones_like(mask) if self._loss_on == "all" else mask, lengths)

    def questions(self) -> list[tuple[int, ...] | None]:
        """From their own narrow column, which rows of an earlier version do not have."""
        return [
            None if values.as_py() is None else tuple(values.as_py())
            for _, values in self.table.column("questions", 0, 1)
        ]

    def check(self, limit: int, share: int, shares: int) -> None:
        """Checksums, and lengths from their own narrow column."""
        self.table.check(share, shares)
        for row, lengths in self.table.column("document_lengths", share, shares):
            tokens = int(np.asarray(lengths.values).sum())
            if tokens > limit:
                self._refuse(row, tokens, limit)


class Conversations(RowSource):
    """Conversations, rendered when they are asked for; one document a row, with the turns before its question.

    Args:
        directory: a finished `conversations` record directory.
        tokenizer: of the model.
        loss_on: "response" leaves the prompt out of the loss, "all" predicts it as well.

    Raises:
        UserError: the directory is not finished or of another kind.
    """

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn) -> None:
        self.table = RecordTable(directory, "conversations", CONVERSATION)
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._cache: ByteCache[Row] = ByteCache(CACHE_BYTES)

    def __getitem__(self, row: int) -> Row:
        return self._cache.get(row, lambda: self._render(row))

    def _render(self, number: int) -> tuple[Row, int]:
        record = self.table[number]
        question, response, history = (record[name].as_py() for name in ("question", "response", "history"))
        last = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        is_cut = record["finish_reason"].as_py() == "length"
        ids, mask = render_messages(self._tokenizer, [*(history or ()), *last], cut_off=is_cut)
        row = Row(
            np.asarray(ids, dtype=np.int32),
            np.asarray([1] * len(mask) if self._loss_on == "all" else mask, dtype=np.uint8),
            np.asarray([len(ids)], dtype=np.int32),
        )
        return row, row.input_ids.nbytes + row.loss_mask.nbytes

    def questions(self) -> list[tuple[int, ...] | None]:
        """One question a row, the last of the conversation."""
        return [(question_number(question.as_py()),) for _, question in self.table.column("question", 0, 1)]

    def describe(self, row: int) -> dict[str, Any]:
        """With the conversation's id."""
        return {**super().describe(row), "id": self.table[row]["id"].as_py()}

    def check(self, limit: int, share: int, shares: int) -> None:
        """Checksums, texts that spell a special token, and the lengths of those that could be too long: a token has
        at least one byte."""
        self.table.check(share, shares)
        overhead = len(render_conversation(self._tokenizer, "", "")[0])
        specials = forbidden_tokens(self._tokenizer)
        for number in range(share, len(self), shares):
            record = self.table[number]
            turns = record["history"].as_py() or ()
            text = "".join([record["question"].as_py(), record["response"].as_py(), *(t["content"] for t in turns)])
            if turns or len(text.encode()) + overhead > limit or any(token in text for token in specials):
                tokens = len(self[number].input_ids)
                if tokens > limit:
                    self._refuse(number, tokens, limit)
