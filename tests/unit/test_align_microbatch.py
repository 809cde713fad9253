"""Micro-batches lose nothing, pad little and are dealt evenly."""

from __future__ import annotations

import pytest
import torch

from phimr_nemo.align.microbatch import (
    MicroBatch,
    by_sequence,
    chunks_by_length,
    cut,
    deal_rows,
    trimmed_width,
    used_lengths,
)
from phimr_nemo.losses import IGNORED_LABEL


def test_used_length_ends_at_the_last_label() -> None:
    no = IGNORED_LABEL
    labels = torch.tensor([[no, 5, no, 7, no], [no] * 5, [3, no, no, no, no], [1, 1, 1, 1, 0]])
    assert used_lengths(labels).tolist() == [4, 0, 1, 5]


def test_chunks_hold_every_row_once_longest_first() -> None:
    lengths = torch.tensor([3, 9, 1, 9, 4, 2, 8])
    chunks = chunks_by_length(lengths, 3)
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    order = torch.cat(chunks)
    assert sorted(order.tolist()) == list(range(7))
    assert lengths[order].tolist() == sorted(lengths.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("lengths", "width", "multiple", "expected"),
    [([3, 5], 9, 1, 5), ([0, 0], 9, 1, 1), ([3, 5], 9, 4, 8), ([9], 9, 4, 12), ([9], 9, 2, 10)],
)
def test_width_is_the_longest_row_in_multiples(lengths: list[int], width: int, multiple: int, expected: int) -> None:
    assert trimmed_width(torch.tensor(lengths), width, multiple) == expected


def test_cut_shortens_and_fills() -> None:
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert cut(rows, 2, -1).tolist() == [[1, 2], [4, 5]]
    assert cut(rows, 5, -1).tolist() == [[1, 2, 3, -1, -1], [4, 5, 6, -1, -1]]


@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_dealing_is_even_complete_and_blind_to_the_layout(rows: int, parts: int) -> None:
    """In rows and in tokens, of which two ranks differ by no more than a row; a few are far longer than the rest."""
    lengths = [(7 * row) % 11 + (100 if row % 5 == 0 else 1) for row in range(rows)]
    alone = deal_rows(lengths, parts, 1, seed=4)
    assert sorted(number for part in alone for number in part[0]) == list(range(rows))
    assert max(len(part[0]) for part in alone) - min(len(part[0]) for part in alone) <= 1
    for ranks in (2, 4):
        shared = deal_rows(lengths, parts, ranks, seed=4)
        for part, whole in zip(shared, alone, strict=True):
            assert sorted(number for rank in part for number in rank) == sorted(whole[0])
            sizes = [len(rank) for rank in part]
            assert max(sizes) - min(sizes) <= 1
            tokens = [sum(lengths[number] for number in rank) for rank in part]
            assert max(tokens) - min(tokens) <= max((lengths[number] for number in whole[0]), default=0)


def test_dealing_depends_on_the_seed() -> None:
    lengths = [1] * 50
    assert deal_rows(lengths, 2, 1, seed=1) == deal_rows(lengths, 2, 1, seed=1) != deal_rows(lengths, 2, 1, seed=2)


def test_packed_values_are_taken_apart_again() -> None:
    """Three sequences and the padding behind them, as rows filled with zeros; each keeps its own gradient."""
    values = torch.arange(1.0, 9.0)[None].requires_grad_()
    micro = MicroBatch(torch.zeros(1, 8), torch.zeros(1, 8), documents=(3, 1, 2, 2))
    rows = by_sequence(values, micro, 3)
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    (rows * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1, 1, 1, 10, 100, 100, 0, 0]]
    padded = torch.ones(2, 4)
    assert by_sequence(padded, MicroBatch(padded, padded), 2) is padded
