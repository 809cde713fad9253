"""A real HTTP server on loopback that speaks OpenAI's chat completions, and misbehaves when it is told to.

It answers as a function of the request's body, so that two runs can be compared. Each request's faults come from
`fault(body, attempt)`, where `attempt` counts from 0 how often an equal body came before.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

Fault = Literal[
    "drop at once",
    "drop mid-stream",
    "drop after done",
    "429",
    "429 until",
    "429 date",
    "500",
    "503",
    "400",
    "401",
    "404",
    "302",
    "garbage",
    "html",
    "truncated json",
    "truncated",
    "empty choices",
    "no choices",
    "odd finish",
    "content filter",
    "error in stream",
    "latin-1",
    "gzip",
    "huge line",
    "endless",
    "hang",
    "hang mid-stream",
    "stay open",
]
RETRY_AFTER = "0.3"
KEEP_OPEN_SECONDS = 30.0
REASONS = {"400": "Bad Request", "401": "Unauthorized", "404": "Not Found", "429": "Too Many Requests"}


@dataclass(frozen=True)
class Reply:
    """What the model says."""

    text: str
    reasoning: str = ""
    finish_reason: str = "stop"


def no_fault(body: dict[str, Any], attempt: int) -> Fault | None:
    return None


def user_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


class OpenAIServer:
    """Use as a context manager; serves in a thread of its own.

    Attributes:
        bodies, headers: of every request, in the order of arrival.
        largest: the most requests that were under way together.
        connections: how many were opened.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str | Reply],
        *,
        fault: Callable[[dict[str, Any], int], Fault | None] = no_fault,
        delay: Callable[[dict[str, Any]], float] = lambda _: 0.0,
        streams: bool = True,
        counts_tokens: bool = True,
        reasoning_field: str = "reasoning_content",
        piece: int = 7,
    ) -> None:
        self._answer, self._fault, self._delay = answer, fault, delay
        self._streams, self._counts_tokens, self._field, self._piece = streams, counts_tokens, reasoning_field, piece
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.largest = self.connections = self._under_way = 0
        self._seen: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client went away, or was killed
        except asyncio.CancelledError:
            return
        finally:
            self._handlers.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its reply; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        raw = await reader.readexactly(int(headers["content-length"]))
        body = json.loads(raw)
        self.bodies.append(body)
        self.headers.append({**headers, ":path": head[0].split(" ")[1]})
        attempt = self._seen[raw.decode()]
        self._seen[raw.decode()] += 1
        self._under_way += 1
        self.largest = max(self.largest, self._under_way)
        try:
            await asyncio.sleep(self._delay(body))
            return await self._reply(writer, body, self._fault(body, attempt))
        finally:
            self._under_way -= 1

    async def _reply(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: Fault | None) -> bool:
        said = self._answer(body)
        reply = Reply(said) if isinstance(said, str) else said
        if fault == "drop at once":
            return False
        if fault == "hang":
            await asyncio.sleep(KEEP_OPEN_SECONDS)
            return False
        if fault is not None and fault[:3].isdigit():
            return await self._refuse(writer, fault)
        if fault in ("html", "gzip", "latin-1", "truncated json", "no choices"):
            return await self._plain(writer, *_broken(fault))
        if not self._streams or not body.get("stream"):
            return await self._plain(writer, "application/json", json.dumps(self._whole(reply)).encode())
        return await self._stream(writer, reply, fault)

    async def _refuse(self, writer: asyncio.StreamWriter, fault: Fault) -> bool:
        import email.utils

        status = fault[:3]
        extra = {"429": f"Retry-After: {RETRY_AFTER}\r\n", "302": "Location: http://127.0.0.1:9/v1\r\n"}.get(
            fault, ""
        )
        if fault == "429 until":
            extra = "Retry-After: 1e400\r\n"
        if fault == "429 date":
            extra = f"Retry-After: {email.utils.formatdate(0, usegmt=True)}\r\n"
        key = self.headers[-1].get("authorization", "").removeprefix("Bearer ")
        content = json.dumps({"error": {"message": f"no entry for {key}"}}).encode()
        writer.write(
            f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        await writer.drain()
        return True

    async def _plain(self, writer: asyncio.StreamWriter, kind: str, content: bytes) -> bool:
        writer.write(f"HTTP/1.1 200 OK\r\n{_kind(kind)}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return True

    def _usage(self, reply: Reply) -> dict[str, Any]:
        if not self._counts_tokens:
            return {}
        written = len((reply.reasoning + reply.text).split())
        return {"usage": {"prompt_tokens": 11, "completion_tokens": written, "total_tokens": 11 + written}}

    def _whole(self, reply: Reply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, self._field: reply.reasoning or None}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
        return {"choices": [choice], **self._usage(reply)}

    async def _stream(self, writer: asyncio.StreamWriter, reply: Reply, fault: Fault | None) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        # A comment, as servers send to keep a connection alive; and a first chunk without text.
        _chunk(writer, b": ping\n\n")
        _event(writer, _delta({"role": "assistant", "content": None}))
        pieces = [{self._field: piece} for piece in _cut(reply.reasoning, self._piece)]
        pieces += [{"content": piece} for piece in _cut(reply.text, self._piece)]
        for number, piece in enumerate(pieces):
            if fault in ("drop mid-stream", "truncated", "hang mid-stream") and number >= len(pieces) // 2:
                break
            _event(writer, _delta(piece))
            await writer.drain()
        if fault == "drop mid-stream":
            return False
        if fault == "hang mid-stream":
            await writer.drain()
            await asyncio.sleep(KEEP_OPEN_SECONDS)
            return False
        if fault == "garbage":
            _chunk(writer, b"data: {not json\n\n")
        if fault == "error in stream":
            _event(writer, {"error": {"message": "engine died", "code": 500}})
        if fault == "huge line":
            await _flood(writer, b"x" * 65536, 2048)
        if fault == "endless":
            await _flood(writer, b"data: " + json.dumps(_delta({"content": "x" * 60000})).encode() + b"\n\n", 1 << 20)
        if fault != "truncated":
            finish = {"odd finish": "abort", "content filter": "content_filter"}.get(str(fault), reply.finish_reason)
            if fault == "empty choices":
                _event(writer, {"choices": []})
            else:
                _event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            _event(writer, {"choices": [], **self._usage(reply)})
            _chunk(writer, b"data: [DONE]\n\n")
        if fault == "drop after done":
            await writer.drain()
            return False
        if fault == "stay open":
            await writer.drain()
            await asyncio.sleep(KEEP_OPEN_SECONDS)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _broken(fault: str) -> tuple[str, bytes]:
    """A body that is no reply, with its content type."""
    import gzip

    good = json.dumps({"choices": [{"message": {"content": "é"}, "finish_reason": "stop"}]}, ensure_ascii=False)
    return {
        "html": ("text/html", b"<html>Bad gateway</html>"),
        "gzip": ("application/json\r\nContent-Encoding: gzip", gzip.compress(good.encode())),
        "latin-1": ("application/json", good.encode("latin-1")),
        "truncated json": ("application/json", good.encode()[:-9]),
        "no choices": ("application/json", b'{"choices": []}'),
    }[fault]


def _kind(kind: str) -> str:
    return f"Content-Type: {kind}\r\n"


def _cut(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def _flood(writer: asyncio.StreamWriter, data: bytes, times: int) -> None:
    for _ in range(times):
        _chunk(writer, data)
        await writer.drain()
