"""A weight sync of Phi-4-mini's shapes: seconds and peak memory, against safetensors files of the whole model.

    python bench/weight_sync.py [--quick] [--layers 32] [--words 200064] [--bucket-mb 512] [--repeats 3]
        [--servers 1,2,4,8] [--add-up] [--methods http,apart,"shared memory",peer]

The sender draws the checkpoint tensor by tensor, as the trainer exports it, and pushes it with the project's own
`phimr_nemo.generate.serving.weightsync` to servers in other processes, which have the project's own routes, check
every bucket and copy its tensors into memory of their own: over HTTP, once to a host, whose servers share memory;
over HTTP to each ("apart": the addresses are those of different hosts); and through files in shared memory. The peer
is what a rollout loop does at its simplest: hold the whole checkpoint, `safetensors.torch.save_file`, load it in the
other process, copy.

bfloat16, nothing is computed. Seconds from the first tensor to the last copy; memory is the peak resident set (VmHWM)
of each process above what it had before, files that another process maps included; processor seconds are of the
sender, and of all servers together. The sender of the peer holds the model, so its figure is above that as well.
Medians of the repeats.

With --add-up the servers add up the numbers of every bucket where it lies and keep nothing, so that eight of them
have room on a small machine; the sums are compared with what was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import MIB, machine, print_result, status_bytes, versions
from convert import PHI4MINI, architecture

if TYPE_CHECKING:
    from torch import Tensor

    from phimr_nemo.model.architecture import Architecture

QUICK_LAYERS, QUICK_BUCKET_MB = 2, 4
EXACT_NUMBERS = 2**24
METHODS = ("http", "apart", "shared memory", "peer")


def shaped(options: argparse.Namespace) -> Architecture:
    """The model whose shapes the tensors have."""
    import dataclasses

    arch = architecture(PHI4MINI, options.layers, options.quick)
    if options.words is None:
        return arch
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), options.words - 1)
    return dataclasses.replace(arch, vocab_size=options.words, **special)


def checkpoint(options: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint, one tensor at a time."""
    import torch

    from phimr_nemo.model.table import tensor_shapes

    for name, shape in tensor_shapes(shaped(options)).items():
        yield name, torch.ones(shape, dtype=torch.bfloat16)


class Receiver:
    """A server's engine: takes buckets, checks them, copies their tensors into one buffer a shape."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, adds_up: bool) -> None:
        import torch

        from phimr_nemo.generate.serving.weights import Arrivals

        self._arrivals, self._adds_up = Arrivals(shapes), adds_up
        self._numbers = sum(math.prod(shape) for shape in shapes.values())
        self._sum = 0.0
        distinct = () if adds_up else set(shapes.values())
        self._buffers = {shape: torch.zeros(shape, dtype=torch.bfloat16) for shape in distinct}

    async def identity(self) -> Any:
        """Nobody asks."""
        raise NotImplementedError

    async def begin(self) -> None:
        """Wait for weights."""
        self._arrivals.restart()
        self._sum = 0.0

    async def finish(self, version: str) -> None:
        """Check that all have come."""
        del version
        self._arrivals.check_complete()
        if self._adds_up and self._sum != self._numbers:
            raise RuntimeError(f"{self._numbers} ones were sent, they add up to {self._sum}")

    async def load(self, bucket: Path) -> None:
        """Copy what a file holds, beside the server's loop."""
        await asyncio.to_thread(self.copy, bucket)

    def copy(self, file: Path) -> None:
        """Copy what a file holds."""
        import torch
        from safetensors import safe_open

        from phimr_nemo.generate.serving.weights import tensors_of

        self._arrivals.add(tensors_of(file))
        with safe_open(str(file), framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if self._adds_up:
                    # Ones: in parts that float32 holds without rounding.
                    parts = tensor.flatten().split(EXACT_NUMBERS)
                    self._sum += sum(float(part.sum(dtype=torch.float32)) for part in parts)
                    continue
                self._buffers[tuple(tensor.shape)].copy_(tensor)


def receive(connection: Connection, options: argparse.Namespace, directory: str, address: str) -> None:
    """A process that receives; says its address, then answers each "memory" with its peak above the start's and the
    processor time since."""
    import socket
    import threading

    import uvicorn
    from fastapi import FastAPI

    from phimr_nemo.generate.serving.receiving import weight_routes
    from phimr_nemo.generate.serving.weights import shared_memory
    from phimr_nemo.model.table import tensor_shapes

    receiver = Receiver(dict(tensor_shapes(shaped(options))), adds_up=options.add_up)
    app = FastAPI()
    app.include_router(weight_routes(receiver, directory=Path(directory), scratch=shared_memory()))
    listening = socket.create_server((address, 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    before, seconds = status_bytes("VmRSS"), time.process_time()
    connection.send(f"http://{address}:{listening.getsockname()[1]}")
    while (order := connection.recv()) != "stop":
        if order == "memory":
            connection.send((status_bytes("VmHWM") - before, time.process_time() - seconds))
        else:
            receiver.copy(Path(order))
            connection.send(0)


def send(connection: Connection, method: str, urls: list[str], options: argparse.Namespace, directory: str) -> None:
    """A process that sends: seconds, and its peak above the start's. The peer hands its file over by name."""
    import httpx
    import torch
    from safetensors.torch import save_file

    from phimr_nemo.config import ServerEngine
    from phimr_nemo.generate.serving.weightsync import push

    torch.zeros(1)
    before, used = status_bytes("VmRSS"), time.process_time()
    if method == "peer":
        whole = dict(checkpoint(options))
        started = time.perf_counter()
        file = Path(directory) / "model.safetensors"
        save_file(whole, file)
        connection.send(str(file))
        connection.recv()
    else:
        config = ServerEngine(
            kind="vllm_server",
            base_urls=tuple(urls),
            in_flight=1,
            request_seconds=600.0,
            attempts=1,
            probe_seconds=1.0,
            recovery_seconds=1.0,
            bucket_mb=options.bucket_mb,
            directory=Path(directory) if method == "shared memory" else None,
        )

        async def pushed() -> dict[str, str]:
            async with httpx.AsyncClient(timeout=600.0, trust_env=False) as client:
                tensors = checkpoint(options)
                return await push(client, config.base_urls, tensors, "bench-0", config)

        started = time.perf_counter()
        failed = asyncio.run(pushed())
        if failed:
            raise RuntimeError(f"the sync failed: {failed}")
    seconds = time.perf_counter() - started
    connection.send((seconds, status_bytes("VmHWM") - before, time.process_time() - used))


def measure(method: str, options: argparse.Namespace, servers: int = 1) -> dict[str, float]:
    """One sync between fresh processes."""
    from phimr_nemo.generate.serving.weights import shared_memory

    context = multiprocessing.get_context("spawn")
    place = None if method == "peer" else shared_memory()
    with tempfile.TemporaryDirectory(dir=place) as directory:
        pipes, processes = [], []
        for number in range(servers):
            ours, theirs = context.Pipe()
            # All of 127.0.0.0/8 is this machine.
            address = f"127.0.0.{1 + number if method == 'apart' else 1}"
            process = context.Process(target=receive, args=(theirs, options, directory, address))
            process.start()
            pipes.append(ours)
            processes.append(process)
        urls = [pipe.recv() for pipe in pipes]
        mine, its = context.Pipe()
        sender = context.Process(target=send, args=(its, method, urls, options, directory))
        sender.start()
        answer = mine.recv()
        if method == "peer":
            pipes[0].send(answer)
            mine.send(pipes[0].recv())
            answer = mine.recv()
        sender.join()
        received = []
        for pipe in pipes:
            pipe.send("memory")
            received.append(pipe.recv())
            pipe.send("stop")
        for process in processes:
            process.join()
    return {
        "seconds": answer[0],
        "sender_bytes": answer[1],
        "receiver_bytes": max(peak for peak, _ in received),
        "sender_cpu_seconds": answer[2],
        "receivers_cpu_seconds": sum(used for _, used in received),
    }


def main() -> None:
    """Measure every method, print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--words", type=int, help="of the vocabulary; the model's if left out")
    parser.add_argument("--bucket-mb", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--add-up", action="store_true", help="servers keep nothing of what they read")
    parser.add_argument("--methods", default=",".join(METHODS), help="for one server and for several")
    parser.add_argument("--servers", default="", help="numbers of servers on one host, as 1,2,4,8")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.bucket_mb, options.repeats = QUICK_LAYERS, QUICK_BUCKET_MB, 1
    size = sum(2 * tensor.numel() for _, tensor in checkpoint(options))
    figures: dict[str, dict[str, float]] = {}
    print(f"{size / 1e9:.2f} GB in {options.layers} layers, buckets of {options.bucket_mb} MB")
    print("| method | seconds | sender, MiB | receiver, MiB |\n|---|---:|---:|---:|")
    chosen = options.methods.split(",")
    for method in () if options.servers and options.add_up else chosen:
        runs = [measure(method, options) for _ in range(options.repeats)]
        figures[method] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        shown = figures[method]
        print(
            f"| {method} | {shown['seconds']:.2f} | {shown['sender_bytes'] / MIB:,.0f} "
            f"| {shown['receiver_bytes'] / MIB:,.0f} |"
        )
    hosts: dict[str, dict[str, float]] = {}
    for servers in [int(number) for number in options.servers.split(",") if number]:
        if not hosts:
            print("| servers | way | seconds | sender, CPU s | servers, CPU s |\n|---:|---|---:|---:|---:|")
        for method in (way for way in chosen if way != "peer"):
            runs = [measure(method, options, servers) for _ in range(options.repeats)]
            shown = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            hosts[f"{servers} servers, {method}"] = shown
            print(
                f"| {servers} | {method} | {shown['seconds']:.2f} | {shown['sender_cpu_seconds']:.2f} "
                f"| {shown['receivers_cpu_seconds']:.2f} |"
            )
    ours, peer = figures.get("shared memory", {}), figures.get("peer", {})
    print_result(
        {
            "benchmark": "weight_sync",
            "ours": ours,
            "http": figures.get("http", {}),
            "peer": peer,
            "hosts": hosts,
            "ratio": {name: ours[name] / peer[name] for name in ours.keys() & peer.keys()},
            "model_bytes": size,
            "layers": options.layers,
            "bucket_mb": options.bucket_mb,
            "repeats": options.repeats,
            "versions": versions("torch", "safetensors", "httpx"),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
