"""What every training stage does around its trainer: start the processes, stop in time, export the result."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.layout import check_world
from phimr_nemo.process import stopping
from phimr_nemo.training import platform

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.model.origin import Origin

NEMO_LIMIT: Final = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
"""NeMo's strategy takes the limit of torch's group, whatever its backend, from this variable."""

SILENT_LOGGERS: Final = ("megatron.core.rerun_state_machine",)
"""They warn about a feature that is off."""

WAITING_HOURS: Final = 12.0
"""Longer than any work that one process does while the others wait, and shorter than most jobs."""

NOISY_LOGGERS: Final = (
    "nemo_logger",
    "megatron",
    "megatron.core",
    "nemo",
    "nv_one_logger",
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning",
    "lightning_fabric",
)


def start_process_group(parallel: ParallelConfig, seed: int) -> None:
    """Start torch.distributed and Megatron's groups, and seed this process. Safe to call again.

    Under torchrun or Slurm the environment holds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them
    this is a world of one process. The backend is nccl with CUDA, else gloo.

    Args:
        parallel: the layout; its product is the number of processes.
        seed: seeds torch and Megatron's per-layout random states.

    Raises:
        UserError: another number of processes was started than the layout needs.
    """
    platform.prepare()
    quiet_libraries()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    limit_collectives(parallel)
    _start_torch(parallel)
    if _is_other_layout(parallel):
        parallel_state.destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            context_parallel_size=parallel.context,
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def stop_process_group() -> None:
    """Undo :func:`start_process_group`; nothing to do when it was not called."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _start_torch(parallel: ParallelConfig) -> None:
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_world(parallel, world)
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # NCCL's own limit is 10 minutes and gloo's 30.
    limit = timedelta(minutes=parallel.timeout_minutes)
    if world > 1:
        dist.init_process_group(platform.backend(), timeout=limit)
    else:
        # In memory: a lone process needs no port, and two of them on one machine never meet.
        dist.init_process_group(platform.backend(), timeout=limit, store=dist.HashStore(), rank=0, world_size=1)
    # Not at the end of a stage: under torchrun a second start would meet the first one's addresses in the store.
    atexit.register(stop_process_group)


def limit_collectives(parallel: ParallelConfig) -> None:
    """Give the groups that Megatron and NeMo start later the configured limit; NeMo has no option for either."""
    from megatron.core import parallel_state

    make: Any = parallel_state.initialize_model_parallel
    plain = make.func if isinstance(make, functools.partial) else make
    parallel_state.initialize_model_parallel = functools.partial(
        plain, distributed_timeout_minutes=parallel.timeout_minutes
    )
    os.environ[NEMO_LIMIT] = str(math.ceil(60 * parallel.timeout_minutes))


def wait_for_all(what: str, *, hours: float = WAITING_HOURS) -> None:
    """Wait until every process is here, after work that may take them unequal times (collective).

    Over gloo, also where tensors go over NCCL, so that a straggler meets this limit and not the collectives', and
    no GPU spins meanwhile.

    Args:
        what: the work, for the message.
        hours: the limit.

    Raises:
        RuntimeError: some did not come in time; the message of the first process numbers them.
    """
    if dist.get_world_size() == 1:
        return
    try:
        dist.monitored_barrier(_waiting_group(dist.group.WORLD), timedelta(hours=hours), wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(f"processes were waited for {hours:g} h: {what}; {error}") from error


@functools.lru_cache(maxsize=1)
def _waiting_group(world: dist.ProcessGroup) -> dist.ProcessGroup:  # noqa: ARG001 - one for each world
    return dist.new_group(backend="gloo", timeout=timedelta(hours=WAITING_HOURS))


def _is_other_layout(parallel: ParallelConfig) -> bool:
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return False
    current = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    return current != (parallel.tensor, parallel.pipeline, parallel.context)


def quiet_libraries() -> None:
    """NeMo and Megatron report at WARNING and above only; their import-time notes say nothing to a user."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        for module in ("nemo", "megatron", "nemo_aligner", "torch", "lightning"):
            warnings.filterwarnings("ignore", category=category, module=module)


class PreemptionGuard:
    """Remembers stop signals instead of ending from them. Use as a context manager.

    The trainer asks :meth:`stop_agreed` after every step, saves its state when the answer is yes, and raises
    :class:`phimr_nemo.errors.Preempted`.
    """

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def __enter__(self) -> PreemptionGuard:
        self._open.enter_context(stopping.deferred())
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PreemptionGuard:
        """The same one: NeMo copies a trainer's callbacks to describe them, and signals are the process's."""
        return self

    def install(self) -> None:
        """Take the signals over (again): a trainer may have put its own handlers in front."""
        stopping.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return stopping.told()

    def stop_agreed(self) -> bool:
        """Whether any process was told to stop. Collective: every process asks, and all get one answer."""
        flag = torch.tensor([int(self.requested)], device=platform.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def exported(parallel: Any, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The current weights under their Hugging Face names, whole, on every rank (collective).

    Args:
        parallel: NeMo's `strategy.megatron_parallel`.
        arch: the model.
    """
    from phimr_nemo.model.megatron.convert import export_tensors

    if parallel.ddp_config.use_distributed_optimizer and parallel.ddp_config.overlap_param_gather:
        # The last update is gathered by the next forward pass, which may not come.
        parallel.force_param_sync()
    return export_tensors([unwrapped(chunk.module) for chunk in parallel], arch)


def export_hf(models: Sequence[nn.Module], arch: Architecture, base: Path, target: Path, origin: Origin) -> None:
    """Write the trained model as a Hugging Face directory. Collective; process 0 writes.

    Args:
        models: this process's model chunks, with or without Megatron's wrappers.
        arch, base, target, origin: as for :func:`write_hf_export`.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    from phimr_nemo.model.megatron.convert import export_tensors

    write_hf_export(export_tensors([unwrapped(model) for model in models], arch), arch, base, target, origin)


def write_hf_export(
    tensors: Iterator[tuple[str, Tensor]], arch: Architecture, base: Path, target: Path, origin: Origin
) -> None:
    """Write exported weights as a Hugging Face directory. Collective; process 0 writes.

    Args:
        tensors: what every rank iterates over.
        arch: the model.
        base: the directory whose tokenizer and chat template go with it.
        target: the new directory. One left there by a run that died right after its export is replaced.
        origin: longest sequence and LongRoPE policy of the run, which stand in the directory's config.json.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    from phimr_nemo.model.files.hf import write_hf_directory

    if dist.get_rank() == 0:
        if target.exists():
            shutil.rmtree(target)
        write_hf_directory(target, arch, tensors, tokenizer_from=base, origin=origin)
    else:
        for _ in tensors:
            continue
    wait_for_all(f"{target} is written")


def export_checkpoint(checkpoint: Path, base: Path, target: Path, origin: Origin) -> None:
    """Write the weights of a native checkpoint as a Hugging Face directory. Collective; process 0 writes.

    Args:
        checkpoint: `step=N` of a run, whole.
        base, target, origin: as for :func:`write_hf_export`.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    from phimr_nemo.model.files.checkpoints import open_checkpoint, write_hf

    if dist.get_rank() == 0:
        if target.exists():
            shutil.rmtree(target)
        write_hf(target, open_checkpoint(checkpoint, base), origin)
    wait_for_all(f"{target} is written")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside Megatron's DistributedDataParallel and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model
