"""Lightning data modules over packed rows (mid-training) and conversations (SFT)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from phimr_nemo.config import SupervisedConfig
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.rows.batches import EpochOrder, Int64Array, Row, collate_packed, collate_padded, left_over
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.supervised.rowsource import Conversations, PackedRows, RowSource
from phimr_nemo.training.throughput import counted

_LOGGER: Final = logging.getLogger(__name__)
Mask = npt.NDArray[np.bool_]

LENGTH_MULTIPLE: Final = 16
"""Padded lengths that suit FP8 and sequence parallelism on the GPU."""


def training_steps(config: SupervisedConfig, rows: int) -> int:
    """Optimizer steps of a whole run.

    Args:
        config: of the stage.
        rows: of its data, those for validation included.

    Raises:
        UserError: too few rows for one batch.
    """
    steps = (rows - config.validation_rows) * config.epochs // config.global_batch
    if steps < 1:
        raise UserError(
            f"{config.data} gives {rows} rows, {config.validation_rows} of them for validation",
            rule=f"at least one global batch of {config.global_batch} rows is left for training",
            remedy="bring more data, or lower global_batch or validation_rows",
        )
    return min(steps, config.max_steps) if config.max_steps else steps


class RowDataset(Dataset[Row]):
    """Some rows of a source in the order of an :class:`EpochOrder`; sample number -> row.

    A sample's row is computed, never searched for: to skip to any sample costs nothing.

    Args:
        source: all rows.
        rows: the numbers of those that belong here.
        order: sample number -> place in `rows`.
        unseen: row -> which of its documents are not to be learnt from, [documents] bool.
    """

    def __init__(
        self, source: RowSource, rows: Int64Array, order: EpochOrder, unseen: Mapping[int, Mask] | None = None
    ) -> None:
        self.source, self.rows, self.order, self.unseen = source, rows, order, unseen or {}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, sample: int) -> Row:
        number = self.row_number(sample)
        row = self.source[number]
        if number not in self.unseen:
            return row
        learnt = np.repeat(~self.unseen[number], row.document_lengths)
        return replace(row, loss_mask=row.loss_mask * learnt.astype(np.uint8))

    def row_number(self, sample: int) -> int:
        """The number of a sample's row in the source."""
        return int(self.rows[self.order[sample]])


class SupervisedDataModule(pl.LightningDataModule):
    """Rows kept out for validation, the rest in seeded epochs; Megatron's sampler gives each rank its part.

    No question of a validation row is learnt from: other documents to it keep their places in the rows for training,
    and have no loss.

    Attributes:
        unseen_documents: how many those are.
        left_over: samples of the epochs that no step trains on.

    Args:
        source: all rows; the last `config.validation_rows` of a seeded permutation are the validation rows.
        config: batch sizes, epochs and seed.
        collate: rows -> batch.

    Raises:
        UserError: too few rows for one batch, or nothing to learn that is not validated on.
    """

    def __init__(self, source: RowSource, config: SupervisedConfig, collate: Any) -> None:
        super().__init__()
        count = len(source)
        self.steps = training_steps(config, count)
        training = count - config.validation_rows
        # Every process looks at its part of the data before anything is trained.
        source.check(config.sequence_length, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        mixed = np.random.Generator(np.random.Philox(key=[config.run.seed, count])).permutation(count)
        held_out = np.sort(mixed[training:])
        unseen = _unseen(source, mixed[:training], held_out)
        self.unseen_documents = sum(int(documents.sum()) for documents in unseen.values())
        order = EpochOrder(training, config.epochs, config.run.seed)
        self.left_over = left_over(training, config.epochs, self.steps, config.global_batch, "rows")
        self.train = RowDataset(source, mixed[:training], order, unseen)
        self.validation = RowDataset(source, held_out, EpochOrder(max(len(held_out), 1), 1, config.run.seed))
        self.validation_steps = len(held_out) // config.global_batch
        self.collate = counted(collate)
        self.workers, self.global_batch = config.data_workers, config.global_batch
        self.data_sampler = MegatronDataSampler(
            seq_len=config.sequence_length,
            micro_batch_size=config.micro_batch,
            global_batch_size=config.global_batch,
            output_log=False,
        )

    def batch_rows(self, step: int) -> list[dict[str, Any]]:
        """What names the rows of a step's global batch (steps count from 1)."""
        samples = range((step - 1) * self.global_batch, step * self.global_batch)
        return [self.train.source.describe(self.train.row_number(sample)) for sample in samples]

    def train_dataloader(self) -> DataLoader[Row]:
        """Training micro-batches (Lightning's hook)."""
        return self._loader(self.train, "train")

    def val_dataloader(self) -> DataLoader[Row]:
        """Validation micro-batches (Lightning's hook)."""
        return self._loader(self.validation, "validation")

    def _loader(self, dataset: RowDataset, mode: str) -> DataLoader[Row]:
        loader = DataLoader(
            dataset,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )
        loader.mode = mode
        return loader

    # Lightning stores and restores these with every checkpoint: the position in the data is one number.
    def state_dict(self) -> dict[str, int]:
        """How many samples were consumed."""
        return {"consumed_samples": self.trainer.global_step * self.global_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the consumed samples."""
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        # The trainer's own step is restored later than this is called.
        self.data_sampler.init_global_step = consumed // self.global_batch
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)


def _unseen(source: RowSource, training: Int64Array, held_out: Int64Array) -> dict[int, Mask]:
    """The documents of rows for training whose question a validation row has: row -> [documents]."""
    if not len(held_out):
        return {}
    questions = source.questions()
    if any(questions[row] is None for row in held_out):
        _LOGGER.warning(
            "%s does not say which questions its rows are about: the validation loss may be of questions that are "
            "trained on; pack the conversations again",
            source.table.directory,
        )
        return {}
    validated = {number for row in held_out for number in questions[row] or ()}
    found = {int(row): np.array([number in validated for number in questions[row] or ()]) for row in training}
    unseen = {row: documents for row, documents in found.items() if documents.any()}
    if len(unseen) == len(training) and all(documents.all() for documents in unseen.values()):
        raise UserError(
            f"every question of {source.table.directory} is one of its {len(held_out)} validation rows'",
            rule="no question is both trained on and validated on",
            remedy="set validation_rows=0, or bring more questions",
        )
    return unseen


def midtrain_data(config: SupervisedConfig) -> SupervisedDataModule:
    """Mid-training's data: packed rows from a `rows` record directory.

    Raises:
        UserError: no base directory; the data's is not finished, or holds rows longer than `sequence_length`.
    """
    require_parent(config.base)
    pad_id = Architecture.from_directory(config.base).pad_token_id
    collate = partial(collate_packed, pad_id=pad_id, capacity=config.sequence_length)
    return SupervisedDataModule(PackedRows(config.data, config.loss_on), config, collate)


def sft_data(config: SupervisedConfig) -> SupervisedDataModule:
    """SFT's data: one conversation a row from a `conversations` record directory.

    Raises:
        UserError: no base directory; the data's is not finished, or holds conversations longer than
            `sequence_length`.
    """
    require_parent(config.base)
    pad_id = Architecture.from_directory(config.base).pad_token_id
    multiple = LENGTH_MULTIPLE * (config.parallel.tensor if config.parallel.sequence else 1)
    if config.overlap.tensor:
        # Exchange is overlapped in buffers of one size: every micro-batch is as long as the longest may be.
        multiple = config.sequence_length
    collate = partial(collate_padded, pad_id=pad_id, multiple=multiple)
    source = Conversations(config.data, load_tokenizer(config.base), config.loss_on)
    return SupervisedDataModule(source, config, collate)


def require_parent(path: Path) -> None:
    """Fail early when the base directory is absent.

    Raises:
        UserError: `path` is no directory.
    """
    if not path.is_dir():
        raise UserError(
            f"base={path} does not exist",
            rule="a stage starts from the Hugging Face directory that the stage before it wrote",
            remedy="run the preceding stage first, or correct base=",
        )
