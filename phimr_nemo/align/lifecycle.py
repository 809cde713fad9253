"""What both alignment stages do around their trainer: identity, stopping, the closing export."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch.distributed as dist

from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import input_hash
from phimr_nemo.training.distributed import PreemptionGuard, export_hf

HF_DIRECTORY: Final = "hf"


class StopTimer:
    """NeMo-Aligner's `run_timer`: asked after every step; True makes the trainer save and return."""

    def __init__(self, guard: PreemptionGuard) -> None:
        self._guard = guard

    def start_time(self) -> None:
        """Nothing: the scheduler keeps the time and sends a signal."""

    def is_finished(self) -> bool:
        """Whether any process was told to stop (collective)."""
        return self._guard.stop_agreed()


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

    Collective: process 0 reads the weights.

    Args:
        base: the starting model.
        data: the record directory.
    """
    box = [base.weights_hash() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box, 0)
    return {"base weights": box[0], "data": input_hash(data)}


def export(run: RunDirectory, policy: MegatronPolicy, base: Path) -> str:
    """Write the trained model to `<run>/hf` (collective).

    Returns:
        The export's name in the run directory.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    export_hf([policy.model], policy.architecture, base, run.path / HF_DIRECTORY)
    return HF_DIRECTORY
