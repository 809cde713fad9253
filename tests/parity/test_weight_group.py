"""Weights through a process group over gloo: real server processes, with workers that join as vLLM's do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from serving import free_port
from torch import Tensor

from phimr_nemo.config import ServerEngine
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.broadcast import group as groups
from phimr_nemo.generate.serving.broadcast import trainer as broadcasting
from phimr_nemo.generate.serving.broadcast.group import (
    Described,
    Group,
    GroupBroken,
    Membership,
    Offer,
    empty_bucket,
    join,
    unpacked,
)
from phimr_nemo.generate.serving.broadcast.trainer import Broadcaster
from phimr_nemo.generate.serving.weights import Arrivals, Identity, NotArrived, tensors_of
from phimr_nemo.generate.serving.weightsync import push

CPU = torch.device("cpu")
SECONDS = 10.0
LAYERS = 4


def weights(seed: int) -> dict[str, Tensor]:
    """Each layer is a bucket of its own, and the scale; dtypes and lengths differ, so that places must be aligned."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {"scale": torch.randn(3, generator=random).bfloat16()}
    for number in range(LAYERS):
        found[f"layers.{number}"] = torch.randn(300, 900, generator=random)
    return found


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of every tensor's bytes, dtype and shape."""
    return {
        name: hashlib.sha256(
            f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


class Server:
    """A receiver with threads for workers; it dies when so many buckets have come; it may claim more than it has."""

    def __init__(self, workers: int, dies_at: int | None, claims: int | None) -> None:
        self._count, self._dies_at, self._group, self._buckets = workers, dies_at, "", 0
        self._claims = workers if claims is None else claims
        self._groups: list[Group] = []
        self.held: list[dict[str, Tensor]] = [{} for _ in range(workers)]
        self.version = "unsynced"
        self._arrivals = Arrivals({name: tuple(tensor.shape) for name, tensor in weights(0).items()})

    async def identity(self) -> Identity:
        return Identity("", "", self.version, 1, "", "")

    async def begin(self) -> None:
        self.version = "incomplete"
        self._arrivals.restart()

    async def load(self, bucket: Path) -> None:
        self._arrivals.add(tensors_of(bucket))
        for held in self.held:
            held.update(load_file(bucket))

    async def membership(self) -> Membership:
        return Membership(self._group, self._claims, "gloo", "")

    async def join(self, offer: Offer) -> None:
        for group in self._groups:
            group.leave()
        ranks = range(offer.first, offer.first + self._count)
        try:
            self._groups = list(await asyncio.gather(*(asyncio.to_thread(join, offer, rank, CPU) for rank in ranks)))
        except GroupBroken as error:
            raise NotArrived(str(error)) from error
        self._group = offer.name

    async def receive(self, group: str, tensors: Sequence[Described]) -> None:
        if group != self._group:
            raise NotArrived("another group")
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        self._arrivals.check(shapes)
        if self._buckets == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        flats = [empty_bucket(tensors, CPU) for _ in self._groups]
        try:
            await asyncio.gather(
                *(asyncio.to_thread(g.broadcast, f) for g, f in zip(self._groups, flats, strict=True))
            )
        except GroupBroken as error:
            self._group = ""
            raise NotArrived(str(error)) from error
        self._buckets += 1
        self._arrivals.add(shapes)
        for held, flat in zip(self.held, flats, strict=True):
            held.update(unpacked(flat, tensors))

    async def finish(self, version: str) -> None:
        self._arrivals.check_complete()
        self.version = version


def serve(port: int, workers: int, dies_at: int | None, claims: int | None) -> None:
    import uvicorn
    from fastapi import FastAPI

    from phimr_nemo.generate.serving.broadcast.server import group_routes
    from phimr_nemo.generate.serving.receiving import weight_routes

    server = Server(workers, dies_at, claims)
    app = FastAPI()
    app.include_router(weight_routes(server, directory=None, scratch=Path(tempfile.gettempdir())))
    app.include_router(group_routes(server))

    @app.get("/held")
    async def held() -> dict[str, Any]:
        return {"version": server.version, "held": [hashes(one) for one in server.held], "buckets": server._buckets}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


@contextlib.contextmanager
def up(port: int, workers: int, dies_at: int | None = None, claims: int | None = None) -> Iterator[str]:
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, workers, dies_at, claims))
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/held").status_code == httpx.codes.OK:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.join()


def settings(urls: Sequence[str]) -> ServerEngine:
    return ServerEngine(
        kind="vllm_server",
        base_urls=tuple(urls),
        in_flight=1,
        request_seconds=60.0,
        attempts=1,
        probe_seconds=1.0,
        recovery_seconds=1.0,
        bucket_mb=1,
        transfer="nccl",
        transfer_seconds=SECONDS,
    )


def sync(urls: Sequence[str], sender: Broadcaster, tensors: Mapping[str, Tensor], label: str) -> dict[str, str]:
    async def pushed() -> dict[str, str]:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await push(client, urls, tensors.items(), label, settings(urls), sender)

    return asyncio.run(pushed())


def has(url: str, tensors: Mapping[str, Tensor], label: str) -> bool:
    told = httpx.get(url + "/held").json()
    return told["version"] == label and all(one == hashes(tensors) for one in told["held"])


def test_servers_of_several_sizes_have_the_weights_bit_for_bit() -> None:
    with up(free_port(), 1) as one, up(free_port(), 2) as two:
        sender = Broadcaster(settings([one, two]), "gloo")
        for version in range(2):
            assert sync([one, two], sender, weights(version), f"run-{version}") == {}
            assert has(one, weights(version), f"run-{version}")
            assert has(two, weights(version), f"run-{version}")
            assert not has(two, weights(version + 1), f"run-{version}")
        assert sender.is_ready
        # All of it came through the group.
        assert httpx.get(one + "/held").json()["buckets"] == 2 * (LAYERS + 1)
        sender.close()


def test_a_server_that_dies_in_the_middle_costs_the_others_nothing_and_comes_back() -> None:
    port = free_port()
    with up(free_port(), 2) as lives:
        with up(port, 1, dies_at=2) as dies:
            sender = Broadcaster(settings([lives, dies]), "gloo")
            assert sync([lives, dies], sender, weights(1), "run-1").keys() == {dies}
            assert has(lives, weights(1), "run-1")
            assert not sender.is_ready
        with up(port, 1) as back:
            assert sync([lives, back], sender, weights(2), "run-2") == {}
            assert sender.is_ready
            assert has(lives, weights(2), "run-2")
            assert has(back, weights(2), "run-2")
        sender.close()


def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with up(free_port(), 1) as url:
        sender = Broadcaster(settings([url]), "gloo")
        whole = weights(1)
        missing = {name: tensor for name, tensor in whole.items() if name != "layers.2"}
        assert "layers.2" in sync([url], sender, missing, "run-1")[url]
        assert not has(url, whole, "run-1")
        right = broadcasting.described
        swapped = {"layers.1": "layers.2", "layers.2": "layers.1"}

        def out_of_order(bucket: Mapping[str, Tensor]) -> list[Described]:
            return [Described(swapped.get(t.name, t.name), t.dtype, t.shape) for t in right(bucket)]

        monkeypatch.setattr(broadcasting, "described", out_of_order)
        assert sync([url], sender, whole, "run-1") == {}
        assert not has(url, whole, "run-1")
        sender.close()


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(UserError, match="has no GPU"):
        Broadcaster(settings(["http://127.0.0.1:1"]))


def test_a_server_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with up(free_port(), 1) as url:
        sender = Broadcaster(settings([url]))
        with pytest.raises(UserError, match="computes on a CPU"):
            sync([url], sender, weights(1), "run-1")


def test_a_group_that_does_not_form_costs_bounded_time() -> None:
    """A server has two workers of which one never comes: no server of that group gets anything, and each says why."""
    with up(free_port(), 1) as whole, up(free_port(), 1, claims=2) as half:
        config = dataclasses.replace(settings([whole, half]), transfer_seconds=3.0)
        sender = Broadcaster(config, "gloo")
        failed = sync([whole, half], sender, weights(1), "run-1")
        assert failed.keys() == {whole, half}
        assert all("did not form" in reason for reason in failed.values()), failed
        assert not sender.is_ready
        assert not has(whole, weights(1), "run-1")


def test_a_server_that_says_nothing_of_a_group_ends_the_sync() -> None:
    """It has not failed, and asking it again would go on for ever."""

    async def silent(url: str, path: str, **_: Any) -> None: ...

    sender = Broadcaster(settings(["http://127.0.0.1:1"]), "gloo")
    with pytest.raises(UserError, match="does not say whether"):
        asyncio.run(asyncio.wait_for(sender.form(silent, ["http://127.0.0.1:1"], {}), SECONDS))


@pytest.mark.parametrize(("theirs", "is_refused"), [("2.29.3", True), ("2.27.3", False)])
def test_a_server_with_another_nccl_is_refused_before_a_group_is_formed(
    theirs: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL compares versions when a group forms, and its refusal would look like a network that is closed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(broadcasting, "nccl_version", lambda: "2.27.3")
    formed: list[Mapping[str, int]] = []

    async def says(url: str, path: str, **_: Any) -> dict[str, Any]:
        return vars(Membership("", 1, "nccl", theirs))

    async def form_anew(_: Any, workers: Mapping[str, int]) -> str:
        formed.append(workers)
        return ""

    url = "http://127.0.0.1:1"
    sender = Broadcaster(settings([url]))
    monkeypatch.setattr(sender, "_form_anew", form_anew)
    if is_refused:
        with pytest.raises(UserError, match=r"has NCCL 2\.29\.3, the trainer 2\.27\.3"):
            asyncio.run(sender.form(says, [url], {}))
    else:
        asyncio.run(sender.form(says, [url], {}))
    assert formed == ([] if is_refused else [{url: 1}])


def test_nccl_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def ncclGetVersion(self, code: Any) -> None:
            # As nccl.h makes it of 2.27.3: 10,000 major + 100 minor + patch.
            code._obj.value = 22_703

    monkeypatch.setattr(groups.ctypes, "CDLL", lambda _: Library())
    assert groups.nccl_version() == "2.27.3"
