"""A rollout server of a job: `python -m phimr_nemo.jobs.server_node --stage STAGE --config FILE KEY=VALUE ...`.

It reads from the run's configuration what `phimr serve` must be told, listens on the port after the ones of the other
servers on its node, and starts the server again when it dies: the trainer gives a new one the current weights.
Colocated servers share the GPUs of their node evenly among them.
Runs in the environment of vLLM or TensorRT-LLM, whichever the run's `engine.kind` names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from phimr_nemo.config import STAGES, RoundsConfig, ServerEngine, load_config
from phimr_nemo.errors import EXIT_USER, UserError, exit_with_message

FIRST_PORT: Final = 8000
"""As in slurm/common.sh."""
RESTART_SECONDS: Final = 5.0
GPUS_ON_NODE: Final = "SLURM_GPUS_ON_NODE"
ENGINES: Final = {"vllm_server": "vllm", "trtllm_server": "trtllm"}
"""engine.kind -> the engine of `phimr serve`."""


def serve_arguments(config: RoundsConfig, number: int, gpus: int = 1) -> list[str]:
    """The arguments of `phimr serve` for a run.

    Args:
        config: the trainer's.
        number: of the server on its node, from 0.
        gpus: of the server.

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
    options = [] if engine.directory is None else ["--weights-directory", str(engine.directory)]
    if engine.memory_share is not None:
        options += ["--memory-share", str(engine.memory_share)]
    if engine.colocated:
        options += ["--tensor", str(gpus), "--colocated"]
    return [
        *(str(config.base), "--engine", ENGINES[engine.kind], "--max-length", str(config.sequence_length)),
        *("--dtype", engine.dtype or config.model.dtype),
        *("--host", "0.0.0.0", "--port", str(FIRST_PORT + number), "--api-key-env", engine.api_key_env),
        *("--longrope", config.model.longrope, *options),
    ]


def own_gpus(number: int, servers: int, environment: Mapping[str, str]) -> list[str]:
    """The GPUs of one of the servers that share those of a node with the trainer; none where there are none.

    Args:
        number: of the server, from 0.
        servers: on the node.
        environment: says which GPUs there are.

    Raises:
        UserError: they cannot be shared evenly.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(int(environment.get(GPUS_ON_NODE) or 0))]
    each, rest = divmod(len(names), servers)
    if names and (rest or not each):
        raise UserError(
            f"{servers} colocated servers on a node with {len(names)} GPUs",
            rule="each has as many of the trainer's GPUs as the others, and spreads the model over them",
            remedy=f"PHIMR_SERVERS_PER_NODE={len(names)}",
        )
    return names[number * each : (number + 1) * each]


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
    servers: Annotated[int, typer.Option(min=1, help="Of this node.")] = 1,
) -> None:
    """Serve the base of a run of rounds."""
    resolved = load_config(STAGES[stage], config, overrides or [])
    number = int(os.environ.get("SLURM_LOCALID", "0"))
    gpus = 1
    # Servers of their own step have been given a GPU each by Slurm.
    if isinstance(resolved.engine, ServerEngine) and resolved.engine.colocated:
        mine = own_gpus(number, servers, os.environ)
        if mine:
            os.environ["CUDA_VISIBLE_DEVICES"], gpus = ",".join(mine), len(mine)
    words = serve_arguments(resolved, number, gpus)
    raise typer.Exit(keep_running([sys.executable, "-m", "phimr_nemo.cli", "serve", *words]))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    with exit_with_message():
        app()
