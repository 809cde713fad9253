"""The parts that NeMo 2.0 trains with, from our configuration: optimizer, learning-rate schedule, strategy, trainer.

Every function takes `make`, which is handed a class and its arguments: :func:`call` makes the object here and now, as
`phimr` does; `nemo_run.Config` makes the description of it that a NeMo-Run recipe is built of. So both are one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl

from phimr_nemo.config import SupervisedConfig
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.supervised.schedule import Schedule
from phimr_nemo.training.optimizer import LOSS_SCALE
from phimr_nemo.training.precision import precision_plugins

Make = Callable[..., Any]
"""(class, **arguments) -> the object, or a description of it."""


def call(kind: Callable[..., Any], *values: Any, **arguments: Any) -> Any:
    """The object itself."""
    return kind(*values, **arguments)


def described(value: Any, make: Make) -> Any:
    """A configuration with its dataclasses and paths as descriptions; with :func:`call` a copy of itself."""
    if is_dataclass(value) and not isinstance(value, type):
        return make(type(value), **{f.name: described(getattr(value, f.name), make) for f in fields(value)})
    return make(Path, str(value)) if isinstance(value, Path) else value


def optimizer(config: SupervisedConfig, steps: int, make: Make = call) -> Any:
    """Megatron's Adam with its schedule.

    Args:
        config: of the stage.
        steps: optimizer steps of the whole run.
        make: see the module.
    """
    optim = config.optim
    return make(
        nl.MegatronOptimizerModule,
        config=make(
            OptimizerConfig,
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            use_distributed_optimizer=optim.distributed,
            bf16=config.model.dtype == "bf16",
            params_dtype=torch_dtype(config.model.dtype),
            **(LOSS_SCALE if config.model.dtype == "fp16" else {}),
        ),
        lr_scheduler=make(Schedule, optim=described(optim, make), max_steps=steps),
    )


def strategy(config: SupervisedConfig, *, on_gpu: bool, make: Make = call) -> Any:
    """How the model is split over processes.

    Args:
        config: of the stage.
        on_gpu: whether the processes have GPUs.
        make: see the module.
    """
    parallel = config.parallel
    return make(
        nl.MegatronStrategy,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=torch_dtype(config.model.dtype),
        process_group_backend="nccl" if on_gpu else "gloo",
        ddp=make(
            DistributedDataParallelConfig,
            use_distributed_optimizer=config.optim.distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.overlap.grad_reduce,
            overlap_param_gather=config.overlap.param_gather,
        ),
        ckpt_async_save=config.checkpoint.asynchronous,
        gradient_as_bucket_view=True,
        replace_progress_bar=False,
    )


def trainer(
    config: SupervisedConfig,
    *,
    steps: int,
    validation_steps: int,
    nodes: int,
    on_gpu: bool,
    callbacks: list[Any],
    make: Make = call,
    **changes: Any,
) -> Any:
    """NeMo's trainer.

    Args:
        config: of the stage.
        steps: optimizer steps of the whole run.
        validation_steps: global batches of the validation rows; 0 = no validation.
        nodes: machines, with equally many processes each.
        on_gpu: whether the processes have GPUs.
        callbacks: (descriptions of) Lightning's callbacks.
        make: see the module.
        changes: arguments of the trainer that replace ours.
    """
    parallel = config.parallel
    validate = validation_steps > 0 and config.validate_every <= steps
    # Lightning counts what NeMo's steps take from the loader: micro-batches.
    validation = validation_steps * config.global_batch // (config.micro_batch * parallel.data)
    arguments = {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": parallel.world_size // nodes,
        "num_nodes": nodes,
        "max_steps": steps,
        "strategy": strategy(config, on_gpu=on_gpu, make=make),
        "plugins": precision_plugins(config.model, make),
        "callbacks": callbacks,
        "limit_val_batches": validation if validate else 0,
        "val_check_interval": config.validate_every if validate else None,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "logger": False,
        "use_distributed_sampler": False,
    }
    return make(nl.Trainer, **(arguments | changes))


def tensor_overlap(config: SupervisedConfig, make: Make = call) -> Any:
    """The callback for tensor-parallel exchange inside Transformer Engine's layers."""
    # Its module and nemo.collections.llm import one another: the latter has to come first.
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    return make(
        MegatronCommOverlapCallback,
        tp_comm_overlap=True,
        overlap_grad_reduce=config.overlap.grad_reduce,
        overlap_param_gather=config.overlap.param_gather,
    )
