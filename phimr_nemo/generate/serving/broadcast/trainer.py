"""The trainer's half of weights from GPU to GPU: one group with all servers' workers, and buckets broadcast in it.

It is one more way for a bucket to reach the servers; when an update begins and ends, what a server checks and how it
names its version stay as they are. A bucket is loaded only where all of it has come. When the group breaks, those
servers that live are sent that bucket and those after it in the other way, and the next weights form another group.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from phimr_nemo.config import ServerEngine
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.broadcast.group import (
    ROOT,
    Backend,
    Group,
    GroupBroken,
    Membership,
    Offer,
    described,
    join,
    nccl_version,
    open_store,
    packed,
)
from phimr_nemo.generate.serving.weights import BROADCAST, GROUP
from phimr_nemo.store.progress import say

NAME_BYTES: Final = 8
LOAD_SECONDS: Final = 60.0
"""What a server may take to load a bucket that has come, and to answer."""
DISCARD_PORT: Final = 9
"""Nothing is sent to it: an address is only looked up."""


class Post(Protocol):
    """Asks a server."""

    def __call__(
        self, url: str, path: str, *, method: str = "POST", seconds: float = ..., **body: Any
    ) -> Awaitable[dict[str, Any] | None]:
        """Its answer; None = it failed and is not asked again in this update, or a bucket did not reach it."""
        ...


class Broadcaster:
    """The one process that sends weights, with its group.

    Args:
        config: the servers.
        backend: what the tensors travel with.

    Raises:
        UserError: this process has no GPU for NCCL.
    """

    def __init__(self, config: ServerEngine, backend: Backend = "nccl") -> None:
        self._seconds, self._backend = config.transfer_seconds, backend
        if backend == "nccl" and not torch.cuda.is_available():
            raise UserError(
                "engine.transfer=nccl, and the trainer's process 0 has no GPU",
                rule="NCCL sends from GPU to GPU",
                remedy="use engine.transfer=host, or train on GPUs",
            )
        self.device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        self._group: Group | None = None
        self._workers: dict[str, int] = {}

    @property
    def is_ready(self) -> bool:
        """Whether there is a group."""
        return self._group is not None

    def close(self) -> None:
        """Leave the group, if there is one."""
        if self._group is not None:
            self._group.leave()
        self._group = None

    async def form(self, post: Post, urls: Sequence[str], failed: Mapping[str, str]) -> None:
        """Have a group with all servers: the one of before if it is whole.

        Args:
            post: asks a server.
            urls: the servers.
            failed: those that `post` found to fail, with the reason; they are left out.

        Raises:
            UserError: a server cannot be in one, or the group does not form although all of them answer.
        """
        while alive := [url for url in urls if url not in failed]:
            found = await asyncio.gather(*(self._membership(post, url) for url in alive))
            members = {url: member for url, member in zip(alive, found, strict=True) if member is not None}
            problem = "a server does not say whether it can be in one"
            if len(members) == len(alive):
                workers = {url: member.workers for url, member in members.items()}
                name = self._group.name if self._group is not None else ""
                is_whole = all(member.name == name for member in members.values())
                if self._group is not None and is_whole and workers == self._workers:
                    return
                self.close()
                problem = await self._form_anew(post, workers)
                if not problem:
                    return
            if not any(url in failed for url in alive):
                raise UserError(
                    f"no process group with the rollout servers {alive}: {problem}",
                    rule="with engine.transfer=nccl the servers reach the trainer's node, on any port, and all of "
                    "their GPUs and the trainer's reach one another, within engine.transfer_seconds",
                    remedy="open the network between the nodes (NCCL_SOCKET_IFNAME names its interface, "
                    "NCCL_DEBUG=INFO tells more), or use engine.transfer=host",
                )

    async def _membership(self, post: Post, url: str) -> Membership | None:
        answer = await post(url, GROUP, method="GET")
        if answer is None:
            return None
        member = Membership(**answer)
        if member.backend != self._backend:
            raise UserError(
                f"engine.transfer=nccl, and the rollout server {url} computes on a CPU",
                rule="NCCL sends from GPU to GPU",
                remedy="start it on GPUs, or use engine.transfer=host",
            )
        own = nccl_version() if self._backend == "nccl" else ""
        if member.library != own:
            raise UserError(
                f"engine.transfer=nccl, and the rollout server {url} has NCCL {member.library}, the trainer {own}",
                rule="NCCL refuses a group whose members have different versions of it",
                remedy=f"give the servers' environment NCCL {own} (the package nvidia-nccl-cu12, or -cu13 for torch "
                "of CUDA 13), or use engine.transfer=host",
            )
        return member

    async def _form_anew(self, post: Post, workers: Mapping[str, int]) -> str:
        """Form a group; what went wrong, if anything did."""
        store = open_store(self._seconds)
        name, size, first = secrets.token_hex(NAME_BYTES), 1 + sum(workers.values()), 1
        offers: dict[str, Offer] = {}
        for url, count in workers.items():
            offers[url] = Offer(name, self._backend, _address_towards(url), store.port, first, size, self._seconds)
            first += count
        own = asyncio.to_thread(join, next(iter(offers.values())), ROOT, self.device, store)
        asked = (post(url, GROUP, seconds=self._patience, json=vars(offer)) for url, offer in offers.items())
        joined = asyncio.gather(*asked)
        try:
            group = await own
        except GroupBroken as error:
            await joined
            return str(error)
        self._group, self._workers = group, dict(workers)
        if None in await joined:
            self.close()
            return "a server did not join"
        return ""

    @property
    def _patience(self) -> float:
        """Seconds until a server that has itself waited for the group must have answered."""
        return self._seconds + LOAD_SECONDS

    async def send(self, post: Post, urls: Sequence[str], bucket: Mapping[str, Tensor]) -> list[str]:
        """Broadcast a bucket; those that it did not reach, of which `post` notes the failures itself.

        Args:
            post: asks a server.
            urls: the servers that have not failed.
            bucket: name -> tensor on :attr:`device`.
        """
        group = self._group
        assert group is not None, "a group is formed first"
        message = {"group": group.name, "tensors": [vars(tensor) for tensor in described(bucket)]}
        sending = asyncio.create_task(asyncio.to_thread(group.broadcast, packed(bucket)))
        asked = {
            asyncio.ensure_future(post(url, BROADCAST, seconds=self._patience, json=message)): url for url in urls
        }
        pending: set[asyncio.Future[Any]] = {sending, *asked}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                fault = _fault_of_broadcast(task) if task is sending else _fault_of_answer(task)
                if fault and self.is_ready:
                    # The others would wait for those that are gone.
                    self.close()
                    say(f"weights go over HTTP until the next sync: {fault}")
        return [url for task, url in asked.items() if task.result() is None]


def _fault_of_broadcast(sending: asyncio.Future[None]) -> str:
    try:
        sending.result()
    except GroupBroken as error:
        return str(error)
    return ""


def _fault_of_answer(answer: asyncio.Future[dict[str, Any] | None]) -> str:
    return "" if answer.result() is not None else "a server did not take its bucket"


def _address_towards(url: str) -> str:
    """This machine's address on the way to a server."""
    host = urlsplit(url).hostname or url
    family, kind, _, _, place = socket.getaddrinfo(host, DISCARD_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as looking:
        looking.connect(place)
        return str(looking.getsockname()[0])
