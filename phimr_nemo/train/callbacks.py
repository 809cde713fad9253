"""What a person sees while a supervised stage runs, and what stays on disk."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from tqdm import tqdm

from phimr_nemo.runs import MetricsWriter, RunDirectory
from phimr_nemo.train.distributed import PreemptionGuard


class RunMonitor(pl.Callback):
    """A progress bar with rate and ETA, and metrics.jsonl plus TensorBoard. Rank 0 only.

    Args:
        run: the run directory.
        title: name of the stage in the bar.
        tokens_per_step: tokens (with padding) a step, for the rate.
        every: steps between two lines of metrics.
    """

    def __init__(self, run: RunDirectory, *, title: str, every: int) -> None:
        self.run, self.title, self.every = run, title, every
        self._tokens = 0
        self._started = 0.0
        self._bar: tqdm[Any] | None = None
        self._writer: MetricsWriter | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Open the bar and the metric files where the run stands (it may be a resumed one)."""
        if trainer.global_rank != 0:
            return
        step = trainer.global_step
        self._writer = MetricsWriter(self.run.path, from_step=step + 1)
        self._bar = tqdm(total=int(trainer.max_steps), initial=step, desc=self.title, unit="step", mininterval=1.0)
        self._started = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Write the step's numbers."""
        if self._bar is None or self._writer is None:
            return
        self._bar.update(1)
        step = trainer.global_step
        if step % self.every:
            return
        now = time.monotonic()
        metrics = {"step_time": (now - self._started) / self.every, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        self._started = now
        for name in ("reduced_train_loss", "grad_norm"):
            if name in trainer.callback_metrics:
                metrics["loss" if name == "reduced_train_loss" else name] = float(trainer.callback_metrics[name])
        self._bar.set_postfix({"loss": f"{metrics.get('loss', float('nan')):.4f}", "lr": f"{metrics['lr']:.2e}"})
        self._writer.write(step, metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the validation loss."""
        loss = trainer.callback_metrics.get("val_loss")
        if self._writer is not None and isinstance(loss, Tensor):
            self._writer.write(trainer.global_step, {"val_loss": float(loss)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Close the bar and the metric files."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()


class StopOnSignal(pl.Callback):
    """Saves a checkpoint and ends training when the run is asked to stop (Ctrl-C, SIGTERM, SIGUSR1).

    Args:
        guard: asked after every step; it answers alike on all ranks.
    """

    def __init__(self, guard: PreemptionGuard) -> None:
        self.guard = guard

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Lightning answers SIGTERM by raising in the middle of things; here the step is finished and saved."""
        self.guard.install()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Save and stop."""
        if trainer.global_step < int(trainer.max_steps) and self.guard.stop_agreed():
            directory = trainer.checkpoint_callback.dirpath
            trainer.save_checkpoint(f"{directory}/step={trainer.global_step}.ckpt")
            trainer.should_stop = True
