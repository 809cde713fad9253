"""An asynchronous client of OpenAI-compatible endpoints: bounded concurrency, retries, several addresses."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar

import httpx
import tenacity

from phimr_nemo.config import EndpointConfig
from phimr_nemo.endpoint.settings import read_key
from phimr_nemo.endpoint.watch import Watch
from phimr_nemo.endpoint.wire import (
    EMPTY_REPLY,
    END_OF_STREAM,
    MAX_BODY_BYTES,
    MAX_MESSAGE_CHARS,
    Assembly,
    ChatReply,
    ChatRequest,
    LineSplitter,
    RequestFailed,
    ScoreRequest,
    Transient,
    max_stream_bytes,
    parse_object,
)
from phimr_nemo.errors import UserError

T = TypeVar("T")

CONNECT_SECONDS: Final = 20.0
MAX_BACKOFF_SECONDS: Final = 60.0
MAX_DOUBLINGS: Final = 16
MAX_RETRY_AFTER_SECONDS: Final = 600.0
MAX_ERROR_BYTES: Final = 64 << 10
DRAIN_SECONDS: Final = 1.0
REFUSALS_BEFORE_STOP: Final = 8
"""A server that refuses the first requests and has answered none refuses the settings, not the questions."""
NO_ENTRY: Final = {
    401: ("refuses the key", "set the variable that api_key_env names to a valid key"),
    403: ("forbids the request", "ask for access to this model, or use another key"),
    404: ("does not know the model or the path", "correct model or base_urls; the path ends in the version, as /v1"),
}
REFUSED: Final = (400, 413, 422)
BUSY: Final = (408, 409, 425, 429)


class _Host:
    """One address, until when it is rested, and until when it asked to be left alone."""

    def __init__(self, url: str) -> None:
        self.address = url.rstrip("/")
        self.rested_until = self.closed_until = 0.0
        self.failures = 0


class EndpointClient:
    """Sends requests to an endpoint. Use as an asynchronous context manager within one event loop.

    Args:
        config: the endpoint.

    Attributes:
        counts: "requests" answered or failed, "retries", and "retries: REASON" by reason.

    Raises:
        UserError: an address that is no URL, or no key where one is wanted.
    """

    def __init__(self, config: EndpointConfig) -> None:
        key = read_key(config)
        self.config = config
        self.counts: Counter[str] = Counter()
        self._key = key
        self._hosts = [_Host(url) for url in config.base_urls]
        self._next_host = 0
        self._watch = Watch([host.address for host in self._hosts], config.idle_seconds)
        self._watching: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        self._answered = self._refused = 0
        self._certificates = httpx.create_ssl_context()
        # One client a slot: a shared pool looks through all its connections at every request and every reply.
        self._idle: list[httpx.AsyncClient] = []
        self._clients: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> EndpointClient:
        self._watching = asyncio.create_task(self._watch.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for client in self._clients:
            await client.aclose()

    def _open(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            # A compressed reply could be larger than any bound on what is received.
            headers={
                "Accept-Encoding": "identity",
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
            timeout=httpx.Timeout(
                self.config.idle_seconds, connect=min(CONNECT_SECONDS, self.config.idle_seconds), pool=None
            ),
            verify=self._certificates,
        )
        self._clients.append(client)
        return client

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Get one reply, however many attempts it takes up to the configured number.

        Raises:
            RequestFailed: every attempt failed, or the server refuses this request.
            UserError: the endpoint refuses the key, the model or the path, or every request so far.
        """
        empty = 0

        async def once(client: httpx.AsyncClient) -> ChatReply:
            nonlocal empty
            body = request.body(self.config)
            reply = await self._attempt(client, request.path, body, lambda r: _read_reply(r, request.max_tokens))
            if reply.is_empty and not request.may_be_empty:
                empty += 1
                raise Transient(EMPTY_REPLY)
            return reply

        reply, attempts = await self._retried(once)
        return dataclasses.replace(reply, attempts=attempts, empty_replies=empty)

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """Log-probabilities (nats) of a prompt's tokens from the second on, likewise.

        Raises:
            RequestFailed, UserError: as :meth:`complete`.
        """

        async def read(response: httpx.Response) -> tuple[float, ...]:
            return request.scores(parse_object(await _read_bounded(response, MAX_BODY_BYTES)))

        async def once(client: httpx.AsyncClient) -> tuple[float, ...]:
            return await self._attempt(client, request.path, request.body(self.config), read)

        return (await self._retried(once))[0]

    async def _retried(self, once: Callable[[httpx.AsyncClient], Awaitable[T]]) -> tuple[T, int]:
        """What one attempt brings, and how many it took.

        Raises:
            RequestFailed, UserError: as :meth:`complete`.
        """
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.config.attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(Transient),
            before_sleep=self._count_retry,
            reraise=True,
        )
        attempt = 0
        async with self._slots:
            client = self._idle.pop() if self._idle else self._open()
            try:
                async for attempt_context in retrying:
                    with attempt_context:
                        attempt += 1
                        reply = await once(client)
            except Transient as error:
                raise RequestFailed(error.reason, attempts=attempt) from error
            except RequestFailed as error:
                self._refused += error.refused
                raise RequestFailed(error.reason, attempts=attempt, refused=error.refused) from error
            finally:
                self._idle.append(client)
                self.counts["requests"] += 1
        self._answered += 1
        return reply, attempt

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: exponential with full jitter. Retry-After closes the address instead."""
        first = self.config.backoff_seconds
        return tenacity.wait_random_exponential(multiplier=first, max=max(MAX_BACKOFF_SECONDS, first))(state)

    def _count_retry(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        self.counts["retries"] += 1
        self.counts[f"retries: {error}"] += 1

    def _choose_host(self) -> _Host:
        """The next address in turn that is not rested; the one whose rest ends first when all are."""
        now = time.monotonic()
        turn = [self._hosts[(self._next_host + step) % len(self._hosts)] for step in range(len(self._hosts))]
        host = next((host for host in turn if host.rested_until <= now), None)
        host = host or min(turn, key=lambda resting: resting.rested_until)
        self._next_host = self._hosts.index(host) + 1
        return host

    async def _wait_until_open(self, host: _Host) -> None:
        """Wait as long as the server asked for; then not all at once."""
        while (closed := host.closed_until - time.monotonic()) > 0.0:
            await asyncio.sleep(closed + random.uniform(0.0, self.config.backoff_seconds))

    def _rest(self, host: _Host, error: Transient) -> None:
        now = time.monotonic()
        host.failures += 1
        seconds = min(self.config.backoff_seconds * 2.0 ** min(host.failures, MAX_DOUBLINGS), MAX_BACKOFF_SECONDS)
        host.closed_until = max(host.closed_until, now + (error.retry_after or 0.0))
        host.rested_until = max(host.closed_until, now + seconds)

    async def _attempt(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[httpx.Response], Awaitable[T]],
    ) -> T:
        """One attempt, at the address whose turn it is.

        Raises:
            Transient: another attempt may succeed.
            RequestFailed, UserError: none will; see :meth:`complete`.
        """
        host = self._choose_host()
        await self._wait_until_open(host)
        try:
            reply = await asyncio.wait_for(self._send(client, host, path, body, read), self.config.total_seconds)
        except (httpx.TransportError, asyncio.TimeoutError, TimeoutError, Transient) as error:
            transient = error if isinstance(error, Transient) else _explain(error)
            if transient.is_hosts_fault:
                self._rest(host, transient)
                self._watch.failed(host.address, transient.reason)
            raise transient from error
        host.failures = 0
        return reply

    async def _send(
        self,
        client: httpx.AsyncClient,
        host: _Host,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[httpx.Response], Awaitable[T]],
    ) -> T:
        """One attempt."""
        async with client.stream("POST", host.address + path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                await self._refuse(host.address + path, response)
            self._watch.heard(host.address)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Transient("the reply is compressed, which was not asked for")
            return await read(response)

    async def _refuse(self, url: str, response: httpx.Response) -> None:
        """Say what a status other than 200 means.

        Raises:
            Transient: another attempt may succeed.
            RequestFailed: this request never will.
            UserError: none will.
        """
        status = response.status_code
        if status in BUSY or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise Transient(f"HTTP {status}", retry_after=_retry_after(response), is_hosts_fault=True)
        message = self._scrub(await _read_bounded(response, MAX_ERROR_BYTES))
        if status in REFUSED and (self._answered or self._refused + 1 < REFUSALS_BEFORE_STOP):
            raise RequestFailed(f"HTTP {status}: {message}", attempts=1, refused=True)
        what, remedy = NO_ENTRY.get(status, ("refuses the request", "correct the endpoint's settings"))
        raise UserError(
            f"{url} {what} (HTTP {status}) for model {self.config.model!r}: {message}",
            rule="the endpoint speaks OpenAI's interface and serves this model",
            remedy=remedy,
        )

    def _scrub(self, body: bytes) -> str:
        """A server's message, short, in one line and without the key, which some servers repeat."""
        text = body.decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:MAX_MESSAGE_CHARS]


def _explain(error: Exception) -> Transient:
    """What broke off an attempt; a host that takes no connection is not asked again at once."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Transient("no connection", is_hosts_fault=True)
    if isinstance(error, httpx.TimeoutException):
        return Transient("no word within idle_seconds")
    if isinstance(error, httpx.TransportError):
        return Transient("the connection was dropped")
    return Transient("no whole reply within total_seconds")


async def _read_bounded(response: httpx.Response, max_bytes: int) -> bytes:
    data = bytearray()
    async for piece in response.aiter_raw():
        data += piece
        if len(data) > max_bytes:
            raise Transient("the reply is too long")
    return bytes(data)


async def _read_reply(response: httpx.Response, max_tokens: int) -> ChatReply:
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return await _read_stream(response, max_stream_bytes(max_tokens))
    assembly = Assembly()
    assembly.add(parse_object(await _read_bounded(response, MAX_BODY_BYTES)))
    return assembly.reply()


async def _read_stream(response: httpx.Response, max_bytes: int) -> ChatReply:
    assembly, lines = Assembly(), LineSplitter(max_bytes)
    pieces = response.aiter_raw()
    async for piece in pieces:
        for line in lines.feed(piece):
            name, _, value = line.partition(":")
            # Other fields and comments (servers send them to keep a connection alive) carry nothing.
            if name != "data":
                continue
            if value.strip() == END_OF_STREAM:
                await _drain(pieces)
                return assembly.reply()
            assembly.add(parse_object(value))
    return assembly.reply()


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Read the end of a body whose reply is whole, so that the connection can be used again."""

    async def exhaust() -> None:
        async for _ in pieces:
            pass

    try:
        await asyncio.wait_for(exhaust(), DRAIN_SECONDS)
    except (httpx.TransportError, asyncio.TimeoutError, TimeoutError):
        return  # then it is closed


def _retry_after(response: httpx.Response) -> float | None:
    """The header Retry-After in seconds, given as a number or as a date, within reason."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None
