"""Packing documents of different lengths into rows of one capacity.

:func:`pack` is best-fit decreasing: documents go longest first, each into the fullest row that still has room. All
documents of one length are placed together and rows that are filled alike are kept as one group with a
count, so the work grows with the number of distinct lengths, not of documents times rows.

:func:`pack_mixed` is for rows that are trained on as they are. Best-fit decreasing puts documents of one length into
one row, and where length tells the kind of problem, a step of few rows then sees few kinds
(docs/supervised-ablations.md).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "LONG_SHARE",
    "Document",
    "Indices",
    "Integers",
    "lengths_of",
    "pack",
    "pack_mixed",
    "row_table",
]

Indices = npt.NDArray[np.int64]
Integers = Sequence[int] | npt.NDArray[np.integer]
Document = tuple[Integers, Integers]

_EMPTY: Final = ()
LONG_SHARE: Final = 2
"""A document longer than half of a row is placed by length: no other such one fits beside it. Shorter ones fill the
rest in any order; a larger share placed by length wastes less and mixes less (docs/supervised-ablations.md)."""


@dataclass
class _Group:
    """Rows filled alike.

    Attributes:
        pattern: (length, copies) of the documents in each row, longest first.
        rows: how many rows.
    """

    pattern: tuple[tuple[int, int], ...]
    rows: int


class _OpenRows:
    """Groups of rows by the room they have left, smallest room first."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._groups: dict[int, list[_Group]] = {}

    def add(self, room: int, group: _Group) -> None:
        """File a group under its room."""
        if not group.rows:
            return
        if room not in self._groups:
            bisect.insort(self._rooms, room)
            self._groups[room] = []
        self._groups[room].append(group)

    def take_tightest(self, length: int) -> tuple[int, _Group] | None:
        """Remove the oldest group of the smallest room that holds `length`; None when no row does."""
        position = bisect.bisect_left(self._rooms, length)
        if position == len(self._rooms):
            return None
        room = self._rooms[position]
        groups = self._groups[room]
        group = groups.pop(0)
        if not groups:
            del self._rooms[position], self._groups[room]
        return room, group

    def in_order(self) -> list[_Group]:
        """All groups, fullest rows first."""
        return [group for room in self._rooms for group in self._groups[room]]


def pack(lengths: Integers, capacity: int) -> list[Indices]:
    """Assign documents to rows by best-fit decreasing; the same lengths give the same rows.

    Args:
        lengths: tokens of each document, [documents], each from 1 to `capacity`.
        capacity: tokens a row holds.

    Returns:
        One array of document indices per row, longest document first. Every index occurs exactly once.

    Raises:
        UserError: a document is empty or longer than a row.

    >>> [row.tolist() for row in pack([7, 3, 5, 5], capacity=10)]
    [[2, 3], [0, 1]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    by_length = np.argsort(-sizes, kind="stable")
    distinct, starts, counts = _runs(sizes[by_length])
    open_rows = _OpenRows()
    for length, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        _place(open_rows, length, count, capacity)
    next_document = dict(zip(distinct.tolist(), starts.tolist(), strict=True))
    rows: list[Indices] = []
    for group in open_rows.in_order():
        columns = []
        for length, copies in group.pattern:
            start = next_document[length]
            next_document[length] = start + group.rows * copies
            columns.append(by_length[start : start + group.rows * copies].reshape(group.rows, copies))
        rows.extend(np.hstack(columns))
    return rows


def pack_mixed(lengths: Integers, capacity: int, seed: int) -> list[Indices]:
    """Assign documents to rows so that the short ones of a row are a random draw.

    Documents longer than `capacity / LONG_SHARE` go by best-fit decreasing, then the others in random order, each
    into the fullest row that still has room.

    Args:
        lengths: tokens of each document, [documents], each from 1 to `capacity`.
        capacity: tokens a row holds.
        seed: of the order; the same lengths and seed give the same rows.

    Returns:
        One array of document indices per row. Every index occurs exactly once.

    Raises:
        UserError: a document is empty or longer than a row.

    >>> lengths = [7, 3, 2, 1, 4, 3]
    >>> [sum(lengths[index] for index in row) for row in pack_mixed(lengths, capacity=10, seed=0)]
    [10, 10]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    long = np.flatnonzero(sizes * LONG_SHARE > capacity)
    rows = [long[row].tolist() for row in pack(sizes[long], capacity)]
    rows_of: dict[int, list[int]] = {}
    for row, documents in enumerate(rows):
        rows_of.setdefault(capacity - int(sizes[documents].sum()), []).append(row)
    rooms = sorted(rows_of)
    short = np.flatnonzero(sizes * LONG_SHARE <= capacity)
    for document in np.random.Generator(np.random.Philox(key=seed)).permutation(short).tolist():
        length = int(sizes[document])
        position = bisect.bisect_left(rooms, length)
        if position == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[position]
            row = rows_of[room].pop()
            if not rows_of[room]:
                del rooms[position], rows_of[room]
        rows[row].append(document)
        left = room - length
        if left not in rows_of:
            bisect.insort(rooms, left)
            rows_of[left] = []
        rows_of[left].append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


def _check(sizes: Indices, capacity: int) -> None:
    for fault, bad in (("is empty", sizes < 1), (f"is longer than a row of {capacity}", sizes > capacity)):
        if bad.any():
            index = int(np.argmax(bad))
            raise UserError(
                f"document {index} of {int(sizes[index])} tokens {fault}",
                rule=f"a packed document has 1 to {capacity} tokens",
                remedy="drop it beforehand, or use longer rows (sequence_length)",
            )


def _runs(descending: Indices) -> tuple[Indices, Indices, Indices]:
    """Distinct values of a descending array, where each begins, and how often it occurs."""
    distinct, starts, counts = np.unique(-descending, return_index=True, return_counts=True)
    return -distinct, starts, counts


def _place(open_rows: _OpenRows, length: int, count: int, capacity: int) -> None:
    """Place `count` documents of one length.

    The tightest row takes as many of them as fit before the next row is looked at: each one placed leaves
    that row tighter still, so best fit would choose it again.
    """
    while count:
        room, group = open_rows.take_tightest(length) or (capacity, _Group(_EMPTY, count))
        copies = room // length
        full_rows = min(group.rows, count // copies)
        open_rows.add(room - copies * length, _Group((*group.pattern, (length, copies)), full_rows))
        count -= full_rows * copies
        left = group.rows - full_rows
        if left and count and count < copies:
            open_rows.add(room - count * length, _Group((*group.pattern, (length, count)), 1))
            left -= 1
            count = 0
        if group.pattern:
            open_rows.add(room, _Group(group.pattern, left))


def lengths_of(documents: Sequence[Document]) -> list[int]:
    """Tokens of each document.

    Raises:
        UserError: a document's mask has another length.

    >>> lengths_of([([5, 6, 7], [0, 1, 1]), ([8], [1])])
    [3, 1]
    """
    for index, (ids, mask) in enumerate(documents):
        if len(ids) != len(mask):
            raise UserError(
                f"document {index} has {len(ids)} tokens and a loss mask of {len(mask)}",
                rule="a loss mask has one entry a token",
                remedy="make both with chat.render_conversation",
            )
    return [len(ids) for ids, _ in documents]


def row_table(
    documents: Sequence[Document], rows: Sequence[Indices], questions: Sequence[int] | None = None
) -> pa.Table:
    """Tokenised documents as packed rows.

    Args:
        documents: `(input_ids, loss_mask)` of each, of one length.
        rows: the documents of each row, from :func:`pack` or :func:`pack_mixed`.
        questions: the number of each document's question; None where it is not known.

    Returns:
        A table of kind "rows"; a row holds its documents one after another without padding.
    """
    import pyarrow as pa

    from phimr_nemo.store.shards import conform

    order = [int(index) for row in rows for index in row]
    lengths = np.array([len(documents[index][0]) for index in order], dtype=np.int32)
    documents_before = np.cumsum([0, *(len(row) for row in rows)])
    tokens_before = np.concatenate([[0], np.cumsum(lengths)])[documents_before]
    columns = {
        "input_ids": _lists(tokens_before, [documents[i][0] for i in order], np.int32),
        "loss_mask": _lists(tokens_before, [documents[i][1] for i in order], np.uint8),
        "document_lengths": _lists(documents_before, [lengths], np.int32),
    }
    if questions is not None:
        numbers = np.array([questions[i] for i in order], dtype=np.int64)
        columns["questions"] = _lists(documents_before, [numbers], np.int64)
    return conform(pa.table(columns), "rows")


def _lists(offsets: Indices, pieces: Sequence[Integers], dtype: type[np.generic]) -> pa.ListArray:
    """A list column whose values are the pieces laid end to end."""
    import pyarrow as pa

    values = np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces] or [np.empty(0, dtype)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
