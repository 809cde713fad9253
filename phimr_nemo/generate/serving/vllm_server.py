"""A vLLM server that takes new weights: `phimr serve`. Runs in vLLM's environment.

It is vLLM's own API server, with a few routes more: what it serves, and an update of its weights. vLLM's development
mode, which lets anyone who reaches the port call anything, stays off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.platforms import current_platform

from phimr_nemo.generate.serving.broadcast.group import Described, Membership, Offer, nccl_version
from phimr_nemo.generate.serving.broadcast.server import group_routes
from phimr_nemo.generate.serving.gpus import require_promised_gpus
from phimr_nemo.generate.serving.receiving import (
    HEALTH,
    guard,
    guard_requests,
    guard_sleep,
    sleep_route,
    weight_routes,
)
from phimr_nemo.generate.serving.served import Served, api_key
from phimr_nemo.generate.serving.vllm import WEIGHTS_BACKEND, WORKER_EXTENSION, check_longrope, weights_hash
from phimr_nemo.generate.serving.weights import (
    ABANDON,
    ABORT,
    ASLEEP,
    INCOMPLETE,
    JOIN,
    LOGPROBS,
    RECEIVE,
    UNSYNCED,
    Arrivals,
    Identity,
    NotArrived,
    shared_memory,
    tensors_of,
    tokenizer_hash,
)
from phimr_nemo.model.dtypes import TORCH_NAMES

NOT_FOUND: Final = 404
SLEEP_LEVEL: Final = 2
"""Weights and keys and values are given up, not kept in the host's memory: every round brings new ones."""


class WeightReceiver:
    """vLLM's weights; see :class:`phimr_nemo.generate.serving.receiving.Receiver`.

    Args:
        engine: vLLM's asynchronous engine.
        identity: what is served at first.
        shapes: name -> shape of the checkpoint's tensors.
        workers: processes that share the model.
    """

    def __init__(
        self, engine: Any, identity: Identity, shapes: Mapping[str, tuple[int, ...]], workers: int = 1
    ) -> None:
        self._engine, self._identity, self._workers, self._group = engine, identity, workers, ""
        self._arrivals = Arrivals(shapes)
        self._pausing, self._is_updating = asyncio.Lock(), False

    async def identity(self) -> Identity:
        """What is served now; the version is the engine's own word."""
        return replace(self._identity, version=await self._engine.get_weight_version())

    async def begin(self) -> None:
        """Abort what is being sampled and wait for weights; an update that was not finished is forgotten."""
        async with self._pausing:
            self._is_updating = True
            await self._engine.pause_generation(mode="abort")
        await self._engine.update_weight_version(INCOMPLETE)
        await self._engine.collective_rpc(ABANDON)
        self._arrivals.restart()
        await self._engine.start_weight_update()

    async def load(self, bucket: Path) -> None:
        """Hand one bucket to the workers.

        Raises:
            WrongWeights: it is not a part of this model.
        """
        self._arrivals.add(tensors_of(bucket))
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(bucket)}))

    async def membership(self) -> Membership:
        """The group it is in, and what it can be in."""
        if current_platform.is_cpu():
            return Membership(self._group, self._workers, "gloo", "")
        return Membership(self._group, self._workers, "nccl", nccl_version())

    async def join(self, offer: Offer) -> None:
        """Let all workers leave the group they are in and become members of another.

        Raises:
            NotArrived: it did not form.
        """
        self._group = ""
        _raise_first(await self._engine.collective_rpc(JOIN, kwargs={"offer": vars(offer)}))
        self._group = offer.name

    async def receive(self, group: str, tensors: Sequence[Described]) -> None:
        """Take one bucket out of the group and, when every worker has all of it, load it.

        Raises:
            WrongWeights: it is not a part of this model.
            NotArrived: it did not come.
        """
        if group != self._group:
            raise NotArrived("the server is not in this group")
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        self._arrivals.check(shapes)
        faults = await self._engine.collective_rpc(RECEIVE, kwargs={"tensors": [vars(tensor) for tensor in tensors]})
        if any(faults):
            self._group = ""
        _raise_first(faults)
        self._arrivals.add(shapes)
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": None}))

    async def finish(self, version: str) -> None:
        """Use the new weights, under a version, and forget what was computed with the old ones.

        Raises:
            WrongWeights: the weights are not complete; the server goes on waiting.
        """
        self._arrivals.check_complete()
        await self._engine.finish_weight_update()
        await self._use(version)

    async def _use(self, version: str) -> None:
        await self._engine.reset_prefix_cache()
        await self._engine.update_weight_version(version)
        await self._engine.resume_generation()
        self._is_updating = False

    async def abort(self) -> None:
        """End what is being sampled. A server in the middle of an update samples nothing, and stays so."""
        async with self._pausing:
            if not self._is_updating:
                await self._engine.pause_generation(mode="abort", clear_cache=False)
                await self._engine.resume_generation()


def _raise_first(faults: Sequence[str]) -> None:
    """What the workers say; an empty one is none."""
    for fault in filter(None, faults):
        raise NotArrived(fault)


class ColocatedReceiver(WeightReceiver):
    """The same on GPUs that a trainer computes on; see :class:`phimr_nemo.generate.serving.receiving.Sleeper`.

    vLLM's documented order: weights are awake before new ones come, keys and values when those have come.

    Attributes:
        is_awake: whether it can sample.
    """

    is_awake = True

    async def sleep(self) -> None:
        """Abort what is being sampled and give the GPUs' memory back, weights included."""
        self.is_awake = False
        await self._engine.update_weight_version(ASLEEP)
        await self._engine.collective_rpc(ABANDON)
        await self._engine.sleep(level=SLEEP_LEVEL)

    async def begin(self) -> None:
        """Give the weights their memory, and wait for them; what is sampled is aborted."""
        self.is_awake = False
        await self._engine.wake_up(tags=["weights"])
        await super().begin()

    async def finish(self, version: str) -> None:
        """Give keys and values their memory, and use the new weights.

        Raises:
            WrongWeights: as above.
        """
        self._arrivals.check_complete()
        await self._engine.finish_weight_update()
        await self._engine.wake_up(tags=["kv_cache"])
        await self._use(version)
        self.is_awake = True


def vllm_arguments(served: Served, digest: str) -> list[str]:
    """vLLM's own command line for it.

    Args:
        served: how it is served.
        digest: of the weights, by which trainers ask.
    """
    # The first name is the one that answers bear.
    names = (digest,) if served.name is None else (served.name, digest)
    arguments = [
        *(str(served.model), "--served-model-name", *names, "--host", served.host, "--port", str(served.port)),
        *("--dtype", TORCH_NAMES[served.dtype], "--max-model-len", str(served.max_length)),
        *("--max-num-seqs", str(served.max_batch), "--tensor-parallel-size", str(served.tensor)),
        *("--gpu-memory-utilization", str(served.memory_share), "--load-format", "safetensors"),
        *("--logprobs-mode", LOGPROBS, "--worker-extension-cls", WORKER_EXTENSION),
        # The routes for token ids.
        "--enable-scale-out",
        # Else an answer of 5xx leaves no trace of its cause.
        "--log-error-stack",
        *("--weight-transfer-config", f'{{"backend": "{WEIGHTS_BACKEND}"}}'),
        # The model's own generation_config.json would change what is sampled from.
        *("--generation-config", "vllm"),
    ]
    if served.eager:
        arguments.append("--enforce-eager")
    # vLLM refuses it on a CPU, where its engine goes to sleep and wakes all the same, but keeps its memory.
    if served.colocated and current_platform.is_sleep_mode_available():
        arguments.append("--enable-sleep-mode")
    return arguments


def run_server(served: Served) -> None:
    """Serve until a signal comes.

    Raises:
        UserError: an unreadable model, a LongRoPE policy that vLLM does not follow, no key where one is needed, or
            a CPU build beside GPUs.
    """
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from phimr_nemo.model import Architecture
    from phimr_nemo.model.table import tensor_shapes

    require_promised_gpus("phimr serve")
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
    uvloop.run(_serve(args, identity, shapes, served))


def model_route() -> APIRouter:
    """OpenAI's route for one model's card, which vLLM lacks."""
    router = APIRouter()

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> JSONResponse:
        listed = await request.app.state.openai_serving_models.show_available_models()
        for card in listed.data:
            if card.id == name:
                return JSONResponse(card.model_dump())
        error = {"message": f"The model `{name}` does not exist.", "type": "NotFoundError", "param": "model"}
        return JSONResponse({"error": {**error, "code": NOT_FOUND}}, NOT_FOUND)

    return router


def abort_route(receiver: WeightReceiver) -> APIRouter:
    """The route by which a trainer interrupts what it has asked for."""
    router = APIRouter()

    @router.post(ABORT)
    async def abort() -> dict[str, str]:
        await receiver.abort()
        return {}

    return router


async def _serve(args: Any, identity: Identity, shapes: Mapping[str, tuple[int, ...]], served: Served) -> None:
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
        receiver = (ColocatedReceiver if served.colocated else WeightReceiver)(
            engine, identity, shapes, served.tensor
        )
        app.include_router(weight_routes(receiver, directory=served.weights_directory, scratch=shared_memory()))
        app.include_router(group_routes(receiver))
        app.include_router(abort_route(receiver))
        app.include_router(model_route())
        await init_app_state(engine, app.state, args, tasks)
        guard_requests(app)
        if isinstance(receiver, ColocatedReceiver):
            app.include_router(sleep_route(receiver))
            guard_sleep(app, receiver)
            # Nobody may know that it has come: a trainer may be computing.
            await receiver.sleep()
        if args.api_key:
            guard(app, args.api_key[0], HEALTH)
        stopped = await serve_http(
            app, sock=socket, host=args.host, port=args.port, log_level="warning", access_log=False
        )
    try:
        await stopped
    finally:
        socket.close()
