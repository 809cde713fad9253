"""Rows into tensors: labels never cross documents, padding is never learnt, the order is a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest

from phimr_nemo.data.rows.batches import (
    IGNORED_LABEL,
    EpochOrder,
    Row,
    collate_packed,
    collate_padded,
    next_token_labels,
)


def row(*documents: tuple[list[int], list[int]]) -> Row:
    return Row(
        np.array([t for ids, _ in documents for t in ids], dtype=np.int32),
        np.array([m for _, mask in documents for m in mask], dtype=np.uint8),
        np.array([len(ids) for ids, _ in documents], dtype=np.int32),
    )


X = IGNORED_LABEL


def test_labels_by_hand() -> None:
    # Document 1: 5 6 7 8, response = 7 8: position of 6 predicts 7, of 7 predicts 8. Document 2: 9 4, response 4.
    packed = row(([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 4], [0, 1]))
    assert next_token_labels(packed).tolist() == [X, 7, 8, X, 4, X]


def test_no_label_crosses_a_document_even_when_all_tokens_count() -> None:
    packed = row(([5, 6], [1, 1]), ([7, 8], [1, 1]))
    assert next_token_labels(packed).tolist() == [6, X, 8, X]


def test_padded_by_hand() -> None:
    batch = collate_padded([row(([5, 6, 7], [0, 1, 1])), row(([8, 9], [0, 1]))], pad_id=0, multiple=4)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, X, X], [9, X, X, X]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


def test_padded_refuses_packed_rows() -> None:
    with pytest.raises(ValueError, match="row 0 holds 2 documents"):
        collate_padded([row(([5], [1]), ([6], [1]))], pad_id=0, multiple=1)


def test_packed_by_hand() -> None:
    rows = [row(([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])), row(([4, 3, 2, 1, 5, 6], [0, 1, 1, 1, 1, 1]))]
    batch = collate_packed(rows, pad_id=0, capacity=6)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 9, 0, 4, 3, 2, 1, 5, 6]]
    assert batch["labels"].tolist() == [[6, 7, X, 9, X, X, 3, 2, 1, 5, 6, X]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 5]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6, 12]
    assert batch["max_seqlen"].tolist() == [6]


def test_every_epoch_visits_every_row_once_in_its_own_order() -> None:
    order = EpochOrder(rows=7, epochs=3, seed=5)
    epochs = [[order[7 * e + i] for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_random_access() -> None:
    straight = EpochOrder(rows=7, epochs=3, seed=5)
    expected = [straight[i] for i in range(21)]
    jumping = EpochOrder(rows=7, epochs=3, seed=5)
    assert [jumping[i] for i in reversed(range(21))] == expected[::-1]
    assert [EpochOrder(rows=7, epochs=3, seed=6)[i] for i in range(21)] != expected
