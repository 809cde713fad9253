"""A sampler over rollout servers (`phimr serve`): token ids in, token ids and log-probabilities out, new weights.

Every response says which weights made it. A request that fails, takes too long or comes from other weights is made
again elsewhere; a server that failed is left out until it answers with the right weights. Seeds belong to requests,
so where and how often one was tried changes its response by no more than rounding.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import httpx

from phimr_nemo.config import ServerEngine, Stale
from phimr_nemo.endpoint.watch import Watch
from phimr_nemo.endpoint.wire import Transient, parse_object
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams, Unfinished
from phimr_nemo.generate.serving.replies import (
    ABORTED,
    NO_ENTRY,
    Wanted,
    ask,
    check_identity,
    no_entry,
    open_client,
    put_to_sleep,
)
from phimr_nemo.generate.serving.weights import ABORT, IDENTITY, Identity
from phimr_nemo.generate.serving.weightsync import label_number, push, version_label
from phimr_nemo.store.progress import say

if TYPE_CHECKING:
    import torch

    from phimr_nemo.generate.serving.broadcast.trainer import Broadcaster

IDENTITY_SECONDS: Final = 30.0
"""A probe waits for the engine itself, which may be in the middle of a long step."""
NO_SUCH_ROUTE: Final = 404
LOOK_SECONDS: Final = 0.05
"""How often an interruption is looked for."""
ABORT_SECONDS: Final = 1.0
"""A request that was on its way when a server was told to abort is aborted so much later."""
COUNTED: Final = ("retries", "stale", "removed", "returned")


@dataclass
class _Server:
    """One server: its address, its requests under way, and whether it is asked."""

    url: str
    busy: int = 0
    is_in: bool = False


class ServerSampler:
    """See :class:`phimr_nemo.generate.sampler.Sampler`. `sample` may run in another thread than the trainer's.

    Args:
        config: the servers.
        wanted: what they must serve.
        stop_token_ids: a response ends with the first of these.
        run: names this run of the trainer, the same in all its processes: versions of other runs do not count.
        is_leader: the one process that sends weights.
        stale: whether responses from older weights of this run are made again or kept.
        broadcaster: sends weights from GPU to GPU; None = in the other ways.

    Attributes:
        counts: "retries", "stale", "removed" and "returned" (servers).

    Raises:
        UserError: an address or key that cannot work, no server that answers, or one that serves something else.
    """

    def __init__(
        self,
        config: ServerEngine,
        wanted: Wanted,
        *,
        stop_token_ids: Sequence[int],
        run: str,
        is_leader: bool,
        stale: Stale,
        broadcaster: Broadcaster | None = None,
    ) -> None:
        self._config, self._wanted, self._stop = config, wanted, list(stop_token_ids)
        self._run, self._is_leader, self._stale, self._broadcaster = run, is_leader, stale, broadcaster
        self._servers = [_Server(url.rstrip("/")) for url in config.base_urls]
        self._watch = Watch(config.base_urls, config.request_seconds, say if is_leader else lambda _: None)
        self._version = -1
        self.counts = dict.fromkeys(COUNTED, 0)
        asyncio.run(self._check_all())

    @property
    def version(self) -> int:
        """The version that responses should come from."""
        return self._version

    def sleep(self) -> None:
        """Let colocated servers free their GPUs, by the one process that sends weights; none has weights then.

        Raises:
            UserError: see :func:`put_to_sleep`.
        """
        self._version = -1
        if self._is_leader:
            put_to_sleep(self._config)

    def close(self) -> None:
        """Leave a group with the servers, which are not this process's."""
        if self._broadcaster is not None:
            self._broadcaster.close()

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send new weights to all servers that answer; processes other than the leader only pass them by.

        Raises:
            UserError: no server took them within `recovery_seconds`, or one cannot be in the broadcaster's group.
        """
        if self._is_leader:
            asyncio.run(self._push(tensors, version))
        else:
            for _ in tensors:
                pass
        self._version = version

    async def _push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        async with open_client(self._config) as client:
            reached = [server.url for server, identity in await self._reachable(client) if identity is not None]
            failed = await push(
                client, reached, tensors, version_label(self._run, version), self._config, self._broadcaster
            )
        if len(failed) == len(reached):
            raise UserError(
                f"none of the servers {reached} took the new weights: {'; '.join(sorted(set(failed.values())))}",
                rule="a round is sampled with the trainer's weights",
                remedy="look at the servers' logs, start them again, and run the same command to continue",
            )

    async def _identity(self, client: httpx.AsyncClient, server: _Server) -> Identity | None:
        """What a server serves; None when it does not answer."""
        try:
            response = await asyncio.wait_for(client.get(server.url + IDENTITY), IDENTITY_SECONDS)
            if response.status_code in NO_ENTRY:
                raise no_entry(server.url)
            response.raise_for_status()
            identity = Identity.parse(parse_object(response.content))
        except (httpx.HTTPError, TimeoutError, asyncio.TimeoutError, Transient, ValueError) as error:
            self._watch.failed(server.url, f"no rollout server answers ({type(error).__name__})")
            return None
        self._watch.heard(server.url)
        return identity

    async def _reachable(self, client: httpx.AsyncClient) -> list[tuple[_Server, Identity | None]]:
        """All servers with what they serve, as soon as one of them answers.

        Raises:
            UserError: a server serves something else, or none answers within `recovery_seconds`.
        """
        deadline = time.monotonic() + self._config.recovery_seconds
        while True:
            identities = await asyncio.gather(*(self._identity(client, server) for server in self._servers))
            found = list(zip(self._servers, identities, strict=True))
            for server, identity in found:
                if identity is not None:
                    check_identity(server.url, identity, self._wanted)
            if any(identities):
                return found
            if time.monotonic() > deadline:
                raise UserError(
                    f"no rollout server answers at {', '.join(server.url for server in self._servers)}",
                    rule="engine.base_urls are servers that `phimr serve` started",
                    remedy="start them, and run the same command again",
                )
            await asyncio.sleep(self._config.probe_seconds)

    async def _check_all(self) -> None:
        async with open_client(self._config) as client:
            await self._reachable(client)

    async def _probe(self, client: httpx.AsyncClient) -> None:
        """Let those servers that are out in again which have the right weights by now."""
        out = [server for server in self._servers if not server.is_in]
        for server, identity in zip(
            out, await asyncio.gather(*(self._identity(client, server) for server in out)), strict=True
        ):
            if identity is not None and self._is_usable(identity):
                check_identity(server.url, identity, self._wanted)
                server.is_in = True

    def _is_usable(self, identity: Identity) -> bool:
        if self._stale == "resample":
            return identity.version == version_label(self._run, self._version)
        return label_number(self._run, identity.version) is not None

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Sample one completion for each request, in the requests' order.

        Raises:
            UserError: a request is refused, or the settings would give other log-probabilities than promised.
            Unfinished: some requests have no response: no server with the right weights is left.
        """
        found: dict[str, Completion] = {}
        round_ = _Round(self, lambda completion: found.update({completion.request_id: completion}))
        left = round_.run_all([(request, params) for request in requests])
        completions = [found[request.id] for request in requests if request.id in found]
        if left:
            raise Unfinished(completions)
        return completions

    def sample_until(
        self,
        interrupted: threading.Event,
        asked: Sequence[tuple[Request, SamplingParams]],
        done: Callable[[Completion], None],
        at_most: int,
    ) -> list[Request]:
        """See :class:`phimr_nemo.generate.sampler.InterruptibleSampler`; servers of `phimr serve` with vLLM."""
        return _Round(self, done, interrupted).run_all(asked, at_most)


class _Round:
    """Some requests: least-loaded routing, a cap on requests under way, retries, and probes on the side.

    Args:
        sampler: whose servers are asked.
        done: takes each response.
        interrupted: when it is set the servers are told to abort; None where nobody interrupts, and a response that
            was aborted is made again.
    """

    def __init__(
        self,
        sampler: ServerSampler,
        done: Callable[[Completion], None],
        interrupted: threading.Event | None = None,
    ) -> None:
        self._sampler, self._config, self._done, self._interrupted = sampler, sampler._config, done, interrupted
        self._changed = asyncio.Condition()

    @property
    def _is_interrupted(self) -> bool:
        return self._interrupted is not None and self._interrupted.is_set()

    def run_all(self, asked: Sequence[tuple[Request, SamplingParams]], at_most: int | None = None) -> list[Request]:
        """Hand over responses; the requests for which there was no way to get one, with what there is of it.

        Raises:
            UserError: a request is refused, or the settings would give other log-probabilities than promised.
        """
        for _, params in asked:
            if params.top_p < 1.0:
                raise UserError(
                    f"top_p={params.top_p} with rollout servers",
                    rule="their log-probabilities are those of the distribution that is sampled from: the whole one",
                    remedy="use top_p=1",
                )
        return asyncio.run(self._run(asked, at_most or len(asked))) if asked else []

    async def _run(self, asked: Sequence[tuple[Request, SamplingParams]], at_most: int) -> list[Request]:
        for server in self._sampler._servers:
            server.busy, server.is_in = 0, False
        under_way = asyncio.Semaphore(at_most)
        async with open_client(self._config) as client:
            await self._sampler._probe(client)
            beside = [asyncio.create_task(self._keep_probing(client))]
            if self._interrupted is not None:
                beside.append(asyncio.create_task(self._abort_when_interrupted(client, self._interrupted)))
            tasks = [asyncio.create_task(self._one(client, under_way, *item)) for item in asked]
            try:
                # What is beside ends by an error alone.
                left = asyncio.gather(*tasks)
                under_watch: list[asyncio.Future[Any]] = [left, *beside]
                for ended in (await asyncio.wait(under_watch, return_when=asyncio.FIRST_COMPLETED))[0]:
                    ended.result()
                return [request for request in await left if request is not None]
            finally:
                for task in (*beside, *tasks):
                    task.cancel()
                await asyncio.gather(*beside, *tasks, return_exceptions=True)

    async def _abort_when_interrupted(self, client: httpx.AsyncClient, interrupted: threading.Event) -> None:
        while not interrupted.is_set():
            await asyncio.sleep(LOOK_SECONDS)
        while True:
            async with self._changed:
                self._changed.notify_all()
            busy = [server for server in self._sampler._servers if server.busy]
            await asyncio.gather(*(self._abort(client, server) for server in busy))
            await asyncio.sleep(ABORT_SECONDS)

    async def _abort(self, client: httpx.AsyncClient, server: _Server) -> None:
        try:
            response = await client.post(server.url + ABORT)
        except httpx.TransportError:
            return  # Its requests fail by themselves.
        if response.status_code == NO_SUCH_ROUTE:
            raise UserError(
                f"the rollout server {server.url} cannot be interrupted",
                rule="partial_rollouts=continue needs vLLM servers of `phimr serve` of this version",
                remedy="start it again with this version, or use partial_rollouts=wait",
            )

    async def _keep_probing(self, client: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(self._config.probe_seconds)
            before = sum(server.is_in for server in self._sampler._servers)
            await self._sampler._probe(client)
            returned = sum(server.is_in for server in self._sampler._servers) - before
            if returned > 0:
                self._sampler.counts["returned"] += returned
                async with self._changed:
                    self._changed.notify_all()

    async def _take(self) -> _Server | None:
        """The server with the fewest requests under way; None when none came back in `recovery_seconds`, or it is too
        late to ask."""
        lonely_since: float | None = None
        async with self._changed:
            while True:
                inside = [server for server in self._sampler._servers if server.is_in]
                free = [server for server in inside if server.busy < self._config.in_flight]
                if free:
                    server = min(free, key=lambda candidate: candidate.busy)
                    server.busy += 1
                    return server
                now = time.monotonic()
                lonely_since = None if inside else lonely_since or now
                is_alone = lonely_since is not None and now - lonely_since > self._config.recovery_seconds
                if is_alone or self._is_interrupted:
                    return None
                with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._config.probe_seconds)

    async def _give_back(self, server: _Server, *, failed: bool) -> None:
        async with self._changed:
            server.busy -= 1
            if failed and server.is_in:
                server.is_in = False
                self._sampler.counts["removed"] += 1
            self._changed.notify_all()

    async def _one(
        self, client: httpx.AsyncClient, under_way: asyncio.Semaphore, request: Request, params: SamplingParams
    ) -> Request | None:
        """None when its response was handed over; else the request, with what there is of the response."""
        async with under_way:
            attempts = 0
            while attempts < self._config.attempts and not self._is_interrupted:
                server = await self._take()
                if server is None:
                    return request
                failed = True
                try:
                    piece = await asyncio.wait_for(
                        self._ask(client, server.url, request, params), self._config.request_seconds
                    )
                    failed = False
                except (httpx.TransportError, asyncio.TimeoutError, TimeoutError, Transient):
                    self._sampler.counts["retries"] += 1
                    attempts += 1
                    continue
                finally:
                    await self._give_back(server, failed=failed)
                if isinstance(piece, Partial):
                    attempts += not piece.token_ids
                    request = request.further(piece)
                elif self._is_kept(server, piece):
                    self._done(request.whole(piece))
                    return None
                else:
                    attempts += 1
            return request

    def _is_kept(self, server: _Server, completion: Completion) -> bool:
        """Whether what came from a server is of the right weights, or of others that are trained on as well."""
        if completion.version == self._sampler.version:
            return True
        self._sampler.counts["stale"] += 1
        if self._sampler._stale == "keep" and completion.version is not None:
            return True
        server.is_in = False
        return False

    async def _ask(
        self, client: httpx.AsyncClient, url: str, request: Request, params: SamplingParams
    ) -> Completion | Partial:
        sampler = self._sampler
        piece = await ask(client, url, request, params, sampler._wanted, stop=sampler._stop, run=sampler._run)
        if isinstance(piece, Partial) and self._interrupted is None:
            raise Transient(f"the response ended with {ABORTED!r}")
        return piece
