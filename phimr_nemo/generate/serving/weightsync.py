"""Send a checkpoint to rollout servers, bucket by bucket, to all of them at once.

A bucket goes over HTTP, through a shared directory, or from GPU to GPU
(:mod:`phimr_nemo.generate.serving.broadcast.trainer`).

Over HTTP a bucket goes once to each host. The server that has it keeps it in the host's memory for the others there,
which are told its name; one that finds no such file (a container with memory of its own) is sent it by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx

from phimr_nemo.config import ServerEngine
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.weights import (
    BEGIN,
    BUCKET,
    BUCKET_NAME,
    FINISH,
    GONE,
    GROUP,
    KEEP,
    KEPT,
    MB,
    buckets,
)
from phimr_nemo.store.atomic import scratch_file

if TYPE_CHECKING:
    import torch

    from phimr_nemo.generate.serving.broadcast.trainer import Broadcaster

STEP_SECONDS: Final = 600.0
"""What a server may take for one bucket, or to abort what it samples."""
SHOWN: Final = 300
"""Characters of a server's refusal."""
PIECE_BYTES: Final = 1 << 20
"""Of a bucket on its way: the HTTP client copies what it is given several times over."""


def version_label(run: str, version: int) -> str:
    """The name of a run's weights on the servers: another run's with the same number are others."""
    return f"{run}-{version}"


def label_number(run: str, label: str) -> int | None:
    """The number in a label of this run; None for any other label."""
    name, _, number = label.rpartition("-")
    return int(number) if name == run and number.isascii() and number.isdigit() else None


class _Hosts:
    """Which servers share memory: those of one host, until one of them says that it does not.

    Args:
        urls: the servers.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls, self._apart = tuple(urls), set[str]()

    def groups(self, failed: Collection[str]) -> list[list[str]]:
        """The servers that have not failed, by host."""
        found: dict[str, list[str]] = {}
        for url in self._urls:
            if url not in failed:
                found.setdefault(url if url in self._apart else urlsplit(url).hostname or url, []).append(url)
        return list(found.values())

    def set_apart(self, url: str) -> None:
        """It shares memory with nobody."""
        self._apart.add(url)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


async def push(
    client: httpx.AsyncClient,
    urls: Sequence[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    label: str,
    config: ServerEngine,
    broadcaster: Broadcaster | None = None,
) -> dict[str, str]:
    """Stream tensors to servers; a server that fails is left with incomplete weights, which it says itself.

    The tensors are consumed to their end whatever happens: other processes take part in making them.

    Args:
        client: with the key and the time limit of a request.
        urls: the servers.
        tensors: (Hugging Face name, tensor), the whole checkpoint.
        label: the version's name.
        config: bucket size, and the shared directory if there is one.
        broadcaster: sends from GPU to GPU, as long as it has a group.

    Returns:
        server -> what went wrong, for those that have not the new weights.

    Raises:
        UserError: servers that answer cannot be in a group with the broadcaster.
    """
    from safetensors.torch import save, save_file

    failed: dict[str, str] = {}
    hosts = _Hosts(urls)

    async def post(
        url: str, path: str, *, method: str = "POST", seconds: float = STEP_SECONDS, **body: Any
    ) -> dict[str, Any] | None:
        """The answer; None when the server failed, or has not got what it was told of."""
        try:
            response = await client.request(method, url + path, timeout=seconds, **body)
        except httpx.TransportError as error:
            failed[url] = type(error).__name__
            return None
        if response.status_code == httpx.codes.OK:
            return dict(response.json())
        if response.status_code == httpx.codes.NOT_FOUND and path == GROUP:
            raise UserError(
                f"the rollout server {url} cannot be in a process group with the trainer",
                rule="engine.transfer=nccl needs vLLM servers of `phimr serve` of this version",
                remedy="start it again with this version, or use engine.transfer=host",
            )
        if response.status_code != GONE:
            failed[url] = f"HTTP {response.status_code} {response.text[:SHOWN]}"
        return None

    async def post_all(path: str, message: dict[str, str] | None = None) -> None:
        await asyncio.gather(*(post(url, path, json=message) for url in urls if url not in failed))

    async def post_bucket(url: str, bucket: bytes, **headers: str) -> dict[str, Any] | None:
        headers["Content-Length"] = str(len(bucket))
        return await post(url, BUCKET, content=_pieces(bucket), headers=headers)

    async def post_to_host(group: Sequence[str], bucket: bytes) -> None:
        first, *others = group
        if not others:
            await post_bucket(first, bucket)
            return
        name = (await post_bucket(first, bucket, **{KEEP: "1"}) or {}).get(KEPT)
        left = others
        if name is not None:
            found = await asyncio.gather(*(post(url, BUCKET, json={KEPT: name}) for url in others))
            left = [url for url, answer in zip(others, found, strict=True) if answer is None and url not in failed]
            for url in left:
                hosts.set_apart(url)
        await asyncio.gather(*(post_bucket(url, bucket) for url in left))

    async def post_to_all(bucket: dict[str, torch.Tensor], wanting: Collection[str]) -> None:
        packed = save(bucket)
        groups = ([url for url in group if url in wanting] for group in hosts.groups(failed))
        await asyncio.gather(*(post_to_host(group, packed) for group in groups if group))

    await post_all(BEGIN)
    if broadcaster is not None:
        await broadcaster.form(post, urls, failed)
    for bucket in buckets(tensors, config.bucket_mb * MB, "cpu" if broadcaster is None else broadcaster.device):
        if len(failed) == len(urls):
            continue
        if config.directory is None:
            wanting: Collection[str] = urls
            if broadcaster is not None and broadcaster.is_ready:
                wanting = await broadcaster.send(post, [url for url in urls if url not in failed], bucket)
            if wanting:
                await post_to_all(bucket, wanting)
            continue
        # Only its end is this process's to clean up: the servers read it by its name.
        with scratch_file(config.directory, BUCKET_NAME) as file:
            save_file(bucket, file.name)
            await post_all(BUCKET, {"file": Path(file.name).name})
    await post_all(FINISH, {"version": label})
    return failed
