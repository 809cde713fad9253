"""One node's share of a job: `python -m phimr_nemo.jobs.node TORCHRUN-ARGUMENTS -m phimr_nemo.cli STAGE ...`.

It is torchrun (the same arguments, run in this process) with what a scheduler and a terminal need around it: versions
are checked before anything is imported, stop signals go to the workers, who save and leave, and the exit code is
theirs. torchrun alone dies of SIGUSR1, ends its workers 30 s after the others, and answers 1 to everything.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from phimr_nemo.errors import EXIT_PREEMPTED, EXIT_USER, Preempted, UserError, exit_with_message
from phimr_nemo.process.children import Relay
from phimr_nemo.process.heartbeat import Watch
from phimr_nemo.process.ranks import RankFailure, run_ranks

ONE_NODE: Final = ("1", "1:1")
"""How torchrun writes it."""
STEP_RANK: Final = "SLURM_PROCID"
"""Of a node's launcher among those of the job's step; the first is on the step's first node."""
POLL_SECONDS: Final = 0.2
STOPPED: Final = "stopped; run the same command to continue"

GENERATION: Final[Mapping[str, str]] = {"nemo-toolkit": "2.4", "megatron-core": "0.13"}
"""What the training code is written against: distribution -> major.minor."""
ALIGNER: Final[Mapping[str, str]] = {"nemo-aligner": "0.7"}
"""Of the stages in `ALIGNED` as well."""
ALIGNED: Final = ("dpo", "grpo", "distill")
REPORTED: Final = ("phimr-nemo", "torch", *GENERATION, *ALIGNER, "transformer-engine")


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Distribution -> version, of those that are installed; nothing is imported."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_versions(stage: str, found: Mapping[str, str]) -> None:
    """Refuse another generation of NeMo than the code is written against.

    Args:
        stage: what is about to run, for instance "dpo".
        found: installed distributions.

    Raises:
        UserError: one is absent or of another generation.
    """
    needed = {**GENERATION, **(ALIGNER if stage in ALIGNED else {})}
    wrong = [
        f"{name} {found.get(name, 'is absent')}"
        for name, version in needed.items()
        if found.get(name, "").split(".")[:2] != version.split(".")
    ]
    if wrong:
        raise UserError(
            f"{stage} on {platform.node()}: {', '.join(wrong)}, with {sys.executable}",
            rule=f"it runs on {', '.join(f'{name} {version}.x' for name, version in needed.items())}",
            remedy="make setup without a GPU; with one, an image made from the Dockerfile, or PHIMR_PYTHON",
        )


def run_workers(arguments: Sequence[str]) -> None:
    """Run torchrun until its workers have ended.

    Call in the main thread: there the stop signals arrive that are passed on. A worker that one of them ended before
    it could save has lost nothing, so that counts as a preemption too.

    Args:
        arguments: torchrun's.

    Raises:
        UserError, Preempted: the first worker that failed said so.
        RuntimeError: a worker failed otherwise, and is named; its own message stands above.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    # It reports a failed worker at length; the worker's own message says it better.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parsed = parse_args(list(arguments))
    if not parsed.rdzv_endpoint and parsed.nnodes in ONE_NODE:
        # As torchrun --standalone: a rendezvous of this node's own, on a free port.
        parsed.rdzv_backend, parsed.rdzv_endpoint = "c10d", "localhost:0"
    parsed.rdzv_conf = rendezvous_options(parsed.nnodes, parsed.rdzv_conf, os.environ)
    elastic, command, command_arguments = config_from_args(parsed)
    with Relay() as relay, Watch() as watch:
        outcome = _run_in_thread(
            lambda: elastic_launch(config=elastic, entrypoint=command)(*command_arguments), relay, watch
        )
    if outcome is None:
        return
    if isinstance(outcome, ChildFailedError):
        rank, failed = outcome.get_first_failure()
        first = RankFailure(rank, failed.exitcode, failed.error_file_data or {})
    else:
        first = None
    raise _what_happened(first, outcome, relay, watch) from outcome


def rendezvous_options(nodes: str, given: str, environment: Mapping[str, str]) -> str:
    """torchrun's `--rdzv-conf`, with who is the first of several nodes where Slurm has numbered them.

    torch looks for the rendezvous's name among those of the machine's first network; where it belongs to another one
    no node would open the meeting place, and all wait for it.

    Args:
        nodes: as torchrun writes it.
        given: the options so far.
        environment: of this process.
    """
    rank = environment.get(STEP_RANK)
    if nodes in ONE_NODE or rank is None or "is_host" in given:
        return given
    return ",".join(filter(None, (given, f"is_host={rank == '0'}")))


def run_copies(module: str, arguments: Sequence[str], processes: int) -> None:
    """Run a module as the ranks of this machine, each a copy of this process, until they have ended.

    As :func:`run_workers`, for a process that has imported what they need and may be copied.

    Args:
        module: its name.
        arguments: of its command line.
        processes: how many.

    Raises:
        UserError, Preempted, RuntimeError: as :func:`run_workers`.
    """
    with Relay() as relay, Watch() as watch:
        first = run_ranks(module, arguments, processes, relay, watch.look)
    if first is not None:
        raise _what_happened(first, None, relay, watch)


def _what_happened(first: RankFailure | None, outcome: BaseException | None, relay: Relay, watch: Watch) -> Exception:
    """What is said of ranks that did not finish.

    Args:
        first: that failed; None where it was none of them.
        outcome: what torchrun raised.
        relay, watch: of the launch.
    """
    if watch.still:
        named = ", ".join(map(str, watch.still))
        return RuntimeError(
            f"{platform.node()}: rank {named} stood still for {watch.seconds:g} s and was ended; "
            "run the same command to continue from the newest checkpoint"
        )
    if first is None:
        if relay.signals:
            return Preempted(STOPPED)
        return RuntimeError(f"{platform.node()}: {type(outcome).__name__}: {outcome}")
    if first.code == EXIT_PREEMPTED or relay.ended(first.code):
        return Preempted(first.told.get("preempted", STOPPED))
    if "user_error" in first.told:
        problem, rule, remedy = first.told["user_error"]
        return UserError(problem, rule=rule, remedy=remedy)
    if first.code == EXIT_USER:
        return UserError(
            f"rank {first.rank} refused its command line",
            rule="after the module come the stage and its arguments",
            remedy="correct what is named above",
        )
    return RuntimeError(f"{platform.node()}: rank {first.rank} ended with {_named(first.code)}, see above")


def _run_in_thread(function: Callable[[], Any], relay: Relay, watch: Watch) -> BaseException | None:
    """Call a function beside the main thread, which takes the signals; what it raised.

    In the main thread torch would install signal handlers of its own, which end the workers after 30 s.
    """
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        relay.tell()
        watch.look()
    return outcome[0]


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main(arguments: Sequence[str]) -> None:
    """Check, report, run.

    Raises:
        UserError, Preempted, RuntimeError: as :func:`run_workers`.
    """
    after = arguments[arguments.index("-m") + 2 :] if "-m" in arguments else []
    stage = after[0] if after else ""
    found = installed_versions(REPORTED)
    check_versions(stage, found)
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(f"{platform.node()}: start {restart}, Python {platform.python_version()}, {versions}", flush=True)
    run_workers(arguments)


if __name__ == "__main__":
    with exit_with_message():
        main(sys.argv[1:])
