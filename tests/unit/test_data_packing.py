"""Packing: nothing lost, doubled or overfull; exactly best-fit decreasing; waste within its bound."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.data.packing import lengths_of, pack, pack_mixed, row_table
from phimr_nemo.errors import UserError

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=120)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook algorithm: each length, longest first, into the fullest row that still has room."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@settings(deadline=None)
@given(LENGTHS)
def test_every_document_once_and_no_row_overfull(lengths: list[int]) -> None:
    rows = pack(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= CAPACITY for row in rows)


@settings(deadline=None)
@given(LENGTHS)
def test_rows_are_those_of_the_textbook_algorithm(lengths: list[int]) -> None:
    ours = sorted([lengths[i] for i in row] for row in pack(lengths, CAPACITY))
    # Rows of equal room are interchangeable, so the content may differ; how full they are may not.
    textbook = sorted(best_fit_decreasing(lengths, CAPACITY))
    assert sorted(map(sum, ours)) == sorted(map(sum, textbook))
    assert all(row == sorted(row, reverse=True) for row in ours)


@settings(deadline=None)
@given(st.lists(st.integers(1, CAPACITY // 4), max_size=120))
def test_waste_of_short_documents_is_bounded(lengths: list[int]) -> None:
    """A row is opened only when no other has room, so all but the last are filled beyond 3/4."""
    fills = sorted(sum(lengths[i] for i in row) for row in pack(lengths, CAPACITY))
    assert all(fill > 0.75 * CAPACITY for fill in fills[1:])


@settings(deadline=None)
@given(LENGTHS, st.randoms())
def test_deterministic_and_equally_good_in_any_order(lengths: list[int], rng: random.Random) -> None:
    first, second = pack(lengths, CAPACITY), pack(np.array(lengths, dtype=np.int32), CAPACITY)
    assert [row.tolist() for row in first] == [row.tolist() for row in second]
    shuffled = sorted(lengths, key=lambda _: rng.random())
    fills = sorted(sum(lengths[i] for i in row) for row in first)
    assert sorted(sum(shuffled[i] for i in row) for row in pack(shuffled, CAPACITY)) == fills


def test_waste_on_a_long_tailed_distribution_is_below_one_percent() -> None:
    capacity = 16_384
    drawn = np.random.default_rng(0).lognormal(8.2, 0.8, 20_000)
    lengths = np.clip(drawn, 50, capacity).astype(np.int64)
    rows = pack(lengths, capacity)
    assert 1 - lengths.sum() / (len(rows) * capacity) < 0.01


def test_a_known_case_by_hand() -> None:
    # 7 and 5 open rows; 4 joins 5; the other 4 opens a third; 3 joins 7; 2 joins 4; 1 fills 5+4.
    rows = pack([5, 4, 7, 4, 3, 2, 1], 10)
    assert sorted(sorted([5, 4, 7, 4, 3, 2, 1][i] for i in row) for row in rows) == [[1, 4, 5], [2, 4], [3, 7]]


@pytest.mark.parametrize(("lengths", "message"), [([3, 11], "document 1 of 11"), ([0], "document 0 of 0")])
def test_unfit_documents_are_named(lengths: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(lengths, 10)


def test_no_documents_no_rows() -> None:
    assert pack([], 10) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_packed_rows_hold_every_document_whole(lengths: list[int]) -> None:
    documents = [([100 * i + j for j in range(n)], [(i + j) % 2 for j in range(n)]) for i, n in enumerate(lengths)]
    found = []
    for row in row_table(documents, pack(lengths_of(documents), 12)).to_pylist():
        assert sum(row["document_lengths"]) == len(row["input_ids"]) == len(row["loss_mask"]) <= 12
        start = 0
        for length in row["document_lengths"]:
            found.append((row["input_ids"][start : start + length], row["loss_mask"][start : start + length]))
            start += length
    assert sorted(found) == sorted(documents)


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(UserError, match="loss mask of 1"):
        lengths_of([([1, 2], [1])])


def variance_between_rows(lengths: list[int], rows: list[np.ndarray]) -> float:
    """Share of the variance of the logarithms of the lengths that lies between rows, not within them."""
    logs = np.log(lengths)
    between = sum(len(row) * (logs[row].mean() - logs.mean()) ** 2 for row in rows)
    return float(between / (len(lengths) * logs.var()))


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 3))
def test_mixed_rows_hold_every_document_once_and_none_is_overfull(lengths: list[int], seed: int) -> None:
    rows = pack_mixed(lengths, CAPACITY, seed)
    assert sorted(index for row in rows for index in row.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= CAPACITY for row in rows)
    assert [row.tolist() for row in rows] == [row.tolist() for row in pack_mixed(lengths, CAPACITY, seed)]


@settings(deadline=None)
@given(st.lists(st.integers(CAPACITY // 2 + 1, CAPACITY), max_size=60))
def test_long_documents_are_placed_by_length_alone(lengths: list[int]) -> None:
    assert [row.tolist() for row in pack_mixed(lengths, CAPACITY, 0)] == [
        row.tolist() for row in pack(lengths, CAPACITY)
    ]


def test_short_documents_of_a_mixed_row_are_a_random_draw() -> None:
    """Of documents dealt at random to rows of n, 1/n of the variance lies between rows in expectation."""
    capacity, drawn = 1024, np.random.default_rng(0).lognormal(4.1, 0.5, 3_000)
    lengths = np.clip(drawn, 20, 120).astype(int).tolist()
    mixed, by_length = pack_mixed(lengths, capacity, 0), pack(lengths, capacity)
    a_row = len(lengths) / len(mixed)
    assert variance_between_rows(lengths, mixed) == pytest.approx(1 / a_row, rel=0.4)
    # Best-fit decreasing is what this is not.
    assert variance_between_rows(lengths, by_length) > 0.8
    assert len(mixed) <= 1.02 * len(by_length)


def test_mixed_rows_are_as_full_on_a_long_tailed_distribution() -> None:
    capacity = 16_384
    lengths = np.clip(np.random.default_rng(0).lognormal(8.2, 0.8, 20_000), 50, capacity).astype(np.int64)
    rows = pack_mixed(lengths, capacity, 0)
    assert 1 - lengths.sum() / (len(rows) * capacity) < 0.01
