"""One node's share of a cluster job: `python -m phimr_nemo.jobs.node TORCHRUN-ARGUMENTS -m recipes.STAGE ...`.

It is torchrun (the same arguments, run in this process) with what a scheduler needs around it: versions are checked
before anything is imported, SIGUSR1 and SIGTERM go to the workers, who save and leave, and the exit code is theirs.
torchrun alone dies of the one, ends its workers 30 s after the other, and answers 1 to everything.
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

from phimr_nemo.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_PREEMPTED, EXIT_USER, UserError

STOP_SIGNALS: Final = (signal.SIGUSR1, signal.SIGTERM)
"""Slurm's before the end of the time limit, and at a preemption."""
POLL_SECONDS: Final = 0.2

GENERATION: Final[Mapping[str, str]] = {"nemo-toolkit": "2.4", "megatron-core": "0.13"}
"""What the training code is written against: distribution -> major.minor."""
ALIGNER: Final[Mapping[str, str]] = {"nemo-aligner": "0.7"}
"""Of the stages in `ALIGNED` as well."""
ALIGNED: Final = ("recipes.dpo", "recipes.grpo")
REPORTED: Final = ("phimr-nemo", "torch", *GENERATION, *ALIGNER, "transformer-engine")


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Distribution -> version, of those that are installed; nothing is imported."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_versions(module: str, found: Mapping[str, str]) -> None:
    """Refuse another generation of NeMo than the code is written against.

    Args:
        module: what is about to run, for instance "recipes.dpo".
        found: installed distributions.

    Raises:
        UserError: one is absent or of another generation.
    """
    needed = {**GENERATION, **(ALIGNER if module in ALIGNED else {})}
    wrong = [
        f"{name} {found.get(name, 'is absent')}"
        for name, version in needed.items()
        if found.get(name, "").split(".")[:2] != version.split(".")
    ]
    if wrong:
        raise UserError(
            f"{platform.node()}: {', '.join(wrong)}, with {sys.executable}",
            rule=f"{module} needs {', '.join(f'{name} {version}.x' for name, version in needed.items())}",
            remedy="make setup without a GPU; with one, an image made from the Dockerfile, or PHIMR_PYTHON",
        )


def run_workers(arguments: Sequence[str]) -> int:
    """Run torchrun until its workers have ended; the exit code is that of the first worker that failed.

    Must be called in the main thread. A worker that a stop signal ended before it could save has lost nothing, so
    that counts as a preemption too.

    Args:
        arguments: torchrun's.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    # It reports a failed worker at length; the worker's own message says it better.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    elastic, command, command_arguments = config_from_args(parse_args(list(arguments)))
    stops: list[int] = []
    outcome = _run_in_thread(lambda: elastic_launch(config=elastic, entrypoint=command)(*command_arguments), stops)
    if outcome is None:
        return EXIT_DONE
    if not isinstance(outcome, ChildFailedError):
        print(f"{platform.node()}: {type(outcome).__name__}: {outcome}", file=sys.stderr)
        return EXIT_PREEMPTED if stops else EXIT_INTERNAL
    rank, failure = outcome.get_first_failure()
    if failure.exitcode in (EXIT_USER, EXIT_PREEMPTED):
        return int(failure.exitcode)
    if stops and -failure.exitcode in STOP_SIGNALS:
        return EXIT_PREEMPTED
    print(f"{platform.node()}: rank {rank} ended with {_named(failure.exitcode)}", file=sys.stderr)
    return EXIT_INTERNAL


def _run_in_thread(function: Callable[[], Any], stops: list[int]) -> BaseException | None:
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

    pending: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: pending.append(number)) for number in STOP_SIGNALS}
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if pending:
                stops.extend(pending)
                pending.clear()
                _tell_workers()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return outcome[0]


def _tell_workers() -> None:
    import psutil

    for worker in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGUSR1)


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main(arguments: Sequence[str]) -> int:
    """Check, report, run. Returns the exit code."""
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments else ""
    found = installed_versions(REPORTED)
    try:
        check_versions(module, found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(f"{platform.node()}: start {restart}, Python {platform.python_version()}, {versions}", flush=True)
    return run_workers(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
