"""The checkpoints of all four training stages: Megatron's distributed format, sealed when whole, written at once or
beside training; the newest whole one is continued from, the best one is kept and exported."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from phimr_nemo.config import CheckpointConfig
from phimr_nemo.model.files.checkpoints import NEMO_WEIGHTS
from phimr_nemo.process.children import ended_with_us
from phimr_nemo.store.atomic import write_json
from phimr_nemo.training.distributed import wait_for_all
from phimr_nemo.training.early_stopping import Judge, Measured, best_of
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

FORMAT: Final = ("torch_dist", 1)
DRAIN_SECONDS: Final = 60.0
"""How long the writers' results may take through the pipe after the writers have ended."""

_LOGGER: Final = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints `step=N/` of one run. Methods are collective unless they say otherwise.

    Args:
        directory: where they are.
        config: how many are kept, and how they are written.
        judge: tells which is the best.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, judge: Judge) -> None:
        self.directory, self.config, self.judge = directory, config, judge
        self._best: int | None = None
        self._damaged: set[int] = set()
        self._writing = AsyncCallsQueue()

    def path(self, step: int) -> Path:
        """Return where a step's checkpoint is or would be (not collective)."""
        return self.directory / checkpoint_name(step)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint or are about to (not collective), ascending."""
        return sorted(checkpoint_step(path) for path in checkpoints(self.directory))

    # ---- writing -------------------------------------------------------------------------------------------

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Save a step's state, now or beside training; one that is there already is replaced.

        Args:
            step: optimizer steps done.
            state: Megatron's sharded state, and plain data.

        Raises:
            OSError: the disk is full or the place cannot be written.
        """
        self.finish_writing(wait=True)
        directory = self.path(step)
        self._mark_best(step)
        if dist.get_rank() == 0:
            if directory.exists():
                remove_checkpoint(directory)
            (directory / NEMO_WEIGHTS).mkdir(parents=True)
        wait_for_all(f"{directory} is made")
        results: Any = _Drain() if self.config.asynchronous else queue.Queue()
        request = _with_checksums(_prepared(state, directory / NEMO_WEIGHTS, results), directory)
        request.add_finalize_fn(lambda: self._seal(directory, results))
        # A writer of a killed process would wait for it for ever, and hold the lock of the run.
        with ended_with_us():
            if self.config.asynchronous:
                self._writing.schedule_async_request(request)
            else:
                _run_here(request)

    def finish_writing(self, *, wait: bool) -> None:
        """Seal what a process beside training has written by now, or wait for it."""
        if self._writing.get_num_unfinalized_calls():
            self._writing.maybe_finalize_async_calls(blocking=wait)

    def _seal(self, directory: Path, results: Any) -> None:
        """Finish a checkpoint after every rank has written its files and process 0 the metadata."""
        if isinstance(results, _Drain):
            results.close()
        own = _sums_file(directory)
        mine = json.loads(own.read_text("utf-8")) if own.is_file() else {}
        own.unlink(missing_ok=True)
        rank = dist.get_rank()
        wait_for_all(f"{directory} is written")
        shares: list[dict[str, Any]] | None = [{} for _ in range(dist.get_world_size())] if rank == 0 else None
        dist.gather_object(mine, shares)
        if shares is not None:
            write_seal(directory, {name: facts for share in shares for name, facts in share.items()})
            self._prune(checkpoint_step(directory))
        wait_for_all(f"{directory} is sealed")

    def _mark_best(self, step: int) -> None:
        """Note which checkpoint is the best, the one of `step` included, which is about to be written."""
        if not self.config.best:
            return
        measured = self.judge.history(step)
        if dist.get_rank() == 0:
            there = {checkpoint_step(path) for path in checkpoints(self.directory) if is_sealed(path)} | {step}
            best = best_of([one for one in measured if one.step in there], self.judge.metric)
            self._best = None if best is None else best.step

    def is_best(self, step: int) -> bool:
        """Return whether a step just measured is the best so far, and `best` wants it kept."""
        if not self.config.best or not self.judge.is_due(step):
            return False
        best = best_of(self.judge.history(step), self.judge.metric)
        return best is not None and best.step == step

    def _prune(self, newest: int) -> None:
        """Delete what is neither among the newest nor the best (process 0)."""
        self._damaged.discard(newest)
        older = [path for path in checkpoints(self.directory) if checkpoint_step(path) <= newest and is_sealed(path)]
        sound = [path for path in older if checkpoint_step(path) not in self._damaged]
        keep = {*map(checkpoint_step, sound[: self.config.keep]), self._best}
        for path in older:
            if checkpoint_step(path) not in keep:
                remove_checkpoint(path)

    def clear_unfinished(self) -> None:
        """Remove what a killed run left half-written."""
        if dist.get_rank() == 0 and self.directory.is_dir():
            for path in checkpoints(self.directory):
                if not is_sealed(path):
                    remove_checkpoint(path)
            for left_over in self.directory.glob(".step=*.sums-*.json"):
                left_over.unlink()
        wait_for_all("what a killed run left is removed")

    # ---- choosing ------------------------------------------------------------------------------------------

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint whose files have their checksums; None where none was ever finished.

        The ranks share the reading. Damaged ones are named in warnings.

        Raises:
            UserError: there are finished checkpoints, and none is whole.
        """
        box: list[Any] = [usable_checkpoints(self.directory) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        usable, notes = box[0]
        for note in notes:
            _warn(note)
        for path in usable:
            note = damage(path)
            if not note:
                self._damaged = {step for step in self.steps() if step > checkpoint_step(path)}
                return Path(path)
            notes.append(note)
            _warn(note)
        if any(is_sealed(path) for path in checkpoints(self.directory)):
            refuse_all_damaged(self.directory, notes)
        return None

    def best_whole(self, done: int) -> Measured | None:
        """Return the best measured step of the first `done` whose checkpoint is whole; None without `best`.

        Where nothing was measured it is None as well, with a warning. A better one that is damaged is named.
        """
        if not self.config.best:
            return None
        history = self.judge.history(done)
        if not history:
            _warn(f"{self.judge.metric.name} was never measured: the last step, {done}, is exported as the best")
        while (best := best_of(history, self.judge.metric)) is not None:
            path = self.path(best.step)
            box: list[Any] = [is_sealed(path)]
            dist.broadcast_object_list(box)
            note = damage(path) if box[0] else ""
            if box[0] and not note:
                return best
            if note:
                _warn(note)
            history = [one for one in history if one.step != best.step]
        return None


def resumable(directory: Path) -> Path | None:
    """Return where a run continues, judged without reading contents; None when it starts. Not collective.

    Raises:
        UserError: there are finished checkpoints, and each one has lost files.
    """
    usable, notes = usable_checkpoints(directory)
    if usable:
        return usable[0]
    if any(is_sealed(path) for path in checkpoints(directory)):
        refuse_all_damaged(directory, notes)
    return None


def damage(path: Path) -> str:
    """Return what is wrong with a sealed checkpoint, as a sentence; empty when it is whole (collective)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = damaged_files(path, share=rank, shares=world)
    wait_for_all(f"{path} is read")
    found: list[Any] = [None] * world
    dist.all_gather_object(found, mine)
    names = [name for share in found for name in share]
    return f"{path} is damaged ({', '.join(names)}: wrong checksum) and is passed over" if names else ""


def _warn(note: str) -> None:
    if dist.get_rank() == 0:
        _LOGGER.warning("%s", note)


# ---- one save ----------------------------------------------------------------------------------------------


def _prepared(state: dict[str, Any], place: Path, results: Any) -> AsyncRequest:
    """A save that is planned and has its common part written; the tensors are still to be written.

    Megatron starts a server process on every rank for the writers' results, which takes seconds and 200 MB and
    outlives a killed run. `results` takes its place.
    """
    server, filesystem_async._results_queue = filesystem_async._results_queue, results
    try:
        request = dist_checkpointing.save(
            state,
            str(place),
            sharded_strategy=FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(*FORMAT)),
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


def _run_here(request: AsyncRequest) -> None:
    """Do a prepared save in this process (collective)."""
    if request.preload_fn is not None and request.async_fn is not None:
        # What the separate process would be given instead: the tensors copied to the CPU.
        rank, _buckets, *rest = request.async_fn_args
        request = request._replace(async_fn_args=(rank, request.preload_fn(), *rest))
    request.execute_sync()


def _with_checksums(request: AsyncRequest, directory: Path) -> AsyncRequest:
    """The same save, in which the writer notes the facts of its rank's files while they are in the page cache."""
    write, target, own = request.async_fn, _sums_file(directory), f"__{dist.get_rank()}_*"
    if write is None:
        return request

    def write_and_note(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        files = sorted((directory / NEMO_WEIGHTS).glob(own))
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


def exported_step(step: int, best: Measured | None, judge: Judge) -> dict[str, Any]:
    """Return what DONE says of the export: its step, and the measure of its weights (collective).

    Args:
        step: the last one.
        best: what is exported instead of it, or None.
        judge: the run's measure.
    """
    here = [one for one in judge.history(step) if one.step == step]
    chosen: Sequence[Measured] = here[-1:] if best is None else [best]
    measure = {"metric": judge.metric.name, "value": chosen[0].value} if chosen else None
    return {"exported_step": step if best is None else best.step, "measure": measure}
