"""The door of the rollout servers: the key is wanted on every path but health, however it is asked."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from phimr_nemo.generate.serving.receiving import HEALTH, POLICY_VIOLATION, UNAUTHORIZED, KeyGuard, guard

KEY = "right"
PATHS = (
    *("/invocations", "/tokenize", "/detokenize", "/metrics", "/version", "/docs", "/openapi.json", "/load"),
    *("/v1/models", "/nothing", "//health", "/health/", "/health/x", "/HEALTH", "/%2e%2e/health/..", "/x?/health"),
)
METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE")


async def everything(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"answered {request.url.path}")


def guarded(open_path: str | None, *, built: bool = False) -> Any:
    app = Starlette(routes=[Mount("/", routes=[Route("/{path:path}", everything, methods=list(METHODS))])])
    if built:
        app.middleware_stack = app.build_middleware_stack()
    guard(app, KEY, open_path)
    # Nothing comes before the guard afterwards.
    with pytest.raises(RuntimeError):
        app.add_middleware(KeyGuard, key=KEY)
    return app


def ask(method: str, path: str, headers: Any, *, open_path: str | None = HEALTH, built: bool = False) -> int:
    async def one() -> int:
        transport = httpx.ASGITransport(app=guarded(open_path, built=built))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.request(method, path, headers=headers)).status_code

    return asyncio.run(one())


@pytest.mark.parametrize("path", PATHS)
def test_no_path_answers_without_the_key(path: str) -> None:
    for method, built in itertools.product(METHODS, (False, True)):
        assert ask(method, path, {}, built=built) == UNAUTHORIZED


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY} "[:-1] + "x"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"X-Api-Key": KEY},
        [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}")],
    ],
)
def test_only_the_key_opens(headers: Any) -> None:
    assert ask("POST", "/invocations", headers) == UNAUTHORIZED
    for built in (False, True):
        assert ask("POST", "/invocations", {"Authorization": f"Bearer {KEY}"}, built=built) == 200


def test_health_needs_none_where_it_is_open() -> None:
    assert ask("GET", HEALTH, {}) == 200
    assert ask("GET", HEALTH, {}, open_path=None) == UNAUTHORIZED


def test_a_websocket_is_closed_unread() -> None:
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was let in")

    async def receive() -> Any:
        raise AssertionError("something was read")

    async def send(message: Any) -> None:
        sent.append(message)

    for path in ("/v1/realtime", HEALTH):
        scope: dict[str, Any] = {"type": "websocket", "path": path, "headers": []}
        asyncio.run(KeyGuard(inner, KEY, HEALTH)(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": POLICY_VIOLATION}] * 2
