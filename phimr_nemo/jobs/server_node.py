"""A rollout server of a job: `python -m phimr_nemo.jobs.server_node --stage STAGE --config FILE KEY=VALUE ...`.

It reads from the run's configuration what `phimr serve` must be told, listens on the port after the ones of the other
servers on its node, and starts the server again when it dies: the trainer gives a new one the current weights.
Runs in the environment of vLLM or TensorRT-LLM, whichever the run's `engine.kind` names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from phimr_nemo.config import STAGES, RoundsConfig, ServerEngine, load_config
from phimr_nemo.errors import EXIT_USER, UserError, exit_with_message

FIRST_PORT: Final = 8000
"""As in slurm/common.sh."""
RESTART_SECONDS: Final = 5.0
ENGINES: Final = {"vllm_server": "vllm", "trtllm_server": "trtllm"}
"""engine.kind -> the engine of `phimr serve`."""


def serve_arguments(config: RoundsConfig, number: int) -> list[str]:
    """The arguments of `phimr serve` for a run.

    Args:
        config: the trainer's.
        number: of the server on its node, from 0.

    Raises:
        UserError: the run samples in the trainer's processes, or its servers have no key.
    """
    engine = config.engine
    if not isinstance(engine, ServerEngine):
        raise UserError(
            f"engine.kind={engine.kind} needs no servers",
            rule=f"servers serve runs with engine.kind={' or '.join(ENGINES)}",
            remedy="set it, or PHIMR_SERVER_NODES=0",
        )
    if engine.api_key_env is None:
        raise UserError(
            "engine.api_key_env is not set",
            rule="a server that other nodes reach has a key",
            remedy="name the environment variable that holds it: engine.api_key_env=PHIMR_KEY",
        )
    directory = [] if engine.directory is None else ["--weights-directory", str(engine.directory)]
    return [
        *(str(config.base), "--engine", ENGINES[engine.kind], "--max-length", str(config.sequence_length)),
        *("--dtype", engine.dtype or config.model.dtype),
        *("--host", "0.0.0.0", "--port", str(FIRST_PORT + number), "--api-key-env", engine.api_key_env),
        *("--longrope", config.model.longrope, *directory),
    ]


def keep_running(command: Sequence[str]) -> int:
    """Run a server until this process is told to stop, and start it again when it ends by itself.

    Must be called in the main thread. Returns 0, or 2 when the server refuses its input: that would not change.

    Args:
        command: the server's.
    """
    told = threading.Event()
    process: subprocess.Popen[bytes] | None = None

    def stop(*_: object) -> None:
        told.set()
        if process is not None:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    while not told.is_set():
        process = subprocess.Popen(command)
        code = process.wait()
        if code == EXIT_USER:
            return EXIT_USER
        if not told.is_set():
            print(f"the rollout server ended with exit code {code}; starting it again", file=sys.stderr, flush=True)
            told.wait(RESTART_SECONDS)
    return 0


def main(
    config: Annotated[Path, typer.Option("--config", help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The run's.")] = None,
    stage: Annotated[str, typer.Option(help="The run's.")] = "grpo",
) -> None:
    """Serve the base of a run of rounds."""
    resolved = load_config(STAGES[stage], config, overrides or [])
    words = serve_arguments(resolved, int(os.environ.get("SLURM_LOCALID", "0")))
    raise typer.Exit(keep_running([sys.executable, "-m", "phimr_nemo.cli", "serve", *words]))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    with exit_with_message():
        app()
