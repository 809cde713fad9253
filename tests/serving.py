"""`phimr serve` for tests: a server that is up, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import httpx
from processes import start

START_SECONDS: Final = 400
STOP_SECONDS: Final = 20


@contextlib.contextmanager
def served(
    python: Path, variables: Mapping[str, str], model: Path, log: Path, *options: str
) -> Iterator[tuple[str, int]]:
    """A server; yields its address and its process group.

    Args:
        python: the interpreter of vLLM's environment.
        variables: its environment variables.
        model: what it serves.
        log: what it says goes there.
        options: of `phimr serve`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "phimr_nemo.cli.main", "serve", str(model), "--port", str(port), *options]
    with log.open("wb") as output:
        # A group of its own: the server starts processes that would outlive it.
        server = start(command, env=dict(variables), stdout=output, stderr=output, start_new_session=True)
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
