"""TensorRT-LLM as a rollout server: `phimr serve --engine trtllm`. Runs in TensorRT-LLM's environment.

A server of ours stands in front of `trtllm-serve` and speaks what `phimr serve` speaks with vLLM. TensorRT-LLM's HTTP
interface takes no weights from other GPUs or nodes, so new ones become a model directory, on which trtllm-serve is
started anew. Before the first weights have come there is nothing to sample with, and it is not started.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import httpx
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.receiving import guard, weight_routes
from phimr_nemo.generate.serving.served import Served, api_key
from phimr_nemo.generate.serving.trtllm_engine import EngineFailed, TrtllmEngine, running
from phimr_nemo.generate.serving.vllm import check_longrope
from phimr_nemo.generate.serving.weights import (
    GENERATE,
    INCOMPLETE,
    RAW_LOGPROBS,
    UNSYNCED,
    Arrivals,
    Identity,
    WrongWeights,
    shared_memory,
    tensors_of,
    tokenizer_hash,
)
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.model.files.companions import write_model_files
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.files.shards import tensor_places, write_index
from phimr_nemo.model.table import tensor_shapes

RESTARTS: Final = 3
"""How often trtllm-serve is started again on the same weights when it dies."""
PREFIX: Final = "phimr-refit-"
LOCK: Final = "lock"
BUCKET_SUFFIX: Final = ".safetensors"
GRACE_SECONDS: Final = 1
"""What responses under way get when the server is told to end."""
BAD_GATEWAY: Final = 502
UNAVAILABLE: Final = 503
SHOWN: Final = 300
"""Characters of trtllm-serve's refusal."""


class Sampling(BaseModel):
    """What `sampling_params` may hold: only what this server can keep."""

    model_config = ConfigDict(extra="forbid")

    # trtllm-serve returns log-probabilities before the temperature: those of the distribution sampled from at 1 only.
    temperature: Annotated[float, Field(ge=1.0, le=1.0)]
    max_tokens: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    stop_token_ids: list[int]
    ignore_eos: Literal[True]
    logprobs: Literal[0]
    detokenize: Literal[False]


class Asked(BaseModel):
    """A request for one response."""

    model_config = ConfigDict(extra="forbid")

    token_ids: Annotated[list[int], Field(min_length=1)]
    sampling_params: Sampling


def completion_request(asked: Asked, name: str) -> dict[str, Any]:
    """The same for trtllm-serve.

    Args:
        asked: the request.
        name: of the model.
    """
    params = asked.sampling_params
    return {
        "model": name,
        "prompt": asked.token_ids,
        "n": 1,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": 1.0,
        "seed": params.seed,
        "stop_token_ids": params.stop_token_ids,
        "ignore_eos": True,
        # Else the stop token is cut from the response and its log-probability is not.
        "include_stop_str_in_output": True,
        "detokenize": False,
        # 0 would be none at all.
        "logprobs": 1,
    }


def read_reply(response: httpx.Response, version: str) -> dict[str, Any]:
    """trtllm-serve's answer in the form that the trainer reads.

    Args:
        response: the answer.
        version: of the weights that made it.

    Raises:
        HTTPException: it refuses the request, or the answer has another form.
    """
    if response.is_client_error:
        raise HTTPException(response.status_code, response.text[:SHOWN])
    try:
        (choice,) = response.raise_for_status().json()["choices"]
        return {
            "choices": [
                {
                    "index": 0,
                    "token_ids": choice["token_ids"],
                    "logprobs": {"content": [{"logprob": value} for value in choice["logprobs"]["token_logprobs"]]},
                    "finish_reason": choice["finish_reason"],
                    "weight_versions": [{"version": version, "start": 0, "end": len(choice["token_ids"])}],
                }
            ]
        }
    except (httpx.HTTPStatusError, KeyError, TypeError, ValueError) as error:
        raise HTTPException(BAD_GATEWAY, f"trtllm-serve's answer cannot be used: {error!r}"[:SHOWN]) from error


class RefitReceiver:
    """trtllm-serve and its weights; see :class:`phimr_nemo.generate.serving.receiving.Receiver`.

    Args:
        program: trtllm-serve.
        served: how the model is served.
        identity: what is served at first.
        root: where checkpoints are kept; one at a time.

    Raises:
        UserError: an unreadable model.
    """

    def __init__(self, program: str, served: Served, identity: Identity, root: Path) -> None:
        self._program, self._served, self._identity, self._root = program, served, identity, root
        self._architecture = HFDirectory(served.model).architecture
        self._arrivals = Arrivals({name: tuple(shape) for name, shape in tensor_shapes(self._architecture).items()})
        self._weight_map: dict[str, str] = {}
        self._version = UNSYNCED
        self._checkpoint: Path | None = None
        self._engine: TrtllmEngine | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._updating = asyncio.Lock()

    async def identity(self) -> Identity:
        """What is served now.

        Raises:
            HTTPException: trtllm-serve is not there at the moment, and should be.
        """
        if self._keeper is not None and (self._engine is None or not await self._engine.is_healthy()):
            raise HTTPException(UNAVAILABLE, "trtllm-serve does not answer")
        return replace(self._identity, version=self._version)

    async def begin(self) -> None:
        """Stop trtllm-serve, which aborts what it samples, forget its weights, and wait for others."""
        async with self._updating:
            await self._stop()
            self._checkpoint = Path(tempfile.mkdtemp(dir=self._root))

    async def load(self, bucket: Path) -> None:
        """Keep one bucket as a file of the new checkpoint.

        Raises:
            WrongWeights: it is not a part of this model, or no update was begun.
        """
        async with self._updating:
            if self._checkpoint is None or self._keeper is not None:
                raise WrongWeights("no update was begun")
            tensors = tensors_of(bucket)
            self._arrivals.add(tensors)
            name = f"model-{len(self._weight_map):05d}{BUCKET_SUFFIX}"
            await asyncio.to_thread(shutil.copyfile, bucket, self._checkpoint / name)
            self._weight_map |= dict.fromkeys(tensors, name)

    async def finish(self, version: str) -> None:
        """Make the buckets a model directory, and start trtllm-serve on it.

        Raises:
            WrongWeights: the weights are not complete or not readable; the server goes on waiting.
            HTTPException: trtllm-serve does not start; the next update may mend it.
        """
        async with self._updating:
            if self._checkpoint is None or self._keeper is not None:
                raise WrongWeights("no update was begun")
            self._arrivals.check_complete()
            await asyncio.to_thread(self._complete, self._checkpoint)
            ready = asyncio.Event()
            self._keeper = asyncio.create_task(self._keep(self._checkpoint, version, ready))
            waiting = asyncio.ensure_future(ready.wait())
            try:
                await asyncio.wait({waiting, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            if self._engine is None:
                raise HTTPException(UNAVAILABLE, "trtllm-serve does not start on the new weights; see its log")

    async def generate(self, asked: Asked, request: Request) -> dict[str, Any]:
        """Sample one response, with one version of the weights or not at all.

        Raises:
            HTTPException: trtllm-serve is not there, went away meanwhile, or refuses.
        """
        engine, version = self._engine, self._version
        if engine is None:
            raise HTTPException(UNAVAILABLE, "there are no weights to sample with")
        try:
            response = await engine.complete(completion_request(asked, engine.name), _disconnected(request))
        except EngineFailed as error:
            raise HTTPException(UNAVAILABLE, str(error)) from error
        return read_reply(response, version)

    async def close(self) -> None:
        """Stop trtllm-serve for good."""
        await self._stop()

    async def _keep(self, checkpoint: Path, version: str, ready: asyncio.Event) -> None:
        """Run trtllm-serve on a checkpoint until cancelled; when it dies, start it again, `RESTARTS` times."""
        try:
            for _ in range(1 + RESTARTS):
                try:
                    async with running(self._program, self._served, checkpoint) as engine:
                        self._engine, self._version = engine, version
                        ready.set()
                        try:
                            _say(f"trtllm-serve ended with exit code {await engine.ended()}")
                        finally:
                            self._engine = None
                except EngineFailed as error:
                    _say(str(error))
                    if not ready.is_set():
                        break
        finally:
            # Of no use any more, which the trainer is told: it will send weights.
            self._version, self._keeper = INCOMPLETE, None

    async def _stop(self) -> None:
        """End the engine, if there is one, and forget all weights."""
        keeper, self._keeper = self._keeper, None
        self._engine, self._version = None, INCOMPLETE
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})
        self._arrivals.restart()
        self._weight_map.clear()
        if self._checkpoint is not None:
            await asyncio.to_thread(shutil.rmtree, self._checkpoint)
            self._checkpoint = None

    def _complete(self, checkpoint: Path) -> None:
        """Add to the buckets what makes them a model directory, and read it back."""
        files = [checkpoint / name for name in sorted(set(self._weight_map.values()))]
        size = sum(file.stat().st_size - min(tensor_places(file).values()) for file in files)
        write_index(checkpoint, self._weight_map, size)
        dtype = torch_dtype(self._served.dtype)
        write_model_files(checkpoint, self._architecture, self._served.model, dtype)
        try:
            HFDirectory(checkpoint)
        except UserError as error:
            raise WrongWeights(error.problem) from error


def _say(message: str) -> None:
    print(f"phimr serve: {message}", file=sys.stderr, flush=True)


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def new_root(place: Path) -> tuple[Path, BinaryIO]:
    """A directory of this server's own, and the open file in it whose lock says that its server lives.

    What killed servers of this account left in `place` is removed: in shared memory it is memory.
    """
    for lock in place.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):
            if lock.parent.lstat().st_uid == os.getuid():
                with lock.open("rb") as held:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent)
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    lock_file = (root / LOCK).open("wb")
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    return root, lock_file


def application(receiver: RefitReceiver, served: Served, root: Path, key: str | None) -> FastAPI:
    """The server that the trainer talks to; when it ends, so does trtllm-serve, and `root` is removed."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await receiver.close()
            await asyncio.to_thread(shutil.rmtree, root)

    router = APIRouter()

    @router.post(GENERATE)
    async def generate(asked: Asked, request: Request) -> dict[str, Any]:
        return await receiver.generate(asked, request)

    # No pages about the interface: they would need no key.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.include_router(router)
    app.include_router(weight_routes(receiver, directory=served.weights_directory, scratch=root))
    if key:
        guard(app, key)
    return app


def run_server(served: Served, program: str) -> None:
    """Serve until a signal comes.

    Args:
        served: what and how.
        program: trtllm-serve.

    Raises:
        UserError: an unreadable model, a LongRoPE policy that TensorRT-LLM does not follow, or no key where one is
            needed.
    """
    key = api_key(served)
    check_longrope(served.model, served.longrope, served.max_length)
    weights = HFDirectory(served.model).weights_hash()
    tokenizer = tokenizer_hash(served.model)
    identity = Identity(weights, tokenizer, UNSYNCED, served.max_length, served.longrope, RAW_LOGPROBS)
    root, lock = new_root(served.refit_directory or shared_memory())
    with lock:
        uvicorn.run(
            application(RefitReceiver(program, served, identity, root), served, root, key),
            host=served.host,
            port=served.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
