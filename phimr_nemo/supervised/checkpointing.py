"""The checkpoint store as Lightning wants it: what the strategy saves and loads with, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io.pl import MegatronCheckpointIO

from phimr_nemo.model.files.checkpoints import NEMO_WEIGHTS
from phimr_nemo.model.files.fp8state import read_safely
from phimr_nemo.model.files.plaindata import only_plain_data
from phimr_nemo.training.checkpoint import CheckpointStore
from phimr_nemo.training.seal import checkpoint_name, checkpoint_step, refuse_all_damaged


class StoreIO(MegatronCheckpointIO):
    """Saves into a :class:`CheckpointStore`, and loads the newest checkpoint there that is whole.

    Args:
        store: of the run.
        fp8: whether the run computes in 8 bits.
    """

    def __init__(self, store: CheckpointStore, *, fp8: bool) -> None:
        super().__init__()
        self._store, self._fp8 = store, fp8

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save (collective).

        Raises:
            OSError: the disk is full or the place cannot be written.
        """
        del storage_options
        self._store.write(checkpoint_step(Path(ckpt_to_dir(path))), checkpoint)

    def load_checkpoint(
        self,
        path: Any,
        sharded_state_dict: Any = None,
        map_location: Any | None = None,
        strict: Any | None = None,
    ) -> dict[str, Any]:
        """Load the newest checkpoint beside `path` that is what it was when it was written (collective).

        Raises:
            UserError: none is, or it is no plain data.
        """
        whole = self._store.newest_whole()
        if whole is None:
            refuse_all_damaged(self._store.directory, [f"{path} is gone"])
        with only_plain_data(whole / NEMO_WEIGHTS):
            loaded: dict[str, Any] = super().load_checkpoint(
                whole, sharded_state_dict=sharded_state_dict, map_location=map_location, strict=strict
            )
        read_safely(loaded, fp8=self._fp8, checkpoint=whole)
        return loaded


def validates_now(trainer: pl.Trainer) -> bool:
    """Whether the validation loss is measured after this step: a run that continues here does not do it again."""
    every = trainer.val_check_interval
    return trainer.limit_val_batches > 0 and isinstance(every, int) and trainer.global_step % every == 0


class CheckpointKeeper(pl.Callback):
    """Saves every so many steps, at the end, and when the measure is the best so far; stops a run that has converged.

    It comes after the callbacks that measure and write the metrics.

    Args:
        store: of the run.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._saved = -1

    def save(self, trainer: pl.Trainer) -> None:
        """Save unless this step is saved (collective)."""
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.store.directory / f"{checkpoint_name(self._saved)}.ckpt")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Look at what a killed run left. One that had converged, and died before its export, does not train on."""
        # A resumed run stands at a checkpoint.
        self._saved = trainer.global_step
        self.store.clear_unfinished()
        trainer.should_stop = trainer.should_stop or self.store.judge.has_converged(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Save when it is time; with a validation to come, after it."""
        self.store.finish_writing(wait=False)
        if not validates_now(trainer):
            self._measured(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save when it is time, with what the callbacks learnt from the validation."""
        if trainer.state.fn == "fit":
            self._measured(trainer)

    def _measured(self, trainer: pl.Trainer) -> None:
        """Save the step if it is time or the best so far, and stop if it brought no progress for too long."""
        step = trainer.global_step
        if step % self.store.config.every == 0 or self.store.is_best(step):
            self.save(trainer)
        if self.store.judge.has_converged(step):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save the last step, for a run that is stopped or dies in its export."""
        self.save(trainer)
        self.store.finish_writing(wait=True)
