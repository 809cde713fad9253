"""A stand-in for `trtllm-serve`, for machines without TensorRT-LLM: its command line and the HTTP interface that its
source documents, strictly, with real computations behind them (the built-in sampler on the directory it is given).

As there: unknown fields are refused; log-probabilities are those before the temperature, and `logprobs: 0` means
none; token ids come with `detokenize: false`; a stop token that is cut from a response keeps its log-probability, on
which the server fails. Two variables are for tests: STANDIN_PIDS, a directory in which it and a helper of its leave
their process ids, and STANDIN_FAULT, a file that says how it goes wrong when it starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULT, PIDS = "STANDIN_FAULT", "STANDIN_PIDS"
BROKEN = 7
"""The exit code of a start that fails."""
FIELDS: dict[str, Any] = {
    "n": 1,
    "max_tokens": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "seed": None,
    "stop_token_ids": [],
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "detokenize": True,
    "logprobs": None,
}
OK, BAD_REQUEST, NOT_FOUND, INTERNAL = 200, 400, 404, 500


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("trtllm-serve", allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--backend", choices=["pytorch"], required=True)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tp_size", type=int, default=1)
    parser.add_argument("--max_seq_len", type=int, required=True)
    parser.add_argument("--max_batch_size", type=int, required=True)
    parser.add_argument("--kv_cache_free_gpu_memory_fraction", type=float, default=0.9)
    return parser.parse_args(words)


class Refused(Exception):
    """Status and message of an answer that is an error."""


class Served:
    """The model."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from phimr_nemo.generate.local.engine import LocalSampler
        from phimr_nemo.model.files.hf import HFDirectory

        class RawSampler(LocalSampler):
            """Gives log-probabilities before the temperature."""

            def _choose(self, state: Any, logits: torch.Tensor, active: int, params: Any) -> Any:
                found = super()._choose(state, logits, active, params)
                rows = torch.arange(active)
                index = state.generated[:active] - 1
                raw = logits[:active].float().log_softmax(-1)
                state.logprobs[rows, index] = raw.gather(1, state.tokens[rows, index][:, None])[:, 0]
                return found

        source = HFDirectory(options.model)
        self._eos = source.architecture.eos_token_id
        self._sampler = RawSampler(
            source.architecture,
            ((name, source.read(name)) for name in source.names()),
            stop_token_ids=[],
            max_batch=options.max_batch_size,
            longrope_policy="long_when_max_length_exceeds_original",
            max_length=options.max_seq_len,
        )
        self._lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        from phimr_nemo.generate.sampler import Request, SamplingParams

        if unknown := body.keys() - FIELDS.keys() - {"model", "prompt"}:
            raise Refused(BAD_REQUEST, f"extra inputs are not permitted: {sorted(unknown)}")
        prompt, asked = body.get("prompt"), {**FIELDS, **body}
        if "model" not in body or not isinstance(prompt, list) or asked["n"] != 1:
            raise Refused(BAD_REQUEST, "this stand-in wants a model, a prompt of token ids, and n=1")
        stop = {*asked["stop_token_ids"], *([] if asked["ignore_eos"] else [self._eos])}
        with self._lock:
            self._sampler._stop = self._sampler._stop.new_tensor(sorted(stop))
            (done,) = self._sampler.sample(
                [Request("r", tuple(prompt), asked["seed"])],
                SamplingParams(asked["temperature"], asked["top_p"], asked["max_tokens"]),
            )
        tokens = list(done.token_ids)
        if done.finish_reason == "stop" and not asked["include_stop_str_in_output"]:
            tokens.pop()
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": done.finish_reason, "logprobs": None}
        if asked["logprobs"]:
            if len(tokens) != len(done.logprobs):
                raise Refused(INTERNAL, "assertion failed: as many log-probabilities as tokens")
            choice["logprobs"] = {"token_logprobs": list(done.logprobs)}
        choice["token_ids"] = None if asked["detokenize"] else tokens
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}


def handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Header and body in one segment.
        wbufsize = -1

        def do_GET(self) -> None:
            self._reply(OK if self.path == "/health" else NOT_FOUND, {})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                if self.path != "/v1/completions":
                    raise Refused(NOT_FOUND, "not found")
                self._reply(OK, served.complete(json.loads(body)))
            except Refused as error:
                status, message = error.args
                self._reply(status, {"object": "error", "message": message})

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


def leave_pids(directory: Path) -> None:
    """This process's id, and that of a helper as TensorRT-LLM's workers are, which would outlive it."""
    helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    for pid in (helper.pid, os.getpid()):
        (directory / str(pid)).touch()


def main() -> None:
    options = parse(sys.argv[1:])
    fault = Path(os.environ[FAULT])
    how = fault.read_text("utf-8") if fault.is_file() else ""
    leave_pids(Path(os.environ[PIDS]))
    if how == "exit":
        sys.exit(BROKEN)
    while how == "hang":
        time.sleep(0.1)
    if how:
        options.model = Path(how)
    server = ThreadingHTTPServer((options.host, options.port), handler(Served(options)))
    server.daemon_threads = True
    server.serve_forever(poll_interval=0.02)


if __name__ == "__main__":
    main()
