"""A sampler over rollout servers (`phimr serve`): token ids in, token ids and log-probabilities out, new weights.

Every response says which weights made it. A request that fails, takes too long or comes from other weights is made
again elsewhere; a server that failed is left out until it answers with the right weights. Seeds belong to requests,
so where and how often one was tried changes its response by no more than rounding.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx

from phimr_nemo.config import ServerEngine, Stale
from phimr_nemo.endpoint.settings import read_key
from phimr_nemo.endpoint.watch import Watch
from phimr_nemo.endpoint.wire import Transient, parse_object
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams, Unfinished
from phimr_nemo.generate.serving.replies import Wanted, check_identity, no_entry, read_completion
from phimr_nemo.generate.serving.weights import GENERATE, IDENTITY, SLEEP, Identity
from phimr_nemo.generate.serving.weightsync import STEP_SECONDS, label_number, push, version_label
from phimr_nemo.store.progress import say

if TYPE_CHECKING:
    import torch

CONNECT_SECONDS: Final = 20.0
IDENTITY_SECONDS: Final = 30.0
"""A probe waits for the engine itself, which may be in the middle of a long step."""
REPLY_ALLOWANCE: Final = 1 << 16
REPLY_BYTES_PER_TOKEN: Final = 512
REFUSED: Final = (400, 404, 413, 422)
SHOWN: Final = 300
"""Characters of a server's answer."""
NO_ENTRY: Final = (401, 403)
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
    ) -> None:
        self._config, self._wanted, self._stop = config, wanted, list(stop_token_ids)
        self._run, self._is_leader, self._stale = run, is_leader, stale
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
        """Nothing: the servers are not this process's."""

    # ---- new weights ---------------------------------------------------------------------------------------

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send new weights to all servers that answer; processes other than the leader only pass them by.

        Raises:
            UserError: no server took them within `recovery_seconds`.
        """
        if self._is_leader:
            asyncio.run(self._push(tensors, version))
        else:
            for _ in tensors:
                pass
        self._version = version

    async def _push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        async with _client(self._config) as client:
            reached = [server.url for server, identity in await self._reachable(client) if identity is not None]
            failed = await push(client, reached, tensors, version_label(self._run, version), self._config)
        if len(failed) == len(reached):
            raise UserError(
                f"none of the servers {reached} took the new weights: {'; '.join(sorted(set(failed.values())))}",
                rule="a round is sampled with the trainer's weights",
                remedy="look at the servers' logs, start them again, and run the same command to continue",
            )

    # ---- servers -------------------------------------------------------------------------------------------

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
        async with _client(self._config) as client:
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

    # ---- sampling ------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Sample one completion for each request, in the requests' order.

        Raises:
            UserError: a request is refused, or the settings would give other log-probabilities than promised.
            Unfinished: some requests have no response: no server with the right weights is left.
        """
        if params.top_p < 1.0:
            raise UserError(
                f"top_p={params.top_p} with rollout servers",
                rule="their log-probabilities are those of the distribution that is sampled from: the whole one",
                remedy="use top_p=1",
            )
        completions = asyncio.run(_Round(self, params).run(requests)) if requests else []
        if None in completions:
            raise Unfinished([completion for completion in completions if completion is not None])
        return [completion for completion in completions if completion is not None]


@contextlib.asynccontextmanager
async def _client(config: ServerEngine) -> AsyncIterator[httpx.AsyncClient]:
    headers, key = {"Accept-Encoding": "identity"}, read_key(config)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(config.request_seconds, connect=CONNECT_SECONDS, pool=None)
    # A proxy of the environment is for other hosts than a cluster's own.
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False) as client:
        yield client


def put_to_sleep(config: ServerEngine, *, patience: float = 0.0) -> None:
    """Let colocated servers free their GPUs; one that is not there holds nothing.

    Args:
        config: the servers.
        patience: seconds in which those are waited for that do not answer yet.

    Raises:
        UserError: one is there and does not sleep: it is not colocated, refuses the key, or takes too long.
    """
    asyncio.run(_put_to_sleep(config, time.monotonic() + patience))


async def _put_to_sleep(config: ServerEngine, deadline: float) -> None:
    async with _client(config) as client:
        left = [url.rstrip("/") for url in config.base_urls]
        while True:
            found = await asyncio.gather(*(_falls_asleep(client, url) for url in left))
            left = [url for url, is_there in zip(left, found, strict=True) if not is_there]
            if not left or time.monotonic() >= deadline:
                return
            await asyncio.sleep(config.probe_seconds)


async def _falls_asleep(client: httpx.AsyncClient, url: str) -> bool:
    """Whether it is there; then it sleeps."""
    problem = f"did not go to sleep within {STEP_SECONDS:g} s"
    try:
        response = await client.post(url + SLEEP, timeout=httpx.Timeout(STEP_SECONDS, connect=CONNECT_SECONDS))
    except (httpx.ReadTimeout, httpx.WriteTimeout):
        pass
    except httpx.TransportError:
        return False
    else:
        if response.status_code == httpx.codes.OK:
            return True
        if response.status_code in NO_ENTRY:
            raise no_entry(url)
        problem = f"does not go to sleep (HTTP {response.status_code} {response.text[:SHOWN]})"
        if response.status_code == httpx.codes.NOT_FOUND:
            problem = "was not started as one that goes to sleep"
    raise UserError(
        f"the rollout server {url} {problem}",
        rule="with engine.colocated=true servers and trainer take turns on the same GPUs",
        remedy="start it again with `phimr serve --colocated`, and run the same command to continue; or set "
        "engine.colocated=false where the servers have GPUs of their own",
    )


class _Round:
    """One call of `sample`: least-loaded routing, a cap on requests under way, retries, and probes on the side."""

    def __init__(self, sampler: ServerSampler, params: SamplingParams) -> None:
        self._sampler, self._params, self._config = sampler, params, sampler._config
        self._changed = asyncio.Condition()

    async def run(self, requests: Sequence[Request]) -> list[Completion | None]:
        """One completion for each request, None where there was no way to get one."""
        for server in self._sampler._servers:
            server.busy, server.is_in = 0, False
        async with _client(self._config) as client:
            await self._sampler._probe(client)
            probing = asyncio.create_task(self._keep_probing(client))
            tasks = [asyncio.create_task(self._one(client, request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in (probing, *tasks):
                    task.cancel()
                await asyncio.gather(probing, *tasks, return_exceptions=True)

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
        """The server with the fewest requests under way; None when none came back in `recovery_seconds`."""
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
                if lonely_since is not None and now - lonely_since > self._config.recovery_seconds:
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

    async def _one(self, client: httpx.AsyncClient, request: Request) -> Completion | None:
        for _ in range(self._config.attempts):
            server = await self._take()
            if server is None:
                return None
            failed = True
            try:
                completion = await asyncio.wait_for(self._ask(client, server, request), self._config.request_seconds)
                failed = False
            except (httpx.TransportError, asyncio.TimeoutError, TimeoutError, Transient):
                self._sampler.counts["retries"] += 1
                continue
            finally:
                await self._give_back(server, failed=failed)
            if completion.version == self._sampler.version:
                return completion
            self._sampler.counts["stale"] += 1
            if self._sampler._stale == "keep" and completion.version is not None:
                return completion
            server.is_in = False
        return None

    async def _ask(self, client: httpx.AsyncClient, server: _Server, request: Request) -> Completion:
        wanted = self._sampler._wanted
        room = wanted.longest - len(request.prompt_ids)
        body = {
            "token_ids": list(request.prompt_ids),
            "sampling_params": {
                "temperature": self._params.temperature,
                "max_tokens": min(self._params.max_new_tokens, room),
                "seed": request.seed,
                "stop_token_ids": self._sampler._stop,
                # Only these end a response; vLLM would add the tokenizer's own.
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        limit = REPLY_ALLOWANCE + self._params.max_new_tokens * REPLY_BYTES_PER_TOKEN
        async with client.stream("POST", server.url + GENERATE, json=body) as response:
            content = bytearray()
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > limit:
                    raise Transient("the reply is too long")
        if response.status_code in NO_ENTRY:
            raise no_entry(server.url)
        if response.status_code in REFUSED:
            raise UserError(
                f"{server.url} refuses request {request.id} (HTTP {response.status_code}): "
                f"{content[:REPLY_BYTES_PER_TOKEN].decode('utf-8', 'replace')}",
                rule="a prompt leaves room for a response, and the server speaks vLLM's interface for token ids",
                remedy="start the servers with `phimr serve` and the run's sequence_length",
            )
        if response.status_code != httpx.codes.OK:
            raise Transient(f"HTTP {response.status_code}")
        return read_completion(
            request.id, parse_object(bytes(content)), run=self._sampler._run, vocab_size=wanted.vocab_size
        )
