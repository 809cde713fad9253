"""Stages 1 and 2 on NeMo 2.0: its trainer with `nl.MegatronStrategy`, from one Hugging Face directory to the next."""

from __future__ import annotations

import os
import time
from typing import Any

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.pytorch.trainer import configure_no_restart_validation_training_loop

from phimr_nemo.config import MidtrainConfig, SFTConfig, SupervisedConfig, TrainingEvaluationConfig
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.evaluate.held_out import HeldOut, OwnEngine
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.megatron.configuration import has_transformer_engine
from phimr_nemo.model.origin import trained_from
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.supervised import assembly
from phimr_nemo.supervised.callbacks import GuardCallback, RunMonitor, StopOnSignal
from phimr_nemo.supervised.checkpointing import CheckpointKeeper, StoreIO
from phimr_nemo.supervised.data import SupervisedDataModule, midtrain_data, sft_data
from phimr_nemo.supervised.nemo_model import Phi4MiniModel, phi4mini_config
from phimr_nemo.supervised.pass1 import TrainingEvaluation
from phimr_nemo.training import platform
from phimr_nemo.training.adapters.peft import ADAPTER_DIRECTORY, write_adapter
from phimr_nemo.training.checkpoint import CheckpointStore, exported_step, resumable
from phimr_nemo.training.distributed import (
    PreemptionGuard,
    export_checkpoint,
    exported,
    limit_collectives,
    quiet_libraries,
    unwrapped,
    write_hf_export,
)
from phimr_nemo.training.early_stopping import Judge
from phimr_nemo.training.guard import BatchGuard
from phimr_nemo.training.metrics import Stage, metrics_of
from phimr_nemo.training.plots import plot_supervised
from phimr_nemo.training.precision import require_fp8


def run_midtrain(config: MidtrainConfig) -> dict[str, Any]:
    """Stage 1: packed next-token prediction on the full verified set.

    Raises:
        UserError: bad input (see :class:`SupervisedDataModule`); nothing is written then.
        Preempted: the run was asked to stop and has saved its state.
    """
    return _train("midtrain", config, midtrain_data(config))


def run_sft(config: SFTConfig) -> dict[str, Any]:
    """Stage 2: unpacked conversations, loss on the response, so that the model learns when to stop.

    Raises:
        UserError: bad input (see :class:`SupervisedDataModule`); nothing is written then.
        Preempted: the run was asked to stop and has saved its state.
    """
    return _train("sft", config, sft_data(config))


def _train(stage: Stage, config: SupervisedConfig, data: SupervisedDataModule) -> dict[str, Any]:
    _require_transformer_engine(config)
    platform.prepare()
    quiet_libraries()
    if config.model.deterministic:
        platform.make_deterministic()
    limit_collectives(config.parallel)
    steps = data.steps
    run = RunDirectory(config.run.output)
    started = time.monotonic()
    architecture = Architecture.from_directory(config.base)
    described = phi4mini_config(
        config.base,
        config.model,
        config.parallel,
        max_length=config.sequence_length,
        seed=config.run.seed,
        lora=config.lora,
    )
    model = Phi4MiniModel(described, optim=assembly.optimizer(config, steps))
    store = CheckpointStore(run.checkpoints, config.checkpoint, _judge(stage, config, run, steps))
    keeper = CheckpointKeeper(store)
    newest = resumable(run.checkpoints)
    guard = BatchGuard(run.path, config.guard, data.batch_rows)
    monitor = RunMonitor(run, title=stage, config=config, architecture=architecture, rows=data.train.order.rows)
    callbacks: list[pl.Callback] = [monitor, GuardCallback(guard)]
    if config.evaluation is not None:
        callbacks.append(_evaluation(config.evaluation, config, run, monitor))
    if config.overlap.tensor:
        callbacks.append(assembly.tensor_overlap(config))
    with PreemptionGuard() as preemption:
        trainer = assembly.trainer(
            config,
            steps=steps,
            validation_steps=data.validation_steps,
            nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            on_gpu=torch.cuda.is_available(),
            callbacks=[*callbacks, StopOnSignal(preemption, keeper), keeper],
        )
        trainer.strategy.checkpoint_io = StoreIO(store, fp8=config.model.fp8 is not None)
        # The store saves beside training by itself.
        trainer.strategy.async_save = False
        if newest is not None:
            # NeMo's AutoResume does this, for its own checkpoint callback.
            trainer.ckpt_path = str(newest)
        # What NeMo's `llm.train` does with a log and no resume; its module imports every model and NeMo-Run.
        configure_no_restart_validation_training_loop(trainer)
        nl.NeMoLogger(
            log_dir=str(run.path),
            name="nemo",
            use_datetime_version=False,
            log_global_rank_0_only=True,
        ).setup(trainer)
        trainer.fit(model, data)
    done = trainer.global_step
    converged = store.judge.has_converged(done)
    if done < steps and not converged:
        raise Preempted(f"{stage} stopped at step {done} of {steps}; run the same command to continue")
    origin = trained_from(config.base, config.sequence_length, config.model.longrope)
    best = store.best_whole(done)
    if best is None or best.step == done:
        tensors = exported(trainer.strategy.megatron_parallel, architecture)
        write_hf_export(tensors, architecture, config.base, run.path / "hf", origin)
    else:
        export_checkpoint(store.path(best.step), config.base, run.path / "hf", origin)
    if config.lora is not None:
        chunks = [unwrapped(chunk.module) for chunk in trainer.strategy.megatron_parallel]
        write_adapter(chunks, architecture, config.lora, config.base, run.path / ADAPTER_DIRECTORY)
    if trainer.global_rank == 0:
        plot_supervised(run.path)
    return {
        "steps": done,
        "converged": converged,
        "skipped_batches": guard.skipped,
        "seconds": time.monotonic() - started,
        "training_rows": data.train.order.rows,
        "rows_not_trained_on": data.left_over,
        "documents_kept_for_validation": data.unseen_documents,
        "hf": "hf",
        **exported_step(done, best, store.judge),
    }


def _judge(stage: Stage, config: SupervisedConfig, run: RunDirectory, steps: int) -> Judge:
    """What the run is judged by; each metric is measured at its own times."""
    every = {
        "val_loss": config.validate_every,
        "pass1": config.checkpoint.every if config.evaluation is None else config.evaluation.every,
        "loss": config.checkpoint.every,
    }[config.checkpoint.metric]
    metric = metrics_of(stage)[config.checkpoint.metric]
    return Judge(run.path, metric, config.early_stopping, every=every, last=steps)


def _evaluation(
    asked: TrainingEvaluationConfig, config: SupervisedConfig, run: RunDirectory, monitor: RunMonitor
) -> TrainingEvaluation:
    held_out = HeldOut(run.path, asked, base=config.base, seed=config.run.seed)
    engine = OwnEngine(asked, config.base, config.model, config.sequence_length, platform.device())
    return TrainingEvaluation(held_out, engine, monitor)


def _require_transformer_engine(config: SupervisedConfig) -> None:
    """Refuse what needs Transformer Engine where it is not, which NeMo would pass over.

    Raises:
        UserError: FP8 or overlapped tensor-parallel exchange without it.
    """
    require_fp8(config.model)
    if config.overlap.tensor and not has_transformer_engine():
        raise UserError(
            "overlap.tensor=true on this machine",
            rule="tensor-parallel exchange is overlapped by Transformer Engine on GPUs",
            remedy="set overlap.tensor=false (`phimr doctor` tells what is there)",
        )
