"""Stages 1 and 2 on NeMo 2.0: `llm.train` with `nl.MegatronStrategy`, from one Hugging Face directory to the next."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.lightning.pytorch.optim import (
    CosineAnnealingScheduler,
    LRSchedulerModule,
    PolynomialDecayAnnealingScheduler,
    WarmupPolicyScheduler,
)

from phimr_nemo.config import MidtrainConfig, OptimConfig, SFTConfig, SupervisedConfig
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.evaluate.plots import plot_training
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.configuration import has_transformer_engine
from phimr_nemo.runs import RunDirectory
from phimr_nemo.train import platform
from phimr_nemo.train.callbacks import RunMonitor, StopOnSignal
from phimr_nemo.train.checkpointing import CheckpointKeeper, resumable
from phimr_nemo.train.data import (
    SupervisedDataModule,
    conversation_data,
    packed_data,
    require_parent,
)
from phimr_nemo.train.distributed import PreemptionGuard, exported, quiet_libraries, write_hf_export
from phimr_nemo.train.guard import BatchGuard
from phimr_nemo.train.nemo_model import DTYPES, Phi4MiniModel, phi4mini_config
from phimr_nemo.train.pass1 import TrainingEvaluation
from phimr_nemo.train.precision import precision_plugins
from phimr_nemo.train.saturation import StopWhenSaturated

# Sequence lengths that suit FP8 and sequence parallelism on the GPU.
LENGTH_MULTIPLE: Final = 16
PICTURE: Final = "training.png"
LINEAR_DECAY_POWER: Final = 1.0


def run_midtrain(config: MidtrainConfig) -> dict[str, Any]:
    """Stage 1: packed next-token prediction on the full verified set.

    Raises:
        UserError: bad input (see :class:`SupervisedDataModule`); nothing is written then.
        Preempted: the run was asked to stop and has saved its state.
    """
    require_parent(config.base)
    architecture = Architecture.from_directory(config.base)
    return _train("midtrain", config, packed_data(config, architecture.pad_token_id))


def run_sft(config: SFTConfig) -> dict[str, Any]:
    """Stage 2: unpacked conversations, loss on the response, so that the model learns when to stop.

    Raises:
        UserError: bad input (see :class:`SupervisedDataModule`); nothing is written then.
        Preempted: the run was asked to stop and has saved its state.
    """
    require_parent(config.base)
    architecture = Architecture.from_directory(config.base)
    data = conversation_data(
        config,
        load_tokenizer(config.base),
        architecture.pad_token_id,
        multiple=LENGTH_MULTIPLE * (config.parallel.tensor if config.parallel.sequence else 1),
    )
    return _train("sft", config, data)


def _train(stage: str, config: SupervisedConfig, data: SupervisedDataModule) -> dict[str, Any]:
    platform.prepare()
    quiet_libraries()
    steps = min(data.steps, config.max_steps) if config.max_steps else data.steps
    run = RunDirectory(config.run.output)
    started = time.monotonic()
    architecture = Architecture.from_directory(config.base)
    model = Phi4MiniModel(
        phi4mini_config(
            config.base,
            config.model,
            config.parallel,
            max_length=config.sequence_length,
            seed=config.run.seed,
        ),
        optim=_optimizer(config, steps),
    )
    keeper = CheckpointKeeper(run.checkpoints, config.checkpoint)
    newest = resumable(run.checkpoints)
    guard = BatchGuard(run.path, config.guard, data.batch_rows)
    monitor = RunMonitor(run, title=stage, config=config, architecture=architecture, rows=data.train.order.rows)
    saturation = None if config.early_stopping is None else StopWhenSaturated(config.early_stopping)
    callbacks: list[pl.Callback] = [monitor, guard]
    if config.evaluation is not None:
        callbacks.append(_evaluation(config, run, monitor))
    if saturation is not None:
        callbacks.append(saturation)
    if config.overlap.tensor:
        callbacks.append(_tensor_overlap(config))
    with PreemptionGuard() as preemption:
        trainer = _trainer(config, data, steps, [*callbacks, StopOnSignal(preemption, keeper), keeper])
        trainer.strategy.checkpoint_io = keeper.checkpoint_io()
        if newest is not None:
            # NeMo's AutoResume does this, for its own checkpoint callback.
            trainer.ckpt_path = str(newest)
        llm.train(
            model=model,
            data=data,
            trainer=trainer,
            log=nl.NeMoLogger(
                log_dir=str(run.path),
                name="nemo",
                use_datetime_version=False,
                log_global_rank_0_only=True,
            ),
        )
    saturated = saturation is not None and saturation.is_saturated
    if trainer.global_step < steps and not saturated:
        raise Preempted(f"{stage} stopped at step {trainer.global_step} of {steps}; run the same command to continue")
    tensors = exported(trainer.strategy.megatron_parallel, architecture)
    write_hf_export(tensors, architecture, config.base, run.path / "hf")
    if trainer.global_rank == 0:
        plot_training(run.path, run.path / PICTURE)
    return {
        "steps": trainer.global_step,
        "saturated": saturated,
        "skipped_batches": guard.skipped,
        "seconds": time.monotonic() - started,
        "training_rows": data.train.order.rows,
        "hf": "hf",
    }


def _evaluation(config: SupervisedConfig, run: RunDirectory, monitor: RunMonitor) -> TrainingEvaluation:
    assert config.evaluation is not None
    return TrainingEvaluation(
        run.path,
        config.evaluation,
        base=config.base,
        seed=config.run.seed,
        longrope=config.model.longrope,
        monitor=monitor,
    )


def _tensor_overlap(config: SupervisedConfig) -> pl.Callback:
    """Tensor-parallel exchange inside Transformer Engine's layers.

    Raises:
        UserError: Transformer Engine is not here, which NeMo would pass over.
    """
    if not has_transformer_engine():
        raise UserError(
            "overlap.tensor=true on this machine",
            rule="tensor-parallel exchange is overlapped by Transformer Engine on GPUs",
            remedy="set overlap.tensor=false (`phimr doctor` tells what is there)",
        )
    return MegatronCommOverlapCallback(
        tp_comm_overlap=True,
        overlap_grad_reduce=config.overlap.grad_reduce,
        overlap_param_gather=config.overlap.param_gather,
    )


def _optimizer(config: SupervisedConfig, steps: int) -> nl.MegatronOptimizerModule:
    optim = config.optim
    half = config.model.dtype == "bf16"
    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            use_distributed_optimizer=optim.distributed,
            bf16=half,
            params_dtype=DTYPES[config.model.dtype],
        ),
        lr_scheduler=lr_schedule(optim, steps),
    )


def lr_schedule(optim: OptimConfig, steps: int) -> LRSchedulerModule:
    """NeMo's scheduler for the configured shape: linear warm-up, then cosine, linear or no decay."""
    warmup = round(optim.warmup_fraction * steps)
    if optim.schedule == "cosine":
        return CosineAnnealingScheduler(max_steps=steps, warmup_steps=warmup, constant_steps=0, min_lr=optim.min_lr)
    if optim.schedule == "linear":
        return PolynomialDecayAnnealingScheduler(
            max_steps=steps, warmup_steps=warmup, min_lr=optim.min_lr, power=LINEAR_DECAY_POWER
        )
    return WarmupPolicyScheduler(max_steps=steps, warmup_steps=warmup, min_lr=optim.min_lr)


def _trainer(
    config: SupervisedConfig, data: SupervisedDataModule, steps: int, callbacks: list[pl.Callback]
) -> nl.Trainer:
    parallel, dtype = config.parallel, DTYPES[config.model.dtype]
    on_gpu = torch.cuda.is_available()
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        process_group_backend=platform.backend(),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=config.optim.distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.overlap.grad_reduce,
            overlap_param_gather=config.overlap.param_gather,
        ),
        ckpt_async_save=config.checkpoint.asynchronous,
        gradient_as_bucket_view=True,
        replace_progress_bar=False,
    )
    validate = data.validation_steps > 0 and config.validate_every <= steps
    # Lightning counts what NeMo's steps take from the loader: micro-batches.
    validation = data.validation_steps * config.global_batch // (config.micro_batch * parallel.data)
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=parallel.world_size // nodes,
        num_nodes=nodes,
        max_steps=steps,
        strategy=strategy,
        plugins=precision_plugins(config.model),
        callbacks=callbacks,
        limit_val_batches=validation if validate else 0,
        val_check_interval=config.validate_every if validate else None,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
        use_distributed_sampler=False,
    )
