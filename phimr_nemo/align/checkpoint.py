"""Native checkpoints of the alignment stages: atomic, resumable in another layout, the newest few kept."""

from __future__ import annotations

import contextlib
import queue
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.errors import UserError
from phimr_nemo.model.files.plaindata import only_plain_data
from phimr_nemo.store.atomic import atomic_directory

STEP_PREFIX: Final = "step-"
WRITERS: Final = 1
"""Writer threads a process."""

TRAINER_COUNTERS: Final = ("step", "consumed_samples", "epoch", "reinforce_optimization_step")


class CheckpointStore:
    """Checkpoints `step-00000012/` of one run. NeMo-Aligner calls :meth:`custom_save`.

    Args:
        directory: where they are.
        policy: what is saved and loaded: model, optimizer, schedule.
        keep: how many of the newest stay.
        identity: what must be the same when the run is resumed, by name.
    """

    def __init__(self, directory: Path, policy: MegatronPolicy, *, keep: int, identity: Mapping[str, str]) -> None:
        self.directory, self.policy, self.keep, self.identity = directory, policy, keep, dict(identity)
        if dist.get_rank() == 0 and directory.is_dir():
            for left_over in directory.glob(f".{STEP_PREFIX}*.tmp"):
                shutil.rmtree(left_over)
        dist.barrier()

    def steps(self) -> list[int]:
        """Of the complete checkpoints, ascending."""
        found = sorted(self.directory.glob(f"{STEP_PREFIX}*")) if self.directory.is_dir() else []
        return [int(path.name.removeprefix(STEP_PREFIX)) for path in found]

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        found = sorted(self.directory.glob(f"{STEP_PREFIX}*")) if self.directory.is_dir() else []
        return found[-1] if found else None

    def custom_save(self, monitor_candidates: Mapping[str, Any], is_train_end: bool = False) -> None:  # noqa: ARG002
        """Save after a step (collective). The trainer's counters come in among the metrics.

        Raises:
            UserError: the disk is full or the place cannot be written.
        """
        counters = {name: int(monitor_candidates[name]) for name in TRAINER_COUNTERS if name in monitor_candidates}
        target = self.directory / f"{STEP_PREFIX}{counters['step']:08d}"
        if target.exists():
            return
        state = {**self.policy.sharded_state_dict(), "trainer": counters, "identity": self.identity}
        with contextlib.ExitStack() as stack:
            place = [str(stack.enter_context(atomic_directory(target)))] if dist.get_rank() == 0 else [""]
            dist.broadcast_object_list(place, 0)
            _save(state, place[0])
            dist.barrier()
        if dist.get_rank() == 0:
            for old in sorted(self.directory.glob(f"{STEP_PREFIX}*"))[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def restore(self) -> dict[str, int]:
        """Load the newest checkpoint, in whatever layout it was saved (collective).

        Returns:
            The trainer's counters for `load_state_dict`; all 0 when there is no checkpoint.

        Raises:
            UserError: the checkpoint belongs to a run with another base or other data, or is no plain data.
        """
        path = self.newest()
        if path is None:
            return dict.fromkeys(TRAINER_COUNTERS, 0)
        with only_plain_data(path):
            self._check_identity(path)
            state = dist_checkpointing.load(self.policy.sharded_state_dict(is_loading=True), str(path))
        self.policy.load_state_dict(state)
        return dict(state["trainer"])

    def _check_identity(self, path: Path) -> None:
        saved = dist_checkpointing.load_common_state_dict(str(path))["identity"]
        names = sorted(saved.keys() | self.identity.keys())
        changed = [name for name in names if saved.get(name) != self.identity.get(name)]
        if changed:
            differences = ", ".join(f"{n}: {saved.get(n)} -> {self.identity.get(n)}" for n in changed)
            raise UserError(
                f"{path} belongs to another run ({differences})",
                rule="a run is resumed with the base and the data that it began with",
                remedy="restore them, or choose another run.output",
            )


def _save(state: dict[str, Any], place: str) -> None:
    """Save in this process, without the server process that Megatron starts on every rank for the writers' results.

    That server takes seconds and 200 MB, and is needed only where another process does the saving.
    """
    server, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        request = dist_checkpointing.save(
            state,
            place,
            sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=WRITERS),
            async_sharded_save=True,
            preprocess_common_before_consistancy_check=_without_optimizer,
        )
        if request.preload_fn is not None:
            # What the separate process would be given instead: the tensors copied to the CPU.
            rank, _buckets, *rest = request.async_fn_args
            request = request._replace(async_fn_args=(rank, request.preload_fn(), *rest))
        request.execute_sync()
    finally:
        filesystem_async._results_queue = server


def _without_optimizer(common: dict[str, Any]) -> dict[str, Any]:
    """Pipeline stages list their parameter groups in different orders, and Megatron sorts them when it loads."""
    return {name: value for name, value in common.items() if name != "optimizer"}
