"""A weight sync of Phi-4-mini's shapes: seconds and peak memory, against safetensors files of the whole model.

    python bench/weight_sync.py [--quick] [--layers 32] [--bucket-mb 512] [--repeats 3]

The sender draws the checkpoint tensor by tensor, as the trainer exports it, and pushes it with the project's own
`phimr_nemo.generate.serving.weightsync` to a server in another process, which checks every bucket and copies its
tensors into memory of its own: over HTTP, and through files in shared memory. The peer is what a rollout loop does at
its simplest: hold the whole checkpoint, `safetensors.torch.save_file`, load it in the other process, copy.

bfloat16, random values, nothing is computed. Seconds from the first tensor to the last copy; memory is the peak
resident set (VmHWM) of each process above what it had before, files that another process maps included. The sender
of the peer holds the model, so its figure is above that as well. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import MIB, machine, print_result, status_bytes, versions
from convert import architecture

if TYPE_CHECKING:
    from torch import Tensor

QUICK_LAYERS, QUICK_BUCKET_MB = 2, 4
METHODS = ("http", "shared memory", "peer")


def checkpoint(layers: int, quick: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint, one tensor at a time."""
    import torch

    from phimr_nemo.model.table import tensor_shapes

    for name, shape in tensor_shapes(architecture(layers, quick)).items():
        yield name, torch.ones(shape, dtype=torch.bfloat16)


class Receiver:
    """The server's side: takes buckets, checks them, copies their tensors into one buffer a shape."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
        import torch

        from phimr_nemo.generate.serving.weights import Arrivals

        self._arrivals, self._directory = Arrivals(shapes), directory
        self._buffers = {shape: torch.zeros(shape, dtype=torch.bfloat16) for shape in set(shapes.values())}

    def load(self, file: Path) -> None:
        """Copy what a file holds."""
        from safetensors import safe_open

        from phimr_nemo.generate.serving.weights import tensors_of

        self._arrivals.add(tensors_of(file))
        with safe_open(str(file), framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                self._buffers[tuple(tensor.shape)].copy_(tensor)

    def take(self, path: str, handler: BaseHTTPRequestHandler) -> None:
        """One request of the protocol."""
        from phimr_nemo.generate.serving.weights import BEGIN, BUCKET, FINISH, shared_memory

        length = int(handler.headers["Content-Length"] or 0)
        if path == BEGIN:
            self._arrivals.restart()
        elif path == FINISH:
            handler.rfile.read(length)
            self._arrivals.check_complete()
        elif path == BUCKET and handler.headers["Content-Type"] == "application/json":
            self.load(self._directory / json.loads(handler.rfile.read(length))["file"])
        elif path == BUCKET:
            with tempfile.NamedTemporaryFile(suffix=".safetensors", dir=shared_memory()) as file:
                while length:
                    piece = handler.rfile.read(min(length, MIB))
                    file.write(piece)
                    length -= len(piece)
                file.flush()
                self.load(Path(file.name))


def receive(connection: Connection, layers: int, quick: bool, directory: str) -> None:
    """A process that receives; says its port, then answers each "memory" with its peak above the start's."""
    import threading

    from phimr_nemo.model.table import tensor_shapes

    receiver = Receiver(dict(tensor_shapes(architecture(layers, quick))), Path(directory))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            receiver.take(self.path, self)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = status_bytes("VmRSS")
    connection.send(server.server_address[1])
    while (order := connection.recv()) != "stop":
        if order == "memory":
            connection.send(status_bytes("VmHWM") - before)
        else:
            receiver._arrivals.restart()
            receiver.load(Path(order))
            receiver._arrivals.check_complete()
            connection.send(0)


def send(connection: Connection, method: str, port: int, options: argparse.Namespace, directory: str) -> None:
    """A process that sends: seconds, and its peak above the start's. The peer hands its file over by name."""
    import httpx
    import torch
    from safetensors.torch import save_file

    from phimr_nemo.config import ServerEngine
    from phimr_nemo.generate.serving.weightsync import push

    torch.zeros(1)
    before = status_bytes("VmRSS")
    if method == "peer":
        whole = dict(checkpoint(options.layers, options.quick))
        started = time.perf_counter()
        file = Path(directory) / "model.safetensors"
        save_file(whole, file)
        connection.send(str(file))
        connection.recv()
    else:
        config = ServerEngine(
            kind="vllm_server",
            base_urls=(f"http://127.0.0.1:{port}",),
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
                tensors = checkpoint(options.layers, options.quick)
                return await push(client, config.base_urls, tensors, "bench-0", config)

        started = time.perf_counter()
        failed = asyncio.run(pushed())
        if failed:
            raise RuntimeError(f"the sync failed: {failed}")
    seconds = time.perf_counter() - started
    connection.send((seconds, status_bytes("VmHWM") - before))


def measure(method: str, options: argparse.Namespace) -> dict[str, float]:
    """One sync between two fresh processes."""
    from phimr_nemo.generate.serving.weights import shared_memory

    context = multiprocessing.get_context("spawn")
    place = None if method == "peer" else shared_memory()
    with tempfile.TemporaryDirectory(dir=place) as directory:
        ours, theirs = context.Pipe()
        server = context.Process(target=receive, args=(theirs, options.layers, options.quick, directory))
        server.start()
        port = ours.recv()
        mine, its = context.Pipe()
        sender = context.Process(target=send, args=(its, method, port, options, directory))
        sender.start()
        answer = mine.recv()
        if method == "peer":
            ours.send(answer)
            mine.send(ours.recv())
            answer = mine.recv()
        sender.join()
        ours.send("memory")
        received = ours.recv()
        ours.send("stop")
        server.join()
    return {"seconds": answer[0], "sender_bytes": answer[1], "receiver_bytes": received}


def main() -> None:
    """Measure every method, print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bucket-mb", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.bucket_mb, options.repeats = QUICK_LAYERS, QUICK_BUCKET_MB, 1
    size = sum(2 * tensor.numel() for _, tensor in checkpoint(options.layers, options.quick))
    figures: dict[str, dict[str, float]] = {}
    print(f"{size / 1e9:.2f} GB in {options.layers} layers, buckets of {options.bucket_mb} MB")
    print("| method | seconds | sender, MiB | receiver, MiB |\n|---|---:|---:|---:|")
    for method in METHODS:
        runs = [measure(method, options) for _ in range(options.repeats)]
        figures[method] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        shown = figures[method]
        print(
            f"| {method} | {shown['seconds']:.2f} | {shown['sender_bytes'] / MIB:,.0f} "
            f"| {shown['receiver_bytes'] / MIB:,.0f} |"
        )
    ours, peer = figures["shared memory"], figures["peer"]
    print_result(
        {
            "benchmark": "weight_sync",
            "ours": ours,
            "http": figures["http"],
            "peer": peer,
            "ratio": {name: ours[name] / peer[name] for name in ours},
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
