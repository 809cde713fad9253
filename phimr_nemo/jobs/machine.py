"""Whether this machine can hold what a training stage would start on it, asked before the first process is started.

Nothing heavy is imported where there is no GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import DPOConfig, RoundsConfig, SupervisedConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.layout import check_world
from phimr_nemo.plan.memory import MicroBatch, largest_rank
from phimr_nemo.plan.weights import largest_state
from phimr_nemo.process.gpus import has_gpu_driver
from phimr_nemo.process.memory import GIBIBYTE

RANK_BYTES: Final = 0.9 * GIBIBYTE
"""What a rank holds beside its model: the libraries, measured with a model of 0.8 M parameters on a CPU."""
FEWEST_CORES: Final = 2
"""A parallel layout can be tried on a single core too: two processes on it harm nobody."""
CGROUP: Final = Path("/sys/fs/cgroup")
Training = (SupervisedConfig, DPOConfig, RoundsConfig)


def count_gpus() -> int:
    """GPUs that torch can use in this process."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def count_cores() -> int:
    """Cores that this process may use: its affinity and its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_words("cpu.max")
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def free_memory() -> float:
    """Bytes that can be taken without another program losing them, in this machine and this container."""
    import psutil

    free = float(psutil.virtual_memory().available)
    most, used = _cgroup_words("memory.max"), _cgroup_words("memory.current")
    if most and used and most[0].isdigit():
        free = min(free, float(most[0]) - float(used[0]) + _cgroup_cache())
    return free


def _cgroup_words(name: str) -> list[str]:
    try:
        return (CGROUP / name).read_text("utf-8").split()
    except OSError:
        return []


def _cgroup_cache() -> float:
    """Bytes of files that the kernel gives up when memory is short."""
    words = _cgroup_words("memory.stat")
    facts = dict(zip(words[::2], words[1::2], strict=False))
    return float(facts.get("inactive_file", 0))


def check_default(stage: str, preset: Path) -> None:
    """Refuse a cluster's preset that nobody asked for on a machine without a GPU.

    Args:
        stage: a training stage, or another one, which has no layout of a cluster.
        preset: the default.

    Raises:
        UserError: it is one.
    """
    if stage in ("midtrain", "sft", "dpo", "grpo", "distill") and not count_gpus():
        raise UserError(
            f"phimr {stage} without --config on a machine without a GPU",
            rule=f"the default, {preset}, is a cluster's and has to be asked for here",
            remedy=f"--config conf/{stage}/tiny.yaml to try the stage here; {_on_a_cluster(stage)}",
        )


def check_machine(stage: str, config: Any) -> None:
    """Refuse more processes than this machine has GPUs, or without any, cores and memory.

    Args:
        stage: its name.
        config: its configuration; without a layout nothing is refused.

    Raises:
        UserError: the layout does not fit, or another number of processes was started than it needs.
    """
    if not isinstance(config, Training):
        return
    parallel = config.parallel
    is_rank = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if is_rank:
        check_world(parallel, int(os.environ["WORLD_SIZE"]))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    else:
        here = parallel.world_size
    gpus = count_gpus()
    room, of_what = (gpus, "GPUs") if gpus else (max(FEWEST_CORES, count_cores()), "CPU cores and no GPU")
    if here > room:
        has = f"{gpus} GPUs" if gpus else f"{count_cores()} {of_what}"
        raise UserError(
            f"{stage} would start {here} processes on this machine, which has {has}",
            rule="one process per GPU, or without GPUs at most one per core",
            remedy=_smaller(stage, config, room),
        )
    # The other ranks of this machine may have taken their share already.
    if not gpus and not is_rank:
        _check_memory(stage, config, here)


def needed_memory(stage: str, config: SupervisedConfig | DPOConfig | RoundsConfig) -> float:
    """Bytes that one rank takes on a CPU, at least: libraries, weights, gradients, optimizer, full rows' activations.

    Args:
        stage: its name.
        config: its configuration; its base is there.
    """
    arch, parallel, model = Architecture.from_directory(config.base), config.parallel, config.model
    if stage != "midtrain" or not isinstance(config, SupervisedConfig):
        state = largest_state(arch, parallel, model.dtype, distributed=config.optim.distributed)
        return RANK_BYTES + state.total
    rank = largest_rank(
        arch,
        parallel,
        model.dtype,
        "pytorch",
        model.recompute,
        MicroBatch(sequences=config.micro_batch, length=config.sequence_length, packed=True),
        micro_batches=max(1, config.global_batch // (config.micro_batch * parallel.data)),
        distributed=config.optim.distributed,
        logits_bytes=model.logits_bytes,
        output_format=model.output_format,
    )
    return RANK_BYTES + rank.total


def _check_memory(stage: str, config: SupervisedConfig | DPOConfig | RoundsConfig, here: int) -> None:
    needed, free = here * needed_memory(stage, config), free_memory()
    if needed > free:
        raise UserError(
            f"{stage} would take at least {needed / GIBIBYTE:.1f} GiB of memory in {here} processes on this machine, "
            f"which has {free / GIBIBYTE:.1f} GiB free",
            rule="without GPUs weights, gradients, optimizer and libraries of every process are in its memory",
            remedy=f"a smaller base, or fewer processes, or end other programs; {_on_a_cluster(stage)}",
        )


def _smaller(stage: str, config: SupervisedConfig | DPOConfig | RoundsConfig, room: int) -> str:
    """A layout of at most `room` processes that the batch allows, and the other ways out."""
    parallel = config.parallel
    model = parallel.tensor * parallel.pipeline * parallel.context
    words = "" if model <= room else "parallel.tensor=1 parallel.pipeline=1 parallel.context=1 "
    if model > room:
        model = 1
        words += "parallel.sequence=false " if parallel.sequence else ""
        words += "parallel.virtual=1 " if parallel.virtual > 1 else ""
    if isinstance(config, RoundsConfig):
        batch = config.prompts_per_step
    else:
        batch = max(1, config.global_batch // config.micro_batch)
    data = next(count for count in range(max(1, room // model), 0, -1) if batch % count == 0)
    return f"{words}parallel.data={data}; --config conf/{stage}/tiny.yaml to try it here; {_on_a_cluster(stage)}"


def _on_a_cluster(stage: str) -> str:
    return f"sbatch slurm/{stage}.sh on a cluster"
