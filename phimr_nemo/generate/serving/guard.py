"""The door of every server that this project starts: whoever comes without the key is sent away unread."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

UNAUTHORIZED: Final = 401
POLICY_VIOLATION: Final = 1008
"""WebSocket's close code."""

HEALTH: Final = "/health"
"""Says only whether the server lives: what watches it needs no key."""


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
