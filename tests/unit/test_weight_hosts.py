"""New weights go once to a host, whose servers have them from one another; each gets all, whatever happens."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import load_file
from torch import Tensor

from phimr_nemo.config import ServerEngine
from phimr_nemo.generate.serving import receiving
from phimr_nemo.generate.serving.receiving import weight_routes
from phimr_nemo.generate.serving.weights import (
    BUCKET,
    KEPT,
    KEPT_NAME,
    MB,
    Arrivals,
    Identity,
    WrongWeights,
    tensors_of,
)
from phimr_nemo.generate.serving.weightsync import push

TENSORS = {f"layers.{number}.weight": torch.full((300, 1000), float(number)) for number in range(4)}
BYTES = sum(tensor.nbytes for tensor in TENSORS.values())
"""Each of 1.2 MB: a bucket of its own."""


class Server(httpx.ASGITransport):
    """A server whose engine keeps what it is given, and counts what comes to its door."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.held: dict[str, Tensor] = {}
        self.version, self.sent, self._dies_at = "unsynced", 0, dies_at
        self._arrivals = Arrivals({name: tuple(tensor.shape) for name, tensor in TENSORS.items()})
        app = FastAPI()
        app.include_router(weight_routes(self, directory=None, scratch=Path(tempfile.gettempdir())))
        super().__init__(app=app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent += int(request.headers.get("Content-Length", 0))
        return await super().handle_async_request(request)

    async def identity(self) -> Identity:
        raise NotImplementedError

    async def begin(self) -> None:
        self._arrivals.restart()

    async def load(self, bucket: Path) -> None:
        if len(self.held) == self._dies_at:
            raise WrongWeights("no memory left")
        self._arrivals.add(tensors_of(bucket))
        self.held |= load_file(bucket)

    async def finish(self, version: str) -> None:
        self._arrivals.check_complete()
        self.version = version


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(receiving, "shared_memory", lambda: tmp_path)
    return tmp_path


def sync(servers: dict[str, Server]) -> dict[str, str]:
    engine = ServerEngine(
        kind="vllm_server",
        base_urls=tuple(servers),
        in_flight=1,
        request_seconds=60.0,
        attempts=1,
        probe_seconds=1.0,
        recovery_seconds=1.0,
        bucket_mb=1,
    )

    async def pushed() -> dict[str, str]:
        async with httpx.AsyncClient(mounts={f"{url}/": server for url, server in servers.items()}) as client:
            return await push(client, engine.base_urls, TENSORS.items(), "run-1", engine)

    return asyncio.run(pushed())


def has_all(server: Server) -> bool:
    if server.held.keys() != TENSORS.keys() or server.version != "run-1":
        return False
    return all(torch.equal(server.held[name], tensor) for name, tensor in TENSORS.items())


def test_weights_are_sent_once_to_a_host(memory: Path) -> None:
    servers = {f"http://{host}:{port}": Server() for host in ("one", "two") for port in (8000, 8001, 8002)}
    assert sync(servers) == {}
    assert all(has_all(server) for server in servers.values())
    for host in ("one", "two"):
        sent = sorted(server.sent for url, server in servers.items() if host in url)
        assert BYTES < sent[-1] < BYTES + MB // 100
        assert sent[-2] < MB // 100
    # Nothing stays in the memory that they share.
    assert list(memory.iterdir()) == []


def test_a_server_with_memory_of_its_own_is_sent_them(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: it finds no file of its neighbour's, once, and is not asked again."""
    asked: list[str] = []
    right = receiving._kept_file

    def elsewhere(name: Any) -> Path:
        asked.append(name)
        monkeypatch.setattr(receiving, "shared_memory", lambda: memory / "other")
        try:
            return right(name)
        finally:
            monkeypatch.setattr(receiving, "shared_memory", lambda: memory)

    monkeypatch.setattr(receiving, "_kept_file", elsewhere)
    servers = {f"http://one:{port}": Server() for port in (8000, 8001)}
    assert sync(servers) == {}
    assert all(has_all(server) for server in servers.values())
    assert len(asked) == 1
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("dead", [0, 1])
def test_a_server_that_fails_costs_the_others_nothing(dead: int, memory: Path) -> None:
    servers = {f"http://one:{8000 + number}": Server(2 if number == dead else None) for number in range(3)}
    failed = sync(servers)
    assert failed.keys() == {f"http://one:{8000 + dead}"}
    assert [has_all(server) for server in servers.values()] == [number != dead for number in range(3)]
    assert list(memory.iterdir()) == []


@pytest.mark.parametrize("name", ["../x.safetensors", f".{KEPT_NAME}.x", "secret.safetensors", 3, None])
def test_only_buckets_that_were_kept_are_read(name: Any, memory: Path) -> None:
    (memory / "secret.safetensors").write_bytes(b"x")

    async def told() -> int:
        async with httpx.AsyncClient(transport=Server(), base_url="http://one") as client:
            return (await client.post(BUCKET, json={KEPT: name})).status_code

    assert asyncio.run(told()) == receiving.CONFLICT
