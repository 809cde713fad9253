"""Run a stage: check its inputs, describe the run, call the stage in this process or in one process a rank."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, CurateConfig, ParallelConfig, PrepareConfig, load_config, to_dict, to_yaml
from phimr_nemo.config.load import flat
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.imports import lean_imports
from phimr_nemo.jobs.continuing import kept
from phimr_nemo.jobs.machine import check_default, check_machine
from phimr_nemo.jobs.node import run_workers
from phimr_nemo.jobs.preflight import preflight, record_inputs
from phimr_nemo.process.children import follow_parent
from phimr_nemo.process.heartbeat import start_beating
from phimr_nemo.process.stopping import KEPT, stoppable
from phimr_nemo.store.atomic import NO_SPACE, atomic_write_text, explain_os_errors, keep_others_from_writing
from phimr_nemo.store.runs import CONFIG_FILE, RunDirectory
from phimr_nemo.store.shards import input_hash

# Stage -> "module:function" taking the stage's config and returning the facts that close the run.
FUNCTIONS: Final[Mapping[str, str]] = {
    "base": "phimr_nemo.model.base:run_base",
    "prepare": "phimr_nemo.jobs.composed:run_prepare",
    "generate": "phimr_nemo.generate.stage:run_generate",
    "verify": "phimr_nemo.jobs.composed:run_verify",
    "curate": "phimr_nemo.data.curate.stage:run_curate",
    "pack": "phimr_nemo.data.rows.stage:run_pack",
    "midtrain": "phimr_nemo.supervised.stage:run_midtrain",
    "sft": "phimr_nemo.supervised.stage:run_sft",
    "dpo": "phimr_nemo.align.dpo.stage:run_dpo",
    "grpo": "phimr_nemo.align.grpo.stage:run_grpo",
    "evaluate": "phimr_nemo.evaluate.stage:run_evaluate",
    "export": "phimr_nemo.report.export:run_export",
}
# Another server with the same model gives the same responses.
_ENDPOINT: Final = (
    *("base_urls", "api_key_env", "concurrency", "idle_seconds", "total_seconds", "attempts", "backoff_seconds"),
    "prices",
)
_ENGINE: Final = (
    *("base_urls", "api_key_env", "in_flight", "request_seconds", "attempts", "probe_seconds", "recovery_seconds"),
    *("bucket_mb", "directory", "max_batch", "cache_gib", "tensor", "memory_share", "eager", "max_missing"),
    *(f"endpoint.{name}" for name in _ENDPOINT),
)
# Settings that a continued run may change: they do not change what is computed.
FREE_TO_CHANGE: Final = (
    "run.log_every",
    "parallel.",
    "checkpoint.",
    "micro_batch",
    "overlap.",
    "guard.",
    "evaluation.",
    "tracking.",
    "data_workers",
    "packed",
    "shard.",
    "workers",
    "verify_workers",
    "monitor.",
    *(f"{place}engine.{name}" for place in ("", "teacher.", "judge.ask.", "annotation.ask.") for name in _ENGINE),
    *(
        f"{place}.ask.max_{name}"
        for place in ("judge", "annotation")
        for name in ("requests", "total_tokens", "cost")
    ),
)
# What the libraries say about a machine without a GPU when they are imported; `phimr doctor` says it better.
IMPORT_NOTES: Final = (
    "The pynvml package is deprecated",
    "Transformer Engine and Apex are not installed",
    "transformer_engine",
    "Apex",
)
# What reports there while it is imported: no Transformer Engine, no zarr.
IMPORT_LOGGERS: Final = ("megatron", "NeMo", "nemo.collections.llm.gpt.model.megatron.hyena")
# What torch's archive writer says when the disk took less than was written; the reason is lost in its C++.
SHORT_WRITE: Final = ". unexpected pos "
CHECKED: Final = "PHIMR_CHECKED"
"""Environment variable of the ranks that this launcher starts: it has checked inputs and machine for all of them."""
# A rendezvous of this launch alone, on a free port.
ELASTIC_ARGUMENTS: Final = ("--nnodes=1", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


def run_stage(stage: str, config: Any) -> None:
    """Run a stage in this process: one of the ranks, or the only one.

    Args:
        stage: a key of :data:`phimr_nemo.config.STAGES`.
        config: its configuration.

    Raises:
        UserError: bad input, or the output holds another run.
        Preempted: the run was asked to stop and has saved its state.
    """
    run = RunDirectory(config.run.output)
    check_same_run(run, config)
    if run.is_done:
        return
    first_rank = not is_rank(config) or os.environ["RANK"] == "0"
    with contextlib.ExitStack() as claim:
        if first_rank and _works_alone(config):
            with explain_os_errors(run.path):
                claim.enter_context(run.claimed())
        _run_claimed(stage, config, run, first_rank=first_rank)


def _works_alone(config: Any) -> bool:
    """Whether two processes in one output would harm each other: shards are written whole, whoever writes them.

    Slurm starts one job of a name at a time; a lock that a lost node has left behind must not stop the next one.
    """
    decides = isinstance(config, CurateConfig | PrepareConfig) and config.shard.count == 1
    return (decides or not hasattr(config, "shard")) and "SLURM_JOB_ID" not in os.environ


def _run_claimed(stage: str, config: Any, run: RunDirectory, *, first_rank: bool) -> None:
    is_new = not (run.path / CONFIG_FILE).is_file()
    try:
        if first_rank:
            inputs = {str(path): input_hash(path) for path, _ in record_inputs(stage, config)}
            run.describe(stage=stage, config_yaml=to_yaml(config), seed=config.run.seed, facts={"inputs": inputs})
        # Libraries that write checkpoints and logs know nothing of our messages.
        with explain_os_errors(run.path):
            facts = _with_os_errors(stage_function(stage), config)
    except Preempted as stopped:
        raise _with_what_is_kept(stopped, run) from None
    except UserError:
        # Settings that were refused must not stand in the way of the corrected ones.
        if first_rank and is_new:
            run.withdraw()
        raise
    if first_rank and facts is not None:
        run.finish(**facts)


def _with_what_is_kept(stopped: Preempted, run: RunDirectory) -> Preempted:
    """The message with a line that says where the state is, unless a rank has said so."""
    return stopped if KEPT in str(stopped) else Preempted(f"{stopped}{KEPT}{kept(run.path)}")


def _with_os_errors(function: Callable[[Any], Mapping[str, Any] | None], config: Any) -> Mapping[str, Any] | None:
    """Call a stage; a full disk that a library wrapped into an error of its own comes out as the OSError it was."""
    try:
        return function(config)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in NO_SPACE:
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        if SHORT_WRITE in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def stage_function(stage: str) -> Callable[[Any], Mapping[str, Any] | None]:
    """The function behind a stage; it returns the closing facts, or None when other shards are still to come."""
    module, name = FUNCTIONS[stage].split(":")
    silence_import_notes()
    with lean_imports():
        return getattr(importlib.import_module(module), name)


def silence_import_notes() -> None:
    """Keep `IMPORT_NOTES` from the terminal, in this process and in those that it starts."""
    for note in IMPORT_NOTES:
        warnings.filterwarnings("ignore", message=f".*{note}")
    os.environ.setdefault("PYTHONWARNINGS", f"ignore:{IMPORT_NOTES[0]}")
    for name in IMPORT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def check_same_run(run: RunDirectory, config: Any) -> None:
    """An output directory belongs to one configuration.

    Raises:
        UserError: the directory was made with other settings; they are named.
    """
    import yaml

    path = run.path / CONFIG_FILE
    if not path.is_file():
        return
    before, now = flat(yaml.safe_load(path.read_text("utf-8"))), flat(to_dict(config))
    different = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if different:
        raise UserError(
            f"{run.path} holds a run with other settings ({'; '.join(different)})",
            rule="an output directory belongs to one configuration",
            remedy="choose another run.output, or remove the directory; `phimr continue` goes on from a training "
            "run's checkpoint with other settings",
        )


def start_stage(stage: str, path: Path, overrides: Sequence[str], *, is_default: bool = False) -> Any:
    """`phimr STAGE`: what every way to start a stage comes down to.

    Args:
        stage: a key of :data:`phimr_nemo.config.STAGES`.
        path: its YAML file.
        overrides: `key.sub=value` items.
        is_default: nobody has asked for this file.

    Returns:
        The resolved configuration.

    Raises:
        UserError, Preempted, RuntimeError: as :func:`launch`.
    """
    resolved: Any = load_config(STAGES[stage], path, overrides)
    if is_default:
        check_default(stage, path)
    if is_rank(resolved):
        follow_parent()
        start_beating()
    with stoppable(stage, lambda: kept(resolved.run.output)):
        if CHECKED not in os.environ:
            preflight(stage, resolved)
            check_machine(stage, resolved)
        launch(stage, resolved)
    return resolved


def launch(stage: str, config: Any) -> None:
    """Run a stage with as many processes on this machine as its layout needs.

    Raises:
        UserError: bad input; found before any process is started.
        Preempted: the run was asked to stop and has saved its state.
        RuntimeError: a process failed; its own message stands above.
    """
    keep_others_from_writing()
    parallel: ParallelConfig | None = getattr(config, "parallel", None)
    if parallel is None or parallel.world_size == 1 or is_rank(config):
        run_stage(stage, config)
        return
    run = RunDirectory(config.run.output)
    check_same_run(run, config)
    if run.is_done:
        return
    resolved = run.path / CONFIG_FILE
    is_new = not resolved.is_file()
    atomic_write_text(resolved, to_yaml(config))
    try:
        _launch_ranks(stage, resolved, parallel.world_size)
    except Preempted as stopped:
        raise _with_what_is_kept(stopped, run) from None
    except UserError:
        if is_new:
            run.withdraw()
        raise


def is_rank(config: Any) -> bool:
    """Whether torchrun has started this process as one of several; a stage without a layout is always alone."""
    return hasattr(config, "parallel") and {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _launch_ranks(stage: str, resolved: Path, processes: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = ("-m", "phimr_nemo.cli", stage, "--config", str(resolved))
    os.environ[CHECKED] = "1"
    try:
        run_workers([*ELASTIC_ARGUMENTS, f"--rdzv-id={uuid.uuid4()}", f"--nproc-per-node={processes}", *command])
    finally:
        del os.environ[CHECKED]
