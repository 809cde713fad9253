"""A rollout server on loopback around the real built-in sampler: the protocol of `phimr serve`, and faults on demand.

It takes weights as vLLM's server does (buckets of safetensors, checked against the whole checkpoint), says which
weights made a response, and can be killed, made to hang, or made to lose a tensor. A colocated one sleeps and wakes
in vLLM's order, and has no weights while it sleeps.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams
from phimr_nemo.generate.serving.weights import (
    ABORT,
    ASLEEP,
    BEGIN,
    BUCKET,
    FINISH,
    GENERATE,
    INCOMPLETE,
    SLEEP,
    UNSYNCED,
    Arrivals,
    Identity,
    WrongWeights,
    tensors_of,
)
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.table import tensor_shapes

CONFLICT, UNAUTHORIZED, UNAVAILABLE = 409, 401, 503


class Aborted(threading.Event):
    """Is set as soon as a server has aborted what it was asked before."""

    def __init__(self, server: RolloutServer) -> None:
        super().__init__()
        self._server, self._before = server, server.aborts

    def is_set(self) -> bool:
        return self._server.aborts > self._before


class Gone(Exception):
    """The server dies before it answers."""


class QuietServer(ThreadingHTTPServer):
    """Says nothing of connections that clients have given up."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        return


class RolloutServer:
    """Use as a context manager; serves in threads of its own.

    Args:
        model: a Hugging Face directory.
        identity: what it says of itself.
        port: 0 = any free one.
        key: what it asks for.
        directory: where buckets are left for it.
        colocated: it sleeps until weights come, and when it is told to.

    Attributes:
        events: "sleep", "weights" and "kv_cache" (awake), "sampled", in their order.
        answered: responses sent.
        aborts: how often it was told to abort.
        die_after: responses that it sends before it is gone; later requests are cut off.
        hang: while set, requests wait.
        lost: a tensor whose new values are thrown away.
    """

    def __init__(
        self,
        model: Path,
        identity: Identity,
        *,
        port: int = 0,
        key: str = "",
        directory: Path | None = None,
        colocated: bool = False,
    ) -> None:
        self._source, self._identity, self._key, self._directory = HFDirectory(model), identity, key, directory
        self._tensors: dict[str, Tensor] = {name: self._source.read(name) for name in self._source.names()}
        self._arrivals = Arrivals(tensor_shapes(self._source.architecture))
        self._sampler: LocalSampler | None = self._new_sampler()
        self._colocated, self._asleep = colocated, set[str]()
        self.events: list[str] = []
        self._lock, self._dying = threading.Lock(), threading.Lock()
        self.version = UNSYNCED
        if colocated:
            self._sleep()
        self.answered = self.aborts = 0
        self.die_after: int | None = None
        self.hang = threading.Event()
        self.lost: str | None = None
        self.label: Callable[[str], str] = lambda label: label
        self._server = QuietServer(("127.0.0.1", port), self._handler())
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.is_dead = False

    def _new_sampler(self) -> LocalSampler:
        return LocalSampler(
            self._source.architecture,
            self._tensors.items(),
            stop_token_ids=[self._source.architecture.eos_token_id],
            max_batch=8,
            longrope_policy="long_when_max_length_exceeds_original",
            max_length=self._identity.max_length,
        )

    def __enter__(self) -> RolloutServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang.clear()
        self.die()

    def die(self) -> None:
        """Take no more connections and cut those there are."""
        with self._dying:
            if not self.is_dead:
                self.is_dead = True
                self._server.shutdown()
                self._server.server_close()

    # ---- the protocol --------------------------------------------------------------------------------------

    def take(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Answer a POST."""
        try:
            if path == SLEEP and self._colocated:
                self._sleep()
            elif path == BEGIN:
                self._wake("weights")
                self.version = INCOMPLETE
                self.aborts += 1
                self._arrivals.restart()
            elif path == ABORT:
                self.aborts += 1
            elif path == BUCKET:
                self._load(body)
            elif path == FINISH:
                self._arrivals.check_complete()
                self._wake("kv_cache")
                with self._lock:
                    self._sampler = self._new_sampler()
                self.version = str(json.loads(body)["version"])
            elif path == GENERATE and self._asleep:
                return UNAVAILABLE, {"detail": "asleep"}
            elif path == GENERATE:
                return 200, self._generate(json.loads(body))
            else:
                return 404, {}
        except WrongWeights as error:
            return CONFLICT, {"detail": str(error)}
        return 200, {}

    def _sleep(self) -> None:
        with self._lock:
            self.version, self._sampler, self._asleep = ASLEEP, None, {"weights", "kv_cache"}
        self.events.append("sleep")

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self._asleep.remove(part)
            self.events.append(part)

    def _load(self, body: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            if self._directory is not None:
                path = self._directory / json.loads(body)["file"]
            else:
                path = Path(file.name)
                path.write_bytes(body)
            self._arrivals.add(tensors_of(path))
            self._tensors |= {name: tensor for name, tensor in load_file(path).items() if name != self.lost}

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        params, label, aborted = body["sampling_params"], self.version, Aborted(self)
        with self._lock:
            if self.die_after is not None and self.answered >= self.die_after:
                raise Gone
            sampler = self._sampler
            assert sampler is not None
            sampler._stop = sampler._stop.new_tensor(sorted(params["stop_token_ids"]))
            request = Request("r", tuple(body["token_ids"]), params["seed"])
            drawn = SamplingParams(params["temperature"], 1.0, params["max_tokens"])
            whole: list[Completion] = []
            left = sampler.sample_until(aborted, [(request, drawn)], whole.append, 1)
            self.answered += len(whole)
            self.events.append("sampled")
        found: Completion | Partial = left[0].begun if left else whole[0]
        pairs, count = zip(found.token_ids, found.logprobs, strict=True), len(found.token_ids)
        choice = {
            "index": 0,
            "token_ids": list(found.token_ids),
            "logprobs": {"content": [{"token_id": token, "logprob": value} for token, value in pairs]},
            "finish_reason": "abort" if left else whole[0].finish_reason,
            "weight_versions": [{"version": self.label(label), "start": 0, "end": count}] if count else [],
        }
        return {"request_id": "r", "choices": [choice]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self._may_enter():
                    self._reply(200, vars(replace(owner._identity, version=owner.version)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self._may_enter():
                    return
                try:
                    answer = owner.take(self.path, body)
                except Gone:
                    owner.die()
                    self.close_connection = True
                    return
                self._reply(*answer)

            def _may_enter(self) -> bool:
                if owner.is_dead:
                    self.close_connection = True
                    return False
                while owner.hang.is_set():
                    threading.Event().wait(0.02)
                if owner._key and self.headers.get("Authorization") != f"Bearer {owner._key}":
                    self._reply(UNAUTHORIZED, {})
                    return False
                return True

            def _reply(self, status: int, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        return Handler
