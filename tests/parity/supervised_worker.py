"""What a rank does in the parity tests of the supervised stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phimr_nemo.config import STAGES, load_config

STOP_AFTER = 3


def train(stage: str, overrides: list[str]) -> None:
    """Run a supervised stage."""
    import torch.distributed as dist

    from phimr_nemo.launch import run_stage

    # NeMo starts the process group itself, with Megatron's groups.
    dist.destroy_process_group()
    config: Any = load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), overrides)
    run_stage(stage, config)


def train_and_stop(stage: str, overrides: list[str]) -> bool:
    """Run a supervised stage that is told to stop in the middle; whether it said that it was stopped."""
    import os
    import signal

    from phimr_nemo.errors import Preempted
    from phimr_nemo.train.callbacks import RunMonitor

    on_end = RunMonitor.on_train_batch_end

    def end(self: RunMonitor, trainer: Any, *rest: Any) -> None:
        on_end(self, trainer, *rest)
        if trainer.global_step == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    RunMonitor.on_train_batch_end = end  # type: ignore[method-assign]
    try:
        train(stage, overrides)
    except Preempted:
        return True
    return False


def train_on_swapped_rows(stage: str, overrides: list[str]) -> None:
    """The planted fault: this layout reads another row first."""
    from phimr_nemo.data.batches import EpochOrder

    right = EpochOrder.__getitem__
    EpochOrder.__getitem__ = lambda self, sample: (right(self, sample) + 1) % self.rows  # type: ignore[method-assign]
    train(stage, overrides)


def train_with_a_mean_per_micro_batch(stage: str, overrides: list[str]) -> None:
    """The planted fault: micro-batches weigh the same, however few tokens they have."""
    import phimr_nemo.train.supervised as supervised

    right = supervised.phi4mini_config

    def wrong(*args: Any, **kwargs: Any) -> Any:
        config = right(*args, **kwargs)
        config.calculate_per_token_loss = False
        return config

    supervised.phi4mini_config = wrong
    train(stage, overrides)
