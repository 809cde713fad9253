"""Native checkpoints of stages 1 and 2: Megatron's distributed format, sealed, written at once or beside training."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from nemo.lightning.ckpt_utils import WEIGHTS_PATH, ckpt_to_dir
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from phimr_nemo.config import SupervisedCheckpointConfig
from phimr_nemo.model.files.plaindata import only_plain_data
from phimr_nemo.store.atomic import write_json
from phimr_nemo.training import platform
from phimr_nemo.training.seal import (
    checkpoint_name,
    checkpoint_step,
    checkpoints,
    damaged_files,
    file_facts,
    is_sealed,
    refuse_all_damaged,
    remove_checkpoint,
    usable_checkpoints,
    write_seal,
)

BEST_FILE: Final = "best.json"
DRAIN_SECONDS: Final = 60.0
"""How long the writers' results may take through the pipe after the writers have ended."""

_LOGGER: Final = logging.getLogger(__name__)


class SealedCheckpointIO(MegatronCheckpointIO):
    """Megatron's distributed checkpoints, sealed when they are whole, and checked before they are loaded.

    Args:
        asynchronous: a process forked from every rank writes while training goes on.
        on_sealed: called on process 0 with each checkpoint that was finished.
    """

    def __init__(self, *, asynchronous: bool, on_sealed: Callable[[Path], None]) -> None:
        super().__init__(async_save=True)
        self._asynchronous = asynchronous
        self._on_sealed = on_sealed

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> AsyncRequest | None:
        """Save (collective).

        Returns:
            What is left to do, for an asynchronous save; else None, and the checkpoint is sealed.

        Raises:
            OSError: the disk is full or the place cannot be written.
        """
        del storage_options
        directory = Path(ckpt_to_dir(path))
        weights = directory / WEIGHTS_PATH
        if dist.get_rank() == 0:
            if directory.exists():
                remove_checkpoint(directory)
            weights.mkdir(parents=True)
        dist.barrier()
        results: Any = _Drain() if self._asynchronous else queue.Queue()
        request = _prepared(checkpoint, weights, self.save_sharded_strategy, results)
        request = _with_checksums(request, directory, weights)
        request.add_finalize_fn(lambda: self._seal(directory, results))
        if self._asynchronous:
            return request
        run_here(request)
        return None

    def _seal(self, directory: Path, results: Any) -> None:
        """Finish a checkpoint after every rank has written its files and process 0 the metadata (collective)."""
        if isinstance(results, _Drain):
            results.close()
        own = _sums_file(directory)
        mine = json.loads(own.read_text("utf-8")) if own.is_file() else {}
        own.unlink(missing_ok=True)
        rank = dist.get_rank()
        shares: list[dict[str, Any]] | None = [{} for _ in range(dist.get_world_size())] if rank == 0 else None
        dist.gather_object(mine, shares)
        if shares is not None:
            write_seal(directory, {name: facts for share in shares for name, facts in share.items()})
            self._on_sealed(directory)
        dist.barrier()

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
        whole = newest_whole(Path(path).parent)
        with only_plain_data(whole / WEIGHTS_PATH):
            loaded: dict[str, Any] = super().load_checkpoint(
                whole, sharded_state_dict=sharded_state_dict, map_location=map_location, strict=strict
            )
        return loaded


def newest_whole(directory: Path) -> Path:
    """The newest checkpoint whose files have their checksums; the ranks share the reading (collective).

    Raises:
        UserError: there are finished checkpoints, and none is whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    box: list[Any] = [usable_checkpoints(directory) if rank == 0 else None]
    dist.broadcast_object_list(box)
    usable, notes = box[0]
    if rank == 0:
        for note in notes:
            _LOGGER.warning("%s", note)
    for path in usable:
        damaged: list[Any] = [None] * world
        dist.all_gather_object(damaged, damaged_files(path, share=rank, shares=world))
        names = [name for share in damaged for name in share]
        if not names:
            return Path(path)
        notes.append(f"{path} is damaged ({', '.join(names)}: wrong checksum) and is passed over")
        if rank == 0:
            _LOGGER.warning("%s", notes[-1])
    refuse_all_damaged(directory, notes)


def resumable(directory: Path) -> Path | None:
    """Where a run continues, judged without reading contents; None when it starts. Process 0 names what is wrong.

    Raises:
        UserError: there are finished checkpoints, and each one has lost files.
    """
    usable, notes = usable_checkpoints(directory)
    if usable:
        return usable[0]
    if any(is_sealed(path) for path in checkpoints(directory)):
        refuse_all_damaged(directory, notes)
    return None


def _prepared(state: dict[str, Any], place: Path, strategy: Any, results: Any) -> AsyncRequest:
    """A save that is planned and has its common part written; the tensors are still to be written.

    Megatron starts a server process on every rank for the writers' results, which takes seconds and 200 MB and
    outlives a killed run. `results` takes its place.
    """
    server, filesystem_async._results_queue = filesystem_async._results_queue, results
    try:
        request = dist_checkpointing.save(
            state,
            str(place),
            sharded_strategy=strategy,
            async_sharded_save=True,
            preprocess_common_before_consistancy_check=_without_optimizer,
        )
    finally:
        filesystem_async._results_queue = server
    assert isinstance(request, AsyncRequest)
    return request


def _without_optimizer(common: dict[str, Any]) -> dict[str, Any]:
    """Pipeline stages list their parameter groups in different orders, and Megatron sorts them when it loads."""
    return {name: value for name, value in common.items() if name != "optimizer"}


def run_here(request: AsyncRequest) -> None:
    """Do a prepared save in this process (collective)."""
    if request.preload_fn is not None and request.async_fn is not None:
        # What the separate process would be given instead: the tensors copied to the CPU.
        rank, _buckets, *rest = request.async_fn_args
        request = request._replace(async_fn_args=(rank, request.preload_fn(), *rest))
    request.execute_sync()


def _with_checksums(request: AsyncRequest, directory: Path, weights: Path) -> AsyncRequest:
    """The same save, in which the writer notes the facts of its rank's files while they are in the page cache."""
    write, target, own = request.async_fn, _sums_file(directory), f"__{dist.get_rank()}_*"
    if write is None:
        return request

    def write_and_note(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        files = sorted(weights.glob(own))
        write_json(target, {str(path.relative_to(directory)): file_facts(path) for path in files})

    return request._replace(async_fn=write_and_note)


def _sums_file(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.sums-{dist.get_rank():05d}.json")


class _Drain:
    """The writers' results, from a forked process: a pipe that a thread empties, so that the writer never waits."""

    def __init__(self) -> None:
        self._reader, self._writer = get_context("fork").Pipe(duplex=False)
        self._results: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._empty, daemon=True)
        self._thread.start()

    def put(self, item: object) -> None:
        """Called in the writing process."""
        self._writer.send(item)

    def get_nowait(self) -> Any:
        """Called when the writing process has ended: what it wrote may still be in the pipe."""
        return self._results.get(timeout=DRAIN_SECONDS)

    def close(self) -> None:
        """End the thread."""
        self._writer.send(None)
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _empty(self) -> None:
        while (item := self._reader.recv()) is not None:
            self._results.put(item)


def validates_now(trainer: pl.Trainer) -> bool:
    """Whether the validation loss is measured after this step: a run that continues here does not do it again."""
    every = trainer.val_check_interval
    return trainer.limit_val_batches > 0 and isinstance(every, int) and trainer.global_step % every == 0


class CheckpointKeeper(pl.Callback):
    """Saves every so many steps, at the end, and when the validation loss is the best; deletes what is not kept.

    Args:
        directory: where the checkpoints are.
        config: how often, and how many.
    """

    def __init__(self, directory: Path, config: SupervisedCheckpointConfig) -> None:
        self.directory, self.config = directory, config
        self._saved = -1
        self._best: dict[str, float] = {}

    def checkpoint_io(self) -> Any:
        """What the strategy saves and loads with."""
        sealed = SealedCheckpointIO(asynchronous=self.config.asynchronous, on_sealed=self._prune)
        return AsyncFinalizableCheckpointIO(sealed) if self.config.asynchronous else sealed

    def save(self, trainer: pl.Trainer) -> None:
        """Save unless this step is saved (collective)."""
        if trainer.global_step == self._saved:
            return
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.directory / f"{checkpoint_name(self._saved)}.ckpt")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Look at what a killed run left."""
        # A resumed run stands at a checkpoint.
        self._saved = trainer.global_step
        found: list[Mapping[str, float]] = [{}]
        if dist.get_rank() == 0:
            for path in checkpoints(self.directory):
                if not is_sealed(path):
                    remove_checkpoint(path)
            for left_over in self.directory.glob(".step=*.sums-*.json"):
                left_over.unlink()
            found = [_read_best(self.directory, trainer.global_step)]
        dist.broadcast_object_list(found)
        self._best = dict(found[0])

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Save when it is time."""
        if trainer.global_step % self.config.every == 0 and not validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save when it is time, with what the callbacks learnt from the validation, and save the best."""
        if trainer.global_step % self.config.every == 0:
            self.save(trainer)
        if not self.config.best:
            return
        loss = torch.as_tensor(trainer.callback_metrics["val_loss"]).to(platform.device(), torch.float64)
        dist.broadcast(loss, 0)
        if float(loss) >= self._best.get("val_loss", float("inf")):
            return
        self.save(trainer)
        self._best = {"step": trainer.global_step, "val_loss": float(loss)}
        if dist.get_rank() == 0:
            write_json(self.directory / BEST_FILE, self._best)
            best = self.directory / checkpoint_name(trainer.global_step)
            # One that is still being written prunes when it is finished.
            if is_sealed(best):
                self._prune(best)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Save the last step, for a run that is stopped or dies in its export."""
        self.save(trainer)

    def _prune(self, newest: Path) -> None:
        """Delete what is neither among the newest nor the best (process 0)."""
        kept = self._best.get("step", -1)
        sealed = [path for path in checkpoints(self.directory) if is_sealed(path)]
        older = [path for path in sealed if checkpoint_step(path) <= checkpoint_step(newest)]
        for path in older[self.config.keep :]:
            if checkpoint_step(path) != kept:
                remove_checkpoint(path)


def _read_best(directory: Path, step: int) -> dict[str, float]:
    """The best checkpoint so far: its step and validation loss; empty when there is none or it is gone."""
    try:
        best = json.loads((directory / BEST_FILE).read_text("utf-8"))
        known = {"step": int(best["step"]), "val_loss": float(best["val_loss"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    whole = is_sealed(directory / checkpoint_name(int(known["step"])))
    return known if whole and known["step"] <= step else {}
