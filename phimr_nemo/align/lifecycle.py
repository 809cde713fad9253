"""What both alignment stages do around their trainer: identity, stopping, the closing export."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from phimr_nemo.align.measuring import Measuring
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import DPOConfig, ModelConfig, RoundsConfig
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.origin import trained_from
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.training.adapters.peft import ADAPTER_DIRECTORY, write_adapter
from phimr_nemo.training.checkpoint import CheckpointStore, exported_step
from phimr_nemo.training.distributed import PreemptionGuard, export_checkpoint, export_hf, wait_for_all
from phimr_nemo.training.throughput import Speed

HF_DIRECTORY: Final = "hf"


class BetweenSteps:
    """NeMo-Aligner's `run_timer`: asked after every step; True makes the trainer save and return.

    What is measured after a step is measured here, and the best so far is saved when no other checkpoint is due.

    Args:
        guard: whether a signal came.
        store: what it has written beside training is finished here, and its judge knows whether training converged.
        measuring: what is measured.
        trainer: gives the trainer, which is made with this object.
    """

    def __init__(
        self, guard: PreemptionGuard, store: CheckpointStore, measuring: Measuring, trainer: Callable[[], Any]
    ) -> None:
        self._guard, self._store, self._measuring, self._trainer = guard, store, measuring, trainer
        self._seen = -1

    def start_time(self) -> None:
        """A run that continues measures the step that it stands at, if it was stopped before that (collective)."""
        self._seen = self._trainer().step
        self._measuring.after(self._seen)

    def is_finished(self) -> bool:
        """Whether any process was told to stop, or training has converged (collective)."""
        self._store.finish_writing(wait=False)
        trainer = self._trainer()
        is_told = self._guard.stop_agreed()
        if trainer.step != self._seen:
            self._seen = trainer.step
            if not is_told:
                self._measure(trainer)
        return is_told or self._store.judge.has_converged(trainer.step)

    def _measure(self, trainer: Any) -> None:
        step = trainer.step
        self._measuring.after(step)
        is_saved_anyway = step % self._store.config.every == 0 or step == trainer.max_steps
        if self._store.is_best(step) and not is_saved_anyway and not self._store.judge.has_converged(step):
            trainer.save()


def speed_of(policy: MegatronPolicy, model: ModelConfig) -> Speed:
    """Return what turns seconds into metrics of the training steps' throughput (collective when called)."""
    return Speed(
        policy.work,
        processes=policy.parallel.world_size,
        architecture=policy.architecture,
        fp8=model.fp8 is not None,
    )


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """What exists now is left out of garbage collection inside.

    The trainers collect garbage once or twice a step, and the libraries' own objects, which live for ever, would
    make that half a second each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def content_identity(base: HFDirectory, data: Path) -> dict[str, str]:
    """What a resumed run must find unchanged, by content; its settings are compared when a stage is launched.

    Collective.

    Args:
        base: the starting model.
        data: the record directory.
    """
    return {"base weights": shared_hash(base), "data": content_of(data)}


def shared_hash(model: HFDirectory) -> str:
    """A hash of a directory's weights, which process 0 reads (collective)."""
    box = [model.weights_hash() if dist.get_rank() == 0 else ""]
    wait_for_all(f"the weights of {model.path} are read")
    dist.broadcast_object_list(box, 0)
    return box[0]


def export(
    run: RunDirectory, policy: MegatronPolicy, config: DPOConfig | RoundsConfig, store: CheckpointStore, done: int
) -> dict[str, Any]:
    """Write the trained model to `<run>/hf`: the last step, or the best one (collective).

    Returns:
        What DONE says of it.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    origin = trained_from(config.base, config.sequence_length, config.model.longrope)
    best = store.best_whole(done)
    if best is None or best.step == done:
        export_hf([policy.model], policy.architecture, config.base, run.path / HF_DIRECTORY, origin)
    else:
        export_checkpoint(store.path(best.step), config.base, run.path / HF_DIRECTORY, origin)
    if config.lora is not None:
        write_adapter([policy.model], policy.architecture, config.lora, config.base, run.path / ADAPTER_DIRECTORY)
    return {"hf": HF_DIRECTORY, **exported_step(done, best, store.judge)}
