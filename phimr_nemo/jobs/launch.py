"""Run a stage: check its inputs, describe the run, call the stage in this process or in one process a rank."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, ParallelConfig, load_config, to_yaml
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.imports import lean_imports
from phimr_nemo.jobs.changes import check_inputs_stayed, check_same_run, check_same_settings, finished_line
from phimr_nemo.jobs.continuing import TRAINED, kept
from phimr_nemo.jobs.machine import check_default, check_machine
from phimr_nemo.jobs.node import run_copies, run_workers
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.process.children import follow_parent
from phimr_nemo.process.heartbeat import start_beating
from phimr_nemo.process.stopping import KEPT, stoppable
from phimr_nemo.process.warm import can_fork, is_copy
from phimr_nemo.store.atomic import (
    NO_SPACE,
    atomic_write_text,
    explain_os_errors,
    keep_others_from_writing,
    remove_left_overs,
)
from phimr_nemo.store.claims import WHOLE, claimed
from phimr_nemo.store.provenance import MADE_FROM
from phimr_nemo.store.runs import CONFIG_FILE, RunDirectory

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
    "distill": "phimr_nemo.align.distill.stage:run_distill",
    "evaluate": "phimr_nemo.evaluate.stage:run_evaluate",
    "export": "phimr_nemo.report.export:run_export",
}
# What the libraries say about a machine without a GPU when they are imported; `phimr doctor` says it better.
IMPORT_NOTES: Final = (
    "The pynvml package is deprecated",
    "Transformer Engine and Apex are not installed",
    "transformer_engine",
    "Apex",
)
WRITER: Final = "torch.utils.tensorboard"
"""What process 0 of a training stage imports when it writes its first metric."""
# What reports there while it is imported: no Transformer Engine, no zarr.
IMPORT_LOGGERS: Final = ("megatron", "NeMo", "nemo.collections.llm.gpt.model.megatron.hyena")
# What torch's archive writer says when the disk took less than was written; the reason is lost in its C++.
SHORT_WRITE: Final = ". unexpected pos "
CHECKED: Final = "PHIMR_CHECKED"
"""Environment variable of the ranks that this launcher starts: it has checked inputs and machine for all of them."""
RANK_VARIABLES: Final = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
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
    first_rank = not is_rank(config) or os.environ["RANK"] == "0"
    if run.is_done:
        if first_rank:
            _say_finished(stage, run, config)
        return
    with contextlib.ExitStack() as claim:
        if first_rank:
            with explain_os_errors(run.path):
                claim.enter_context(claimed(run.path, _share(config)))
                for directory in (run.path, *filter(Path.is_dir, run.path.iterdir())):
                    remove_left_overs(directory)
        _run_claimed(stage, config, run, first_rank=first_rank)


def _say_finished(stage: str, run: RunDirectory, config: Any) -> None:
    """A finished run is not run again, if it is still what it would be.

    Raises:
        UserError: its settings or inputs have changed since.
    """
    check_same_run(stage, run, config)
    print(finished_line(stage, run, config), flush=True)


def _share(config: Any) -> tuple[int, int]:
    """This process's place among the tasks of an array, which share one output."""
    shard = getattr(config, "shard", None)
    return WHOLE if shard is None else (shard.index, shard.count)


def _run_claimed(stage: str, config: Any, run: RunDirectory, *, first_rank: bool) -> None:
    is_new = not (run.path / CONFIG_FILE).is_file()
    try:
        if first_rank:
            now = check_same_run(stage, run, config)
            facts = {MADE_FROM: now.to_json()}
            run.describe(stage=stage, config_yaml=to_yaml(config), seed=config.run.seed, facts=facts)
        # Libraries that write checkpoints and logs know nothing of our messages.
        with explain_os_errors(run.path):
            closing = _with_os_errors(stage_function(stage), config)
        if first_rank and closing is not None:
            check_inputs_stayed(stage, run, config, now)
    except (UserError, Preempted, KeyboardInterrupt) as stopped:
        # Settings that were refused must not stand in the way of the corrected ones; another rank may have refused
        # them, and this one be told to stop for it.
        if first_rank and is_new:
            run.withdraw()
        if isinstance(stopped, Preempted):
            raise _with_what_is_kept(stopped, run) from None
        raise
    if first_rank and closing is not None:
        run.finish(**closing)


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
    is_new = module not in sys.modules
    with lean_imports():
        function: Callable[[Any], Mapping[str, Any] | None] = getattr(importlib.import_module(module), name)
        if is_new:
            # Modules live as long as the process: the collector, which has been waiting, is not to walk through them.
            gc.freeze()
    return function


def import_stages(stages: Collection[str]) -> None:
    """Import what these stages use, also what they import only when they are under way.

    For a process whose copies run them: each copy would do it again.
    """
    for stage in stages:
        stage_function(stage)
    if not set(TRAINED).isdisjoint(stages):
        importlib.import_module(WRITER)
        gc.freeze()


def silence_import_notes() -> None:
    """Keep `IMPORT_NOTES` from the terminal, in this process and in those that it starts."""
    for note in IMPORT_NOTES:
        warnings.filterwarnings("ignore", message=f".*{note}")
    os.environ.setdefault("PYTHONWARNINGS", f"ignore:{IMPORT_NOTES[0]}")
    for name in IMPORT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


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
    else:
        # Another program's, whose rank this process is; libraries would believe them.
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
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
    if run.is_done:
        _say_finished(stage, run, config)
        return
    # The first rank compares the inputs, which takes a while with large weights.
    check_same_settings(run, config)
    resolved = run.path / CONFIG_FILE
    is_new = not resolved.is_file()
    with explain_os_errors(run.path), claimed(run.path):
        atomic_write_text(resolved, to_yaml(config))
    try:
        _launch_ranks(stage, resolved, parallel.world_size)
    except (UserError, Preempted) as stopped:
        # As the ranks do: settings of a run that made nothing must not stand in the way of others.
        if is_new:
            run.withdraw()
        if isinstance(stopped, Preempted):
            raise _with_what_is_kept(stopped, run) from None
        raise


def is_rank(config: Any) -> bool:
    """Whether torchrun has started this process as one of several; a stage without a layout is always alone."""
    return hasattr(config, "parallel") and {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _launch_ranks(stage: str, resolved: Path, processes: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    program, command = "phimr_nemo.cli", (stage, "--config", str(resolved))
    os.environ[CHECKED] = "1"
    try:
        if is_copy() and can_fork():
            run_copies(program, command, processes)
        else:
            rendezvous = (f"--rdzv-id={uuid.uuid4()}", f"--nproc-per-node={processes}")
            run_workers([*ELASTIC_ARGUMENTS, *rendezvous, "-m", program, *command])
    finally:
        del os.environ[CHECKED]
