"""Run a stage: check its inputs, describe the run, call the stage in this process or in one process a rank."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import logging
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, ParallelConfig, load_config, to_dict, to_yaml
from phimr_nemo.config.load import flat
from phimr_nemo.errors import EXIT_PREEMPTED, EXIT_USER, Preempted, UserError
from phimr_nemo.imports import lean_imports
from phimr_nemo.jobs.preflight import record_inputs
from phimr_nemo.store.atomic import NO_SPACE, atomic_write_text, explain_os_errors, keep_others_from_writing
from phimr_nemo.store.runs import CONFIG_FILE, RunDirectory
from phimr_nemo.store.shards import input_hash

# Stage -> "module:function" taking the stage's config and returning the facts that close the run.
FUNCTIONS: Final[Mapping[str, str]] = {
    "base": "phimr_nemo.model.base:run_base",
    "prepare": "phimr_nemo.data.prepare.stage:run_prepare",
    "generate": "phimr_nemo.generate.stage:run_generate",
    "verify": "phimr_nemo.verify.stage:run_verify",
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
    *(f"{place}engine.{name}" for place in ("", "teacher.") for name in _ENGINE),
    *(f"{place}.ask.endpoint.{name}" for place in ("judge", "annotation") for name in _ENDPOINT),
    *("judge.ask.max_", "annotation.ask.max_"),
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
    first_rank = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as claim:
        if first_rank and _works_alone(config):
            with explain_os_errors(run.path):
                claim.enter_context(run.claimed())
        _run_claimed(stage, config, run, first_rank=first_rank)


def _works_alone(config: Any) -> bool:
    """Whether two processes in one output would harm each other: shards are written whole, whoever writes them.

    Slurm starts one job of a name at a time; a lock that a lost node has left behind must not stop the next one.
    """
    return not hasattr(config, "shard") and "SLURM_JOB_ID" not in os.environ


def _run_claimed(stage: str, config: Any, run: RunDirectory, *, first_rank: bool) -> None:
    is_new = not (run.path / CONFIG_FILE).is_file()
    try:
        if first_rank:
            inputs = {str(path): input_hash(path) for path, _ in record_inputs(stage, config)}
            run.describe(stage=stage, config_yaml=to_yaml(config), seed=config.run.seed, facts={"inputs": inputs})
        # Libraries that write checkpoints and logs know nothing of our messages.
        with explain_os_errors(run.path):
            facts = _with_os_errors(stage_function(stage), config)
    except UserError:
        # Settings that were refused must not stand in the way of the corrected ones.
        if first_rank and is_new:
            run.withdraw()
        raise
    if first_rank and facts is not None:
        run.finish(**facts)


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
            remedy="choose another run.output, or remove the directory",
        )


def launch(stage: str, config: Any) -> None:
    """Run a stage with as many processes on this machine as its layout needs.

    Raises:
        UserError: bad input; found before any process is started.
        Preempted: the run was asked to stop and has saved its state.
        RuntimeError: a process failed; its own message stands above.
    """
    keep_others_from_writing()
    parallel: ParallelConfig | None = getattr(config, "parallel", None)
    if parallel is None or parallel.world_size == 1 or "RANK" in os.environ:
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
    except UserError:
        if is_new:
            run.withdraw()
        raise


def _launch_ranks(stage: str, resolved: Path, processes: int) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    arguments = parse_args(
        [
            *ELASTIC_ARGUMENTS,
            f"--rdzv-id={uuid.uuid4()}",
            f"--nproc-per-node={processes}",
            *("-m", "phimr_nemo.jobs.launch", stage, str(resolved)),
        ]
    )
    # It reports a failed rank at length; the rank's own message says it better.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    elastic, command, command_arguments = config_from_args(arguments)
    try:
        elastic_launch(config=elastic, entrypoint=command)(*command_arguments)
    except SignalException as error:
        raise Preempted(f"{stage} was stopped; run the same command to continue") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_PREEMPTED:
            raise Preempted(
                f"{stage} was stopped and has saved its state; run the same command to continue"
            ) from error
        if failure.exitcode == EXIT_USER:
            problem, rule, remedy = json.loads(failure.message)
            raise UserError(problem, rule=rule, remedy=remedy) from error
        raise RuntimeError(f"{stage}: rank {rank} ended with exit code {failure.exitcode}, see above") from error


def main(arguments: list[str]) -> int:
    """`python -m phimr_nemo.jobs.launch STAGE CONFIG`: one rank of a stage. Returns the exit code."""
    stage, path = arguments
    try:
        run_stage(stage, load_config(STAGES[stage], Path(path)))
    except UserError as error:
        _tell(error)
        return EXIT_USER
    except Preempted as stopped:
        print(str(stopped), file=sys.stderr)
        return EXIT_PREEMPTED
    return 0


def _tell(error: UserError) -> None:
    """Hand an error to the process that started the ranks, so that it is shown once."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        print(f"error: {error}", file=sys.stderr)
        return
    message = json.dumps([error.problem, error.rule, error.remedy])
    Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), "utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
