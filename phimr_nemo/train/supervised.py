"""Stages 1 and 2 on NeMo 2.0: `llm.train` with `nl.MegatronStrategy`, from one Hugging Face directory to the next."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.optim import (
    CosineAnnealingScheduler,
    LRSchedulerModule,
    PolynomialDecayAnnealingScheduler,
    WarmupPolicyScheduler,
)

from phimr_nemo.config import MidtrainConfig, OptimConfig, SFTConfig, SupervisedConfig
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.errors import Preempted
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.runs import RunDirectory
from phimr_nemo.train import platform
from phimr_nemo.train.callbacks import RunMonitor, StopOnSignal
from phimr_nemo.train.data import (
    SupervisedDataModule,
    conversation_data,
    packed_data,
    require_parent,
)
from phimr_nemo.train.distributed import PreemptionGuard, export_hf, quiet_libraries
from phimr_nemo.train.nemo_model import DTYPES, Phi4MiniModel, phi4mini_config

# Sequence lengths that suit FP8 and sequence parallelism on the GPU.
LENGTH_MULTIPLE: Final = 16
UNFINISHED_SUFFIX: Final = "-unfinished"
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
    checkpoint = nl.ModelCheckpoint(
        dirpath=run.checkpoints,
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=config.checkpoint.keep,
        save_last=False,
        every_n_train_steps=config.checkpoint.every,
        always_save_context=False,
        save_context_on_train_end=False,
        save_optim_on_train_end=True,
    )
    newest = newest_checkpoint(run.checkpoints)
    with PreemptionGuard() as guard:
        monitor = RunMonitor(run, title=stage, every=config.run.log_every)
        trainer = _trainer(config, data, steps, [monitor, StopOnSignal(guard), checkpoint])
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
            resume=None if newest is None else nl.AutoResume(resume_from_path=str(newest)),
        )
    if trainer.global_step < steps:
        raise Preempted(f"{stage} stopped at step {trainer.global_step} of {steps}; run the same command to continue")
    chunks = [chunk.module for chunk in trainer.strategy.megatron_parallel]
    export_hf(chunks, Architecture.from_directory(config.base), config.base, run.path / "hf")
    return {
        "steps": steps,
        "seconds": time.monotonic() - started,
        "training_rows": data.train.order.rows,
        "hf": "hf",
    }


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete native checkpoint, or None. NeMo marks one that is being written with a file beside it."""
    complete = [
        path
        for path in directory.glob("step=*")
        if path.is_dir() and not path.with_name(path.name + UNFINISHED_SUFFIX).exists()
    ]
    return max(complete, key=lambda path: path.stat().st_mtime, default=None)


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


def _trainer(config: SupervisedConfig, data: SupervisedDataModule, steps: int, callbacks: list[object]) -> nl.Trainer:
    parallel, dtype = config.parallel, DTYPES[config.model.dtype]
    on_gpu = torch.cuda.is_available()
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        process_group_backend=platform.backend(),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=config.optim.distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=on_gpu and config.optim.distributed,
            overlap_param_gather=on_gpu and config.optim.distributed,
        ),
        ckpt_async_save=on_gpu,
        gradient_as_bucket_view=True,
        replace_progress_bar=False,
    )
    validate = data.validation_steps > 0 and config.validate_every <= steps
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=parallel.world_size // nodes,
        num_nodes=nodes,
        max_steps=steps,
        strategy=strategy,
        plugins=[nl.MegatronMixedPrecision(precision="bf16-mixed")] if config.model.dtype == "bf16" else [],
        callbacks=callbacks,
        limit_val_batches=data.validation_steps if validate else 0,
        val_check_interval=config.validate_every if validate else None,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        enable_progress_bar=False,
        logger=False,
        use_distributed_sampler=False,
    )
