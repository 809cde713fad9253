"""The routes by which a rollout server says what it serves, takes new weights and goes to sleep, whatever engine is
behind them, and the doors before them: whoever comes without the key is sent away unread, whoever wants something
sampled of a server that sleeps, and whoever asks for what cannot be meant."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Body, HTTPException, Request
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phimr_nemo.generate.asked import FRUITLESS, read_request
from phimr_nemo.generate.serving.weights import (
    BEGIN,
    BUCKET,
    BUCKET_NAME,
    FINISH,
    GONE,
    IDENTITY,
    KEEP,
    KEPT,
    KEPT_NAME,
    ROUTES,
    SLEEP,
    Identity,
    WrongWeights,
    shared_memory,
)
from phimr_nemo.store.atomic import NO_SPACE, is_scratch_of, scratch_file

MAX_BUCKET_BYTES: Final = 16 << 30
"""The largest tensor of the 3.8 B model has 1.2 GB."""
MAX_LABEL: Final = 100
BAD_REQUEST: Final = 400
CONFLICT: Final = 409
TOO_LARGE: Final = 413
NO_ROOM: Final = 507
UNAUTHORIZED: Final = 401
FAILED: Final = 500
UNAVAILABLE: Final = 503
POLICY_VIOLATION: Final = 1008
"""WebSocket's close code."""

ASKING: Final = (
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/invocations", "/tokenize"),
)
"""Where people ask. Trainers ask elsewhere, with tokens."""
GENERATION_FAILED: Final = b'"Internal server error"'
"""vLLM's word for a request that its engine gave up, which it does where a grammar leaves no token."""
HEALTH: Final = "/health"
"""Says only whether the server lives: what watches it needs no key."""


class Receiver(Protocol):
    """An engine's weights and their version, under update."""

    async def identity(self) -> Identity:
        """What is served now."""
        ...

    async def begin(self) -> None:
        """Abort what is being sampled and wait for weights; an update that was not finished is forgotten."""
        ...

    async def load(self, bucket: Path) -> None:
        """Take one bucket; the file is the caller's, who removes it afterwards.

        Raises:
            WrongWeights: it is not a part of this model.
        """
        ...

    async def finish(self, version: str) -> None:
        """Use the new weights, under a version.

        Raises:
            WrongWeights: the weights are not complete; the server goes on waiting.
        """
        ...


class Sleeper(Receiver, Protocol):
    """One that shares its GPUs: asleep until new weights come, awake when they are complete."""

    @property
    def is_awake(self) -> bool:
        """Whether it can sample."""
        ...

    async def sleep(self) -> None:
        """Abort what is being sampled and give the GPUs' memory back, weights included."""
        ...


def sleep_route(sleeper: Sleeper) -> APIRouter:
    """The route that puts it to sleep; it answers when the memory is free."""
    router = APIRouter()

    @router.post(SLEEP)
    async def sleep() -> dict[str, str]:
        await sleeper.sleep()
        return {}

    return router


def weight_routes(receiver: Receiver, *, directory: Path | None, scratch: Path) -> APIRouter:
    """The routes of a server.

    Args:
        receiver: its engine.
        directory: where buckets are left by the trainer, if not sent.
        scratch: where a bucket that is sent lies until it is loaded.
    """
    router = APIRouter()
    # What neighbours may read, until something else comes: by then they have.
    kept: dict[str, contextlib.ExitStack] = {}

    async def checked(work: Callable[[], Awaitable[None]]) -> dict[str, str]:
        while kept:
            kept.popitem()[1].close()
        try:
            await work()
        except WrongWeights as error:
            raise HTTPException(CONFLICT, str(error)) from error
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise HTTPException(NO_ROOM, f"no room for the weights ({os.strerror(error.errno)})") from error
        return {KEPT: next(iter(kept))} if kept else {}

    async def receive(request: Request) -> None:
        """One bucket: the request's body, a file in the shared directory, or one that a neighbour kept."""
        if request.headers.get("content-type") == "application/json":
            message = await request.json()
            is_kept = isinstance(message, dict) and KEPT in message
            await receiver.load(_kept_file(message[KEPT]) if is_kept else _named_file(directory, message))
            return
        keeps = KEEP in request.headers
        place = (shared_memory(), KEPT_NAME) if keeps else (scratch, BUCKET_NAME)
        with contextlib.ExitStack() as until_loaded:
            file = until_loaded.enter_context(scratch_file(*place))
            size = 0
            async for piece in request.stream():
                size += len(piece)
                if size > MAX_BUCKET_BYTES:
                    raise HTTPException(TOO_LARGE, f"a bucket has at most {MAX_BUCKET_BYTES} bytes")
                file.write(piece)
            file.flush()
            await receiver.load(Path(file.name))
            if keeps:
                kept[Path(file.name).name] = until_loaded.pop_all()

    @router.get(IDENTITY)
    async def identity() -> dict[str, Any]:
        return vars(await receiver.identity())

    @router.post(BEGIN)
    async def begin() -> dict[str, str]:
        return await checked(receiver.begin)

    @router.post(BUCKET)
    async def bucket(request: Request) -> dict[str, str]:
        return await checked(lambda: receive(request))

    @router.post(FINISH)
    async def finish(version: Annotated[str, Body(embed=True, max_length=MAX_LABEL)]) -> dict[str, str]:
        return await checked(lambda: receiver.finish(version))

    return router


def _named_file(directory: Path | None, message: Any) -> Path:
    name = message.get("file") if isinstance(message, dict) else None
    if directory is None or not isinstance(name, str) or Path(name).name != name:
        raise WrongWeights("the name of a file in the server's weights directory is expected")
    return directory / name


def _kept_file(name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or not is_scratch_of(name, KEPT_NAME):
        raise WrongWeights("the name of a bucket that a neighbour kept is expected")
    file = shared_memory() / name
    if not file.is_file():
        raise HTTPException(GONE, "no bucket of this name is kept here")
    return file


class KeyGuard:
    """Lets nobody in without the key, on any path, before anything of a request is read.

    vLLM's own covers the paths under `/v1` and a few others, and leaves `/invocations`, `/tokenize`, `/metrics`.

    Args:
        app: what is guarded.
        key: what a request's header must hold.
        open_path: the one path that answers without it; None where all need it.
    """

    def __init__(self, app: ASGIApp, key: str, open_path: str | None = None) -> None:
        self._app, self._expected, self._open = app, f"Bearer {key}".encode(), open_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] in ("http", "websocket") and not self._may_enter(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            else:
                await JSONResponse({"detail": "the key is wrong"}, UNAUTHORIZED)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_enter(self, scope: Scope) -> bool:
        if self._open is not None and scope["type"] == "http" and scope["path"] == self._open:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)


class AwakeGuard:
    """Sends away what a sleeping engine would let wait: all but its health and the routes that wake it.

    Args:
        app: what is guarded.
        sleeper: its engine.
    """

    def __init__(self, app: ASGIApp, sleeper: Sleeper) -> None:
        self._app, self._sleeper = app, sleeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or say that nobody is awake."""
        is_open = scope["type"] != "http" or scope["path"] == HEALTH or scope["path"].startswith(f"{ROUTES}/")
        if is_open or self._sleeper.is_awake:
            await self._app(scope, receive, send)
            return
        detail = "asleep: the trainer has the GPUs until it sends new weights"
        await JSONResponse({"detail": detail}, UNAVAILABLE)(scope, receive, send)


class RequestGuard:
    """Sends away requests that vLLM would answer with 200 although they cannot be meant, and tells those whose
    structured output it gave up why.

    Args:
        app: what is guarded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with a reason."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ASKING:
            await self._app(scope, receive, send)
            return
        pieces: list[bytes] = []
        is_more = True
        while is_more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            pieces.append(message.get("body", b""))
            is_more = message.get("more_body", False)
        body = b"".join(pieces)
        asked = read_request(body)
        if asked.fault is not None:
            await JSONResponse(_refusal(asked.fault.message, asked.fault.param), BAD_REQUEST)(scope, receive, send)
            return
        kept: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return kept.pop() if kept else await receive()

        await self._app(scope, again, _Explained(scope, receive, send) if asked.is_structured else send)


class _Explained:
    """Passes an answer on; where the engine gave the request up, it becomes a refusal with the reason."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == FAILED:
            self._start = message
        elif self._start is None:
            await self._send(_told(message))
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._end(self._start)

    async def _end(self, start: Message) -> None:
        if GENERATION_FAILED in self._body:
            answer = JSONResponse(_refusal(FRUITLESS, "response_format"), BAD_REQUEST)
            await answer(self._scope, self._receive, self._send)
            return
        await self._send(start)
        await self._send({"type": "http.response.body", "body": self._body})


def _told(message: Message) -> Message:
    """A piece of a stream, whose status has been sent: its error is told there."""
    lines = message.get("body", b"").split(b"\n")
    if not any(_is_failure(line) for line in lines):
        return message
    told = b"data: " + json.dumps(_refusal(FRUITLESS, "response_format")).encode()
    return {**message, "body": b"\n".join(told if _is_failure(line) else line for line in lines)}


def _is_failure(line: bytes) -> bool:
    return line.startswith(b'data: {"error"') and GENERATION_FAILED in line


def _refusal(message: str, param: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": "BadRequestError", "param": param, "code": BAD_REQUEST}}


def guard_requests(app: Starlette) -> None:
    """Put a :class:`RequestGuard` before all of an application; to be called before the other guards."""
    app.middleware_stack = RequestGuard(app.middleware_stack or app.build_middleware_stack())


def guard_sleep(app: Starlette, sleeper: Sleeper) -> None:
    """Put an :class:`AwakeGuard` before all of an application; to be called before :func:`guard`."""
    app.middleware_stack = AwakeGuard(app.middleware_stack or app.build_middleware_stack(), sleeper)


def guard(app: Starlette, key: str, open_path: str | None = None) -> None:
    """Put a :class:`KeyGuard` before all of an application, other middleware included; to be called last.

    `add_middleware` is for applications that have not built their stack yet; vLLM's comes with it built.
    """
    app.middleware_stack = KeyGuard(app.middleware_stack or app.build_middleware_stack(), key, open_path)
