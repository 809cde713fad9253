"""What a rank does in the parity tests of the supervised stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervised_inputs import CAPACITY

from phimr_nemo.config import STAGES, load_config

STOP_AFTER = 3


def train(stage: str, overrides: list[str]) -> None:
    """Run a supervised stage."""
    import torch.distributed as dist

    from phimr_nemo.jobs.launch import run_stage

    # NeMo starts the process group itself, with Megatron's groups.
    dist.destroy_process_group()
    config: Any = load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), overrides)
    run_stage(stage, config)


def train_with_modules(stage: str, overrides: list[str], modules: str) -> None:
    """The same, where a directory's modules can be imported, by grader processes too."""
    sys.path.insert(0, modules)
    os.environ["PYTHONPATH"] = os.pathsep.join([modules, os.environ.get("PYTHONPATH", "")])
    train(stage, overrides)


def train_and_stop(stage: str, overrides: list[str], signal_name: str = "SIGTERM") -> bool:
    """Run a supervised stage that is told to stop in the middle; whether it said that it was stopped."""
    import signal

    from phimr_nemo.errors import Preempted

    after_step(STOP_AFTER, lambda: os.kill(os.getpid(), signal.Signals[signal_name]))
    try:
        train(stage, overrides)
    except Preempted:
        return True
    return False


def train_and_listen(stage: str, overrides: list[str]) -> list[str]:
    """Run a stage; what it warned of."""
    import logging

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("phimr_nemo").addHandler(Listener(logging.WARNING))
    train(stage, overrides)
    return said


def train_and_die(stage: str, overrides: list[str], step: int) -> None:
    """Run a supervised stage that is killed after a step, without a chance to save."""
    import signal

    after_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(stage, overrides)


def after_step(step: int, action: Callable[[], None]) -> None:
    """Do something after a step's metrics are written, before anything is saved."""
    from phimr_nemo.supervised.callbacks import RunMonitor

    on_end = RunMonitor.on_train_batch_end

    def end(self: RunMonitor, trainer: Any, *rest: Any) -> None:
        on_end(self, trainer, *rest)
        if trainer.global_step == step:
            action()

    RunMonitor.on_train_batch_end = end  # type: ignore[method-assign, assignment]


def train_and_note_samples(stage: str, overrides: list[str]) -> list[int]:
    """Run a stage; the samples that this rank read, in order."""
    from phimr_nemo.data.rows.batches import Row
    from phimr_nemo.supervised.data import RowDataset

    read: list[int] = []
    right = RowDataset.__getitem__

    def noted(self: RowDataset, sample: int) -> Row:
        read.append(sample)
        return right(self, sample)

    RowDataset.__getitem__ = noted  # type: ignore[method-assign]
    train(stage, overrides)
    return read


def train_on_poison(stage: str, overrides: list[str], sample: int, factor: float, guarded: bool) -> list[str]:
    """Run a stage in which one sample's loss is multiplied by a factor; a digest of weights and moments a step."""
    from phimr_nemo.supervised import nemo_model
    from phimr_nemo.supervised.callbacks import RunMonitor
    from phimr_nemo.supervised.data import RowDataset
    from phimr_nemo.training.guard import BatchGuard

    poison: list[Any] = []
    right_row, right_step, on_end = RowDataset.__getitem__, nemo_model.forward_step, RunMonitor.on_train_batch_end

    def row(self: RowDataset, number: int) -> Any:
        found = right_row(self, number)
        if number == sample:
            poison.append(found.input_ids)
        return found

    def forward_step(model: Any, batch: Any) -> Any:
        output = right_step(model, batch)
        flat = batch["tokens"].flatten()
        for ids in poison:
            if any(bool((flat[at : at + len(ids)].numpy() == ids).all()) for at in range(0, len(flat), CAPACITY)):
                poison.clear()
                return output * factor
        return output

    digests: list[str] = []

    def end(self: RunMonitor, trainer: Any, *rest: Any) -> None:
        on_end(self, trainer, *rest)
        digests.append(state_digest(trainer))

    RowDataset.__getitem__ = row  # type: ignore[method-assign]
    right_config = nemo_model.architecture_config

    def config(*args: Any, **kwargs: Any) -> Any:
        made = right_config(*args, **kwargs)
        made.forward_step_fn = forward_step
        return made

    nemo_model.architecture_config = config
    RunMonitor.on_train_batch_end = end  # type: ignore[method-assign, assignment]
    if not guarded:
        BatchGuard._allows = lambda *_: True  # type: ignore[method-assign]
    train(stage, overrides)
    return digests


def state_digest(trainer: Any) -> str:
    """A hash of every weight and every optimizer moment and count of this rank."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for chunk in trainer.strategy.megatron_parallel:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for optimizer in trainer.optimizers[0].mcore_optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            digest.update(str(group.get("step")).encode())
        for state in optimizer.optimizer.state.values():
            for name in sorted(state):
                digest.update(torch.as_tensor(state[name]).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_on_swapped_rows(stage: str, overrides: list[str]) -> None:
    """The planted fault: this layout reads another row first."""
    from phimr_nemo.data.rows.batches import EpochOrder

    right = EpochOrder.__getitem__
    EpochOrder.__getitem__ = lambda self, sample: (right(self, sample) + 1) % self.rows  # type: ignore[method-assign]
    train(stage, overrides)


def train_with_a_mean_per_micro_batch(stage: str, overrides: list[str]) -> None:
    """The planted fault: micro-batches weigh the same, however few tokens they have."""
    import phimr_nemo.supervised.stage as supervised

    right = supervised.phi4mini_config

    def wrong(*args: Any, **kwargs: Any) -> Any:
        config = right(*args, **kwargs)
        config.calculate_per_token_loss = False
        return config

    supervised.phi4mini_config = wrong
    train(stage, overrides)
