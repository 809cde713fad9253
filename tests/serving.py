"""`phimr serve` and other servers for tests: up, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import httpx
from processes import start

START_SECONDS: Final = 400
STOP_SECONDS: Final = 20


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(
    python: Path, variables: Mapping[str, str], model: Path, log: Path, *options: str
) -> Iterator[tuple[str, int]]:
    """`phimr serve`; yields its address and its process group.

    Args:
        python: the interpreter of vLLM's environment.
        variables: its environment variables.
        model: what it serves.
        log: what it says goes there.
        options: of `phimr serve`.
    """
    port = free_port()
    command = [str(python), "-m", "phimr_nemo.cli.main", "serve", str(model), "--port", str(port), *options]
    with up(command, variables, port, log) as found:
        yield found


@contextlib.contextmanager
def up(
    command: Sequence[str], variables: Mapping[str, str], port: int, log: Path, cwd: Path | None = None
) -> Iterator[tuple[str, int]]:
    """A server that a command starts; yields its address and its process group.

    Args:
        command: its arguments.
        variables: its environment variables.
        port: where it listens.
        log: what it says goes there.
        cwd: where it is started.
    """
    with log.open("wb") as output:
        # A group of its own: the server starts processes that would outlive it.
        server = start(command, env=dict(variables), stdout=output, stderr=output, start_new_session=True, cwd=cwd)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_SECONDS):
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                    break
            time.sleep(1.0)
        yield url, server.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
