"""What a person sees while a supervised stage runs, and what stays on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import lightning.pytorch as pl
from torch import Tensor

from phimr_nemo.config import SupervisedConfig, to_dict
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.store.progress import Progress
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.supervised.checkpointing import CheckpointKeeper, validates_now
from phimr_nemo.training.distributed import PreemptionGuard
from phimr_nemo.training.guard import BatchGuard
from phimr_nemo.training.throughput import Speed, WorkCounter
from phimr_nemo.training.tracking import RunLog

SHOWN: Final[Mapping[str, str]] = {
    "loss": "{:.4f}",
    "lr": "{:.2e}",
    "grad_norm": "{:.2f}",
    "tokens_per_second_per_gpu": "{:.0f}",
    "mfu": "{:.1%}",
    "memory_gib": "{:.1f}",
}
"""Metrics in the bar, as they look there."""

SHORT_NAMES: Final[Mapping[str, str]] = {"tokens_per_second_per_gpu": "tok/s/gpu", "memory_gib": "GiB"}


class RunMonitor(pl.Callback):
    """A progress bar with rates and ETA, and metrics.jsonl, TensorBoard and W&B. All ranks count, rank 0 writes.

    Args:
        run: the run directory.
        title: name of the stage in the bar.
        config: of the run.
        architecture: the model, for its FLOPs.
        rows: training rows an epoch.
    """

    def __init__(
        self, run: RunDirectory, *, title: str, config: SupervisedConfig, architecture: Architecture, rows: int
    ) -> None:
        self.run, self.title, self.config, self.architecture, self.rows = run, title, config, architecture, rows
        self._speed: Speed | None = None
        self._steps = 0
        self._seconds = 0.0
        self._step_started, self._rate = 0.0, 0.0
        self._run_started, self._first_step = 0.0, 0
        self._validated: set[int] = set()
        self._bar: Progress | None = None
        self._log: RunLog | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write named scalars of a step; nothing happens on other ranks than 0."""
        if self._log is not None:
            self._log.write(step, metrics)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Open the bar and the metric files where the run stands (it may be a resumed one)."""
        step = trainer.global_step
        self._speed = Speed(
            WorkCounter(chunks=len(trainer.strategy.megatron_parallel)),
            processes=self.config.parallel.world_size,
            architecture=self.architecture,
            fp8=self.config.model.fp8 is not None,
        )
        self._run_started, self._first_step = time.monotonic(), step
        if trainer.global_rank != 0:
            return
        self._validated = {row["step"] for row in read_metrics(self.run.path) if "val_loss" in row}
        self._log = RunLog(self.run.path, self.config.tracking, to_dict(self.config), done=step)
        self._bar = Progress(int(trainer.max_steps), done=step, title=self.title, unit="step")

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Start the clock: validation, evaluation and saving are not part of a step's time."""
        # At its end Lightning has the next step's rate there.
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self._step_started = time.monotonic()

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Tensor], **_: Any) -> None:
        """Count a micro-batch (NeMo's hook)."""
        if self._speed is not None and not step.forward_only:
            self._speed.counter.add(batch)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Write the numbers of the steps since the last line (collective)."""
        self._steps += 1
        self._seconds += time.monotonic() - self._step_started
        if self._bar is not None:
            self._bar.update(1)
        if self._speed is None or trainer.global_step % self.config.run.log_every:
            return
        speed = {"step_time": self._seconds / self._steps, **self._speed(self._seconds)}
        metrics = {**self._from_trainer(trainer), **self._progress(trainer), **speed}
        self._steps, self._seconds = 0, 0.0
        if self._bar is not None:
            shown = {SHORT_NAMES.get(k, k): form.format(metrics[k]) for k, form in SHOWN.items() if k in metrics}
            self._bar.show(shown)
        self.write(trainer.global_step, metrics)

    def _from_trainer(self, trainer: pl.Trainer) -> dict[str, float]:
        metrics = {"lr": self._rate}
        for name in ("reduced_train_loss", "grad_norm"):
            if name in trainer.callback_metrics:
                metrics["loss" if name == "reduced_train_loss" else name] = float(trainer.callback_metrics[name])
        return metrics

    def _progress(self, trainer: pl.Trainer) -> dict[str, float]:
        step = trainer.global_step
        rows = step * self.config.global_batch
        pace = (time.monotonic() - self._run_started) / (step - self._first_step)
        return {
            "rows": float(rows),
            "epoch": rows / self.rows,
            "eta_seconds": pace * (int(trainer.max_steps) - step),
        }

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the validation loss."""
        loss = trainer.callback_metrics.get("val_loss")
        # Lightning measures again at the step of the checkpoint that a run continues from.
        again = trainer.global_step == self._first_step and self._first_step in self._validated
        if isinstance(loss, Tensor) and not again:
            self.write(trainer.global_step, {"val_loss": float(loss)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Close the bar and the metric files."""
        self.close()

    def on_exception(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Close them as well when training fails."""
        self.close()

    def close(self) -> None:
        """Close the bar and the metric files."""
        for part in (self._bar, self._log):
            if part is not None:
                part.close()
        self._bar = self._log = None


class GuardCallback(pl.Callback):
    """Gives a :class:`BatchGuard` what it looks at, and its place in the checkpoints.

    Args:
        guard: of the run.
    """

    def __init__(self, guard: BatchGuard) -> None:
        self.guard = guard

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Put it in front of the optimizer."""
        [optimizer] = trainer.optimizers
        self.guard.attach(optimizer.mcore_optimizer, lambda: trainer.global_step + 1)

    def on_megatron_step_end(self, step: Any, reduced: Tensor, **_: Any) -> None:
        """Hand on the training loss (NeMo's hook; 0 except on the last pipeline stage)."""
        if not step.forward_only:
            self.guard.note_loss(reduced)

    def state_dict(self) -> dict[str, Any]:
        """Return what the guard remembers."""
        return self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the guard continue with it."""
        self.guard.load_state_dict(state_dict)


class StopOnSignal(pl.Callback):
    """Saves a checkpoint and ends training when the run is asked to stop (Ctrl-C, SIGTERM, SIGUSR1).

    Args:
        guard: asked after every step; it answers alike on all ranks.
        keeper: saves.
    """

    def __init__(self, guard: PreemptionGuard, keeper: CheckpointKeeper) -> None:
        self.guard, self.keeper = guard, keeper

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
            trainer.should_stop = True
            if validates_now(trainer):
                # The checkpoint at the end of training, which follows, holds the measurement as well.
                return
            self.keeper.save(trainer)
            # Lightning validates before it stops; the grace time is for the checkpoint.
            trainer.limit_val_batches = 0
