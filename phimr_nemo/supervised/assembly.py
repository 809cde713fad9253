"""The parts that NeMo 2.0 trains with, from our configuration: optimizer, learning-rate schedule, strategy, trainer.

Every function takes `make`, which is handed a class and its arguments: :func:`call` makes the object here and now, as
`phimr` does; `nemo_run.Config` makes the description of it that a NeMo-Run recipe is built of. So both are one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import (
    CosineAnnealingScheduler,
    PolynomialDecayAnnealingScheduler,
    WarmupPolicyScheduler,
)

from phimr_nemo.config import OptimConfig, SupervisedConfig
from phimr_nemo.supervised.nemo_model import DTYPES
from phimr_nemo.training.precision import precision_plugins

LINEAR_DECAY_POWER: Final = 1.0

Make = Callable[..., Any]
"""(class, **arguments) -> the object, or a description of it."""


def call(kind: Callable[..., Any], **arguments: Any) -> Any:
    """The object itself."""
    return kind(**arguments)


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
            params_dtype=DTYPES[config.model.dtype],
        ),
        lr_scheduler=lr_schedule(optim, steps, make),
    )


def lr_schedule(optim: OptimConfig, steps: int, make: Make = call) -> Any:
    """NeMo's scheduler for the configured shape: linear warm-up, then cosine, linear or no decay."""
    length = {"max_steps": steps, "warmup_steps": round(optim.warmup_fraction * steps), "min_lr": optim.min_lr}
    if optim.schedule == "cosine":
        return make(CosineAnnealingScheduler, constant_steps=0, **length)
    if optim.schedule == "linear":
        return make(PolynomialDecayAnnealingScheduler, power=LINEAR_DECAY_POWER, **length)
    return make(WarmupPolicyScheduler, **length)


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
        pipeline_dtype=DTYPES[config.model.dtype],
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
