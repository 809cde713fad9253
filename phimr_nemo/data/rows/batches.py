"""Rows -> tensors: padded batches, packed (thd) batches, and a data order that is a function of (seed, epoch)."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

_LOGGER: Final = logging.getLogger(__name__)
IGNORED_LABEL: Final = -100

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One training row: one document, or several packed ones.

    Attributes:
        input_ids: token ids, [tokens].
        loss_mask: 1 where the token is to be predicted, [tokens].
        document_lengths: tokens of each document; they sum to `tokens`.
    """

    input_ids: Int32Array
    loss_mask: npt.NDArray[np.uint8]
    document_lengths: Int32Array


def next_token_labels(row: Row) -> Int64Array:
    """The label of every position: the next token of the same document where it is to be predicted.

    Returns:
        int64 [tokens]; `IGNORED_LABEL` at the last token of each document and before tokens whose loss mask
        is 0, so that no document predicts the first token of the next one.
    """
    labels = np.full(len(row.input_ids), IGNORED_LABEL, dtype=np.int64)
    wanted = row.loss_mask[1:].astype(bool)
    labels[:-1][wanted] = row.input_ids[1:][wanted]
    labels[np.cumsum(row.document_lengths) - 1] = IGNORED_LABEL
    return labels


def collate_padded(rows: Sequence[Row], *, pad_id: int, multiple: int) -> dict[str, torch.Tensor]:
    """Rows of one document each, padded at the end to a common length.

    Args:
        rows: b rows; more than one document in a row would see each other here.
        pad_id: token of the padding; it is never a label, and under causal attention nothing sees it.
        multiple: the common length s is a multiple of this.

    Returns:
        `tokens`, `labels`, `position_ids` int64 [b, s], `loss_mask` float32 [b, s].

    Raises:
        ValueError: a row holds more than one document.
    """
    import torch

    longest = max(len(row.input_ids) for row in rows)
    length = -(-longest // multiple) * multiple
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED_LABEL, dtype=np.int64)
    for index, row in enumerate(rows):
        if len(row.document_lengths) != 1:
            raise ValueError(f"row {index} holds {len(row.document_lengths)} documents; collate_packed is for those")
        tokens[index, : len(row.input_ids)] = row.input_ids
        labels[index, : len(row.input_ids)] = next_token_labels(row)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy((labels != IGNORED_LABEL).astype(np.float32)),
        "position_ids": torch.arange(length).expand(len(rows), length).contiguous(),
    }


def collate_packed(rows: Sequence[Row], *, pad_id: int, capacity: int) -> dict[str, torch.Tensor]:
    """Packed rows laid end to end for variable-length (thd) attention.

    The unused end of a row becomes a document of padding, so every row takes exactly `capacity` tokens and
    the shape is the same in every step.

    Args:
        rows: b rows of at most `capacity` tokens.
        pad_id: token of the padding; never a label.
        capacity: tokens a row.

    Returns:
        `tokens`, `labels`, `position_ids` int64 [1, b * capacity] (positions restart in every document),
        `loss_mask` float32 [1, b * capacity], `cu_seqlens` int32 [documents + 1], `max_seqlen` int32 [1].
    """
    import torch

    total = len(rows) * capacity
    tokens = np.full(total, pad_id, dtype=np.int64)
    labels = np.full(total, IGNORED_LABEL, dtype=np.int64)
    positions = np.zeros(total, dtype=np.int64)
    lengths: list[int] = []
    for index, row in enumerate(rows):
        start = index * capacity
        used = len(row.input_ids)
        tokens[start : start + used] = row.input_ids
        labels[start : start + used] = next_token_labels(row)
        lengths.extend(int(length) for length in row.document_lengths)
        if used < capacity:
            lengths.append(capacity - used)
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    for start, end in itertools.pairwise(boundaries):
        positions[start:end] = np.arange(end - start)
    return {
        "tokens": torch.from_numpy(tokens)[None],
        "labels": torch.from_numpy(labels)[None],
        "loss_mask": torch.from_numpy((labels != IGNORED_LABEL).astype(np.float32))[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seqlens": torch.from_numpy(boundaries.astype(np.int32)),
        "max_seqlen": torch.tensor([max(lengths)], dtype=torch.int32),
    }


def left_over(rows: int, epochs: int, steps: int, batch: int, what: str) -> int:
    """Samples of a run's epochs that no step trains on, said on process 0 where the last batch would not be full.

    Args:
        rows: an epoch.
        epochs: passes over them.
        steps: of the run.
        batch: samples a step.
        what: the samples' name, in the plural.
    """
    missing = rows * epochs - steps * batch
    if 0 < missing < batch and os.environ.get("RANK", "0") == "0":
        often = "not at all" if epochs == 1 else f"{epochs - 1} times instead of {epochs}"
        _LOGGER.warning(
            "%d of %d %s are trained on %s: the last global batch of %d would not be full. A global_batch that "
            "divides %d trains on all of them.",
            *(missing, rows, what, often, batch, rows * epochs),
        )
    return missing


class EpochOrder:
    """Sample number -> row number: every epoch is a permutation that depends on (seed, epoch) alone.

    A resumed run continues at any sample without replaying the ones before it. Epochs follow each other
    without a gap, so a batch may hold the end of one and the start of the next.

    Args:
        rows: rows an epoch.
        epochs: passes over the rows.
        seed: seed of the order.
    """

    def __init__(self, rows: int, epochs: int, seed: int) -> None:
        self.rows, self.epochs, self.seed = rows, epochs, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.rows * self.epochs

    def __getitem__(self, sample: int) -> int:
        epoch, position = divmod(sample, self.rows)
        if epoch != self._epoch:
            self._permutation = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.rows)
            self._epoch = epoch
        return int(self._permutation[position])
