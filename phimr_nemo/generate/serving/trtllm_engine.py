"""`trtllm-serve` (TensorRT-LLM's own server) as a child process: started on a model directory, asked, and ended.

Nothing of TensorRT-LLM is imported: its command line and its HTTP interface are all that is relied on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.served import Served
from phimr_nemo.process.children import dying_with_parent

PROGRAM: Final = "trtllm-serve"
HEALTH: Final = "/health"
COMPLETIONS: Final = "/v1/completions"
LOOPBACK: Final = "127.0.0.1"
START_SECONDS: Final = 540.0
"""Less than the trainer waits for the end of an update (`weightsync.STEP_SECONDS`)."""
POLL_SECONDS: Final = 0.2
HEALTH_SECONDS: Final = 10.0
STOP_SECONDS: Final = 15.0
"""Less than a scheduler leaves between SIGTERM and SIGKILL."""


class EngineFailed(Exception):
    """trtllm-serve did not come up, is gone, or was stopped before it had answered."""


def find_program() -> str:
    """Where `trtllm-serve` is: in this interpreter's environment, or on the path.

    Raises:
        UserError: it is in neither.
    """
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(PROGRAM, path=places)
    if found is None:
        raise UserError(
            f"phimr serve --engine trtllm: there is no command {PROGRAM}",
            rule="TensorRT-LLM has an environment or a container of its own, in which this command runs",
            remedy="run it there, or serve with vLLM (--engine vllm, engine.kind=vllm_server)",
        )
    return found


def engine_command(program: str, served: Served, model: Path, port: int) -> list[str]:
    """The command line that serves a directory, to this machine alone."""
    return [
        *(program, str(model), "--backend", "pytorch", "--host", LOOPBACK, "--port", str(port)),
        *("--tp_size", str(served.tensor), "--max_seq_len", str(served.max_length)),
        *("--max_batch_size", str(served.max_batch)),
        *("--kv_cache_free_gpu_memory_fraction", str(served.memory_share)),
    ]


@contextlib.asynccontextmanager
async def running(program: str, served: Served, model: Path) -> AsyncIterator[TrtllmEngine]:
    """A server of one directory, from the moment that it is ready; outside, nothing of it is left.

    Raises:
        EngineFailed: it ended, or was not ready in time.
    """
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *engine_command(program, served, model, port),
        env={name: value for name, value in os.environ.items() if name != served.api_key_env},
        # A session of its own, so that what it starts can be ended with it.
        start_new_session=True,
        preexec_fn=dying_with_parent(),
    )
    async with httpx.AsyncClient(
        base_url=f"http://{LOOPBACK}:{port}",
        timeout=httpx.Timeout(None, connect=HEALTH_SECONDS),
        # None is kept open: it could be closed from the other side at the moment of the next request.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    ) as client:
        engine = TrtllmEngine(process, client, model.name)
        try:
            await engine.until_ready()
            yield engine
        finally:
            await engine.stop()


class TrtllmEngine:
    """A running trtllm-serve. Made by :func:`running`.

    Args:
        process: its own, the leader of its session.
        client: for its address.
        name: of the model, as it calls it.
    """

    def __init__(self, process: asyncio.subprocess.Process, client: httpx.AsyncClient, name: str) -> None:
        self._process, self._client, self.name = process, client, name
        self._stopping = asyncio.Event()

    async def until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            EngineFailed: it ended, or took too long.
        """
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while not await self.is_healthy():
            if self._process.returncode is not None:
                raise EngineFailed(f"{PROGRAM} ended with exit code {self._process.returncode} before it served")
            if asyncio.get_running_loop().time() > deadline:
                raise EngineFailed(f"{PROGRAM} did not serve within {START_SECONDS:g} s")
            await asyncio.sleep(POLL_SECONDS)

    async def is_healthy(self) -> bool:
        """Whether it lives and says that it is ready."""
        try:
            response = await self._client.get(HEALTH, timeout=HEALTH_SECONDS)
        except httpx.TransportError:
            return False
        # Another process may listen where one that has ended did.
        return response.status_code == httpx.codes.OK and self._process.returncode is None

    async def complete(self, body: Mapping[str, Any], given_up: Coroutine[Any, Any, None]) -> httpx.Response:
        """What it answers to a request for a completion.

        Args:
            body: the request.
            given_up: ends when nobody waits for the answer any more.

        Raises:
            EngineFailed: it died or was stopped, or nobody waits.
        """
        asked = asyncio.ensure_future(self._client.post(COMPLETIONS, json=body))
        ends = [asyncio.ensure_future(self._stopping.wait()), asyncio.ensure_future(given_up)]
        try:
            await asyncio.wait({asked, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise EngineFailed("the request was aborted")
            return asked.result()
        except httpx.TransportError as error:
            raise EngineFailed(f"{PROGRAM} broke off ({type(error).__name__})") from error
        finally:
            for task in (asked, *ends):
                task.cancel()

    async def ended(self) -> int:
        """Wait until it ends by itself; its exit code."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End it and all that it started: SIGTERM, and after a while SIGKILL."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        # Also what outlived its leader.
        self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        port: int = found.getsockname()[1]
        return port
