"""A vLLM server that takes new weights: `phimr serve`. Runs in vLLM's environment.

It is vLLM's own API server, with a few routes more: what it serves, and an update of its weights. vLLM's development
mode, which lets anyone who reaches the port call anything, stays off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, HTTPException, Request
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

from phimr_nemo.generate.serve import Served, api_key
from phimr_nemo.generate.vllm import DTYPES, WEIGHTS_BACKEND, WORKER_EXTENSION, check_longrope, weights_hash
from phimr_nemo.generate.weights import (
    ABANDON,
    BEGIN,
    BUCKET,
    BUCKET_SUFFIX,
    FINISH,
    IDENTITY,
    INCOMPLETE,
    LOGPROBS,
    UNSYNCED,
    Arrivals,
    Identity,
    WrongWeights,
    shared_memory,
    tensors_of,
    tokenizer_hash,
)

MAX_BUCKET_BYTES: Final = 16 << 30
"""The largest tensor of the 3.8 B model has 1.2 GB."""
MAX_LABEL: Final = 100
CONFLICT: Final = 409
TOO_LARGE: Final = 413


class WeightReceiver:
    """The engine's weights and their version, under update.

    Args:
        engine: vLLM's asynchronous engine.
        identity: what is served at first.
        shapes: name -> shape of the checkpoint's tensors.
        directory: where buckets are left by the trainer, if not sent.
    """

    def __init__(
        self, engine: Any, identity: Identity, shapes: Mapping[str, tuple[int, ...]], directory: Path | None
    ) -> None:
        self._engine, self._identity, self._directory = engine, identity, directory
        self._arrivals = Arrivals(shapes)

    async def identity(self) -> Identity:
        """What is served now; the version is the engine's own word."""
        return replace(self._identity, version=await self._engine.get_weight_version())

    async def begin(self) -> None:
        """Abort what is being sampled and wait for weights; an update that was not finished is forgotten."""
        await self._engine.pause_generation(mode="abort")
        await self._engine.update_weight_version(INCOMPLETE)
        await self._engine.collective_rpc(ABANDON)
        self._arrivals.restart()
        await self._engine.start_weight_update()

    async def receive(self, request: Request) -> None:
        """One bucket: the request's body, or a file in the shared directory.

        Raises:
            WrongWeights: it is not a part of this model, or names no such file.
        """
        if request.headers.get("content-type") == "application/json":
            await self._load(self._file(await request.json()))
            return
        with tempfile.NamedTemporaryFile(suffix=BUCKET_SUFFIX, dir=shared_memory()) as file:
            size = 0
            async for piece in request.stream():
                size += len(piece)
                if size > MAX_BUCKET_BYTES:
                    raise HTTPException(TOO_LARGE, f"a bucket has at most {MAX_BUCKET_BYTES} bytes")
                file.write(piece)
            file.flush()
            await self._load(Path(file.name))

    def _file(self, message: Any) -> Path:
        name = message.get("file") if isinstance(message, dict) else None
        if self._directory is None or not isinstance(name, str) or Path(name).name != name:
            raise WrongWeights("the name of a file in the server's weights directory is expected")
        return self._directory / name

    async def _load(self, file: Path) -> None:
        self._arrivals.add(tensors_of(file))
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(file)}))

    async def finish(self, version: str) -> None:
        """Use the new weights, under a version, and forget what was computed with the old ones.

        Raises:
            WrongWeights: the weights are not complete; the server goes on waiting.
        """
        self._arrivals.check_complete()
        await self._engine.finish_weight_update()
        await self._engine.reset_prefix_cache()
        await self._engine.update_weight_version(version)
        await self._engine.resume_generation()


def weight_routes(receiver: WeightReceiver) -> APIRouter:
    """The routes beside vLLM's."""
    router = APIRouter()

    async def checked(work: Callable[[], Awaitable[None]]) -> dict[str, str]:
        try:
            await work()
        except WrongWeights as error:
            raise HTTPException(CONFLICT, str(error)) from error
        return {}

    @router.get(IDENTITY)
    async def identity() -> dict[str, Any]:
        return vars(await receiver.identity())

    @router.post(BEGIN)
    async def begin() -> dict[str, str]:
        return await checked(receiver.begin)

    @router.post(BUCKET)
    async def bucket(request: Request) -> dict[str, str]:
        return await checked(lambda: receiver.receive(request))

    @router.post(FINISH)
    async def finish(version: Annotated[str, Body(embed=True, max_length=MAX_LABEL)]) -> dict[str, str]:
        return await checked(lambda: receiver.finish(version))

    return router


def vllm_arguments(served: Served, name: str) -> list[str]:
    """vLLM's own command line for it."""
    arguments = [
        *(str(served.model), "--served-model-name", name, "--host", served.host, "--port", str(served.port)),
        *("--dtype", DTYPES[served.dtype], "--max-model-len", str(served.max_length)),
        *("--max-num-seqs", str(served.max_batch), "--tensor-parallel-size", str(served.tensor)),
        *("--gpu-memory-utilization", str(served.memory_share), "--load-format", "safetensors"),
        *("--logprobs-mode", LOGPROBS, "--worker-extension-cls", WORKER_EXTENSION),
        # The routes for token ids.
        "--enable-scale-out",
        *("--weight-transfer-config", f'{{"backend": "{WEIGHTS_BACKEND}"}}'),
        # The model's own generation_config.json would change what is sampled from.
        *("--generation-config", "vllm"),
    ]
    return [*arguments, "--enforce-eager"] if served.eager else arguments


def run_server(served: Served) -> None:
    """Serve until a signal comes.

    Raises:
        UserError: an unreadable model, a LongRoPE policy that vLLM does not follow, or no key where one is needed.
    """
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from phimr_nemo.model import Architecture
    from phimr_nemo.model.table import tensor_shapes

    key = api_key(served)
    check_longrope(served.model, served.longrope, served.max_length)
    weights = weights_hash(served.model)
    identity = Identity(weights, tokenizer_hash(served.model), UNSYNCED, served.max_length, served.longrope, LOGPROBS)
    shapes = {name: tuple(shape) for name, shape in tensor_shapes(Architecture.from_directory(served.model)).items()}
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(vllm_arguments(served, weights))
    # On the command line every user of the machine could read it.
    args.api_key = [key] if key else None
    validate_parsed_serve_args(args)
    args.model = args.model_tag
    uvloop.run(_serve(args, identity, shapes, served.weights_directory))


async def _serve(
    args: Any, identity: Identity, shapes: Mapping[str, tuple[int, ...]], directory: Path | None
) -> None:
    """vLLM's `run_server`, with our routes in its application."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server

    _, socket = setup_server(args, reuse_port=False)
    async with build_async_engine_client(args) as engine:
        await engine.update_weight_version(identity.version)
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        app.include_router(weight_routes(WeightReceiver(engine, identity, shapes, directory)))
        await init_app_state(engine, app.state, args, tasks)
        stopped = await serve_http(
            app, sock=socket, host=args.host, port=args.port, log_level="warning", access_log=False
        )
    try:
        await stopped
    finally:
        socket.close()
