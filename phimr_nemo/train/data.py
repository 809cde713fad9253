"""Lightning data modules over packed rows (mid-training) and conversations (SFT)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from phimr_nemo.config import SupervisedConfig
from phimr_nemo.data.batches import EpochOrder, Row, collate_packed, collate_padded
from phimr_nemo.data.chat import render_conversation
from phimr_nemo.errors import UserError
from phimr_nemo.store import iter_shards


class RowDataset(Dataset[Row]):
    """Rows in the order of an :class:`EpochOrder`; sample number -> row."""

    def __init__(self, rows: list[Row], order: EpochOrder) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, sample: int) -> Row:
        return self.rows[self.order[sample]]


class SupervisedDataModule(pl.LightningDataModule):
    """Rows kept out for validation, the rest in seeded epochs; Megatron's sampler gives each rank its part.

    Args:
        rows: all rows; the last `config.validation_rows` of a seeded permutation are the validation rows.
        config: batch sizes, epochs and seed.
        collate: rows -> batch.

    Raises:
        UserError: too few rows for one batch, or a validation set that is no whole number of batches.
    """

    def __init__(self, rows: list[Row], config: SupervisedConfig, collate: Any) -> None:
        super().__init__()
        if config.validation_rows % config.global_batch:
            raise UserError(
                f"validation_rows={config.validation_rows} with global_batch={config.global_batch}",
                rule="the validation rows are a whole number of global batches (0 = no validation)",
                remedy=f"use a multiple of {config.global_batch}",
            )
        training = len(rows) - config.validation_rows
        if training * config.epochs < config.global_batch:
            raise UserError(
                f"{config.data} gives {len(rows)} rows, {config.validation_rows} of them for validation",
                rule=f"at least one global batch of {config.global_batch} rows is left for training",
                remedy="bring more data, or lower global_batch or validation_rows",
            )
        mixed = np.random.Generator(np.random.Philox(key=[config.run.seed, len(rows)])).permutation(len(rows))
        order = EpochOrder(training, config.epochs, config.run.seed)
        self.train = RowDataset([rows[i] for i in mixed[:training]], order)
        held_out = [rows[i] for i in sorted(mixed[training:])]
        self.validation = RowDataset(held_out, EpochOrder(max(len(held_out), 1), 1, config.run.seed))
        self.steps = training * config.epochs // config.global_batch
        self.validation_steps = len(held_out) // config.global_batch
        self.collate = collate
        self.data_sampler = MegatronDataSampler(
            seq_len=config.sequence_length,
            micro_batch_size=config.micro_batch,
            global_batch_size=config.global_batch,
            output_log=False,
        )

    def train_dataloader(self) -> DataLoader[Row]:
        """Training micro-batches (Lightning's hook)."""
        return self._loader(self.train, "train")

    def val_dataloader(self) -> DataLoader[Row]:
        """Validation micro-batches (Lightning's hook)."""
        return self._loader(self.validation, "validation")

    def _loader(self, dataset: RowDataset, mode: str) -> DataLoader[Row]:
        loader = DataLoader(dataset, num_workers=0, collate_fn=self.collate)
        loader.mode = mode
        return loader

    # Lightning stores and restores these with every checkpoint: the position in the data is one number.
    def state_dict(self) -> dict[str, int]:
        """How many samples were consumed."""
        done = self.data_sampler.compute_consumed_samples(
            self.trainer.global_step - self.data_sampler.init_global_step
        )
        return {"consumed_samples": done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the consumed samples."""
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.init_global_step = self.trainer.global_step
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)


def packed_data(config: SupervisedConfig, pad_id: int) -> SupervisedDataModule:
    """Mid-training's data: packed rows from a `rows` record directory.

    Raises:
        UserError: the directory is not finished, or holds rows longer than `sequence_length`.
    """
    rows: list[Row] = []
    for table in iter_shards(config.data, "rows"):
        columns = [table.column(name) for name in ("input_ids", "loss_mask", "document_lengths")]
        for ids, mask, lengths in zip(*columns, strict=True):
            rows.append(
                Row(
                    np.asarray(ids.values, dtype=np.int32),
                    np.asarray(mask.values, dtype=np.uint8),
                    np.asarray(lengths.values, dtype=np.int32),
                )
            )
    _check_lengths(rows, config)
    return SupervisedDataModule(rows, config, partial(collate_packed, pad_id=pad_id, capacity=config.sequence_length))


def conversation_data(
    config: SupervisedConfig, tokenizer: PreTrainedTokenizerFast, pad_id: int, *, multiple: int
) -> SupervisedDataModule:
    """SFT's data: one conversation a row from a `conversations` record directory.

    Raises:
        UserError: the directory is not finished, or holds conversations longer than `sequence_length`.
    """
    rows: list[Row] = []
    for table in iter_shards(config.data, "conversations", ["question", "response"]):
        for item in table.to_pylist():
            ids, mask = render_conversation(tokenizer, item["question"], item["response"])
            rows.append(
                Row(
                    np.asarray(ids, dtype=np.int32),
                    np.asarray(mask, dtype=np.uint8),
                    np.asarray([len(ids)], dtype=np.int32),
                )
            )
    _check_lengths(rows, config)
    return SupervisedDataModule(rows, config, partial(collate_padded, pad_id=pad_id, multiple=multiple))


def _check_lengths(rows: list[Row], config: SupervisedConfig) -> None:
    longest = max((len(row.input_ids) for row in rows), default=0)
    if longest > config.sequence_length:
        raise UserError(
            f"{config.data} holds a row of {longest} tokens",
            rule=f"a row has at most sequence_length={config.sequence_length} tokens",
            remedy="raise sequence_length, or curate and pack the data for this length",
        )


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
