"""pass@1 while NeMo's trainer trains: all ranks give their weights, rank 0 samples and grades, the others wait."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from phimr_nemo.evaluate.held_out import HeldOut, OwnEngine
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.supervised.callbacks import RunMonitor
from phimr_nemo.training.distributed import exported, wait_for_all


class TrainingEvaluation(pl.Callback):
    """pass@1 every so many steps.

    Args:
        held_out: the questions.
        engine: what samples them.
        monitor: writes the score among the run's metrics.
    """

    def __init__(self, held_out: HeldOut, engine: OwnEngine, monitor: RunMonitor) -> None:
        self.held_out, self.engine, self.monitor = held_out, engine, monitor
        self.architecture = Architecture.from_directory(engine.base)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Evaluate when it is time (collective)."""
        step = trainer.global_step
        if step % self.engine.config.every and step != int(trainer.max_steps):
            return
        tensors = exported(trainer.strategy.megatron_parallel, self.architecture)
        if dist.get_rank() == 0:
            completions = self.engine.sample(self.held_out, tensors, step)
            self.monitor.write(step, self.held_out.score(completions, step))
        else:
            for _ in tensors:
                continue
        wait_for_all(f"problems are answered at step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Close what the engine holds."""
        self.engine.close()
