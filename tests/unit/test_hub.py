"""Uploads to a server on this machine that answers the hub's calls: what arrives, is sent again and is told."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.launch import run_stage

TOKEN = "hf_" + "secretsecretsecret"
REPOSITORY = "team/model"
SHARD_BYTES = 1_000_000


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload uses.

    Attributes:
        objects: large files that arrived, by SHA-256.
        files: what the last commit holds.
        sent: large files that were sent, each time.
        tokens: what callers showed.
        private: whether the repository was made so.
        broken_after: large files after which it refuses more; None = never.
        denied: whether every call is refused.
        asked: the paths of all calls, in their order.
        shown: what its addresses begin with.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.tokens: set[str] = set()
        self.private: bool | None = None
        self.broken_after: int | None = None
        self.attempts = itertools.count()
        self.denied = False
        self.asked: list[str] = []
        self.shown = self.address

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def card_errors(card: str) -> list[str]:
    """What the hub's rules say of a card's metadata: the licence and the base model are identifiers."""
    metadata = yaml.safe_load(card.split("---\n")[1])
    errors = [] if metadata["license"] in {"mit", "apache-2.0", "other"} else ['"license" must be one of [...]']
    base = metadata.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    return errors


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.rsplit("/", 1)[-1]
        # Several arrive at the same time.
        if self.server.broken_after is not None and next(self.server.attempts) >= self.server.broken_after:
            self.answer(400, {"error": "interrupted"})
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self.server.sent.append(oid)
        self.answer(200, {})

    def do_POST(self) -> None:
        body = self.body()
        self.server.asked.append(self.path)
        self.server.tokens.add(self.headers.get("Authorization", "none"))
        if self.server.denied:
            self.answer(403, {"error": "this token may not write"})
        elif self.path == "/api/repos/create":
            self.server.private = json.loads(body)["private"]
            self.answer(200, {"url": f"{self.server.address}/{REPOSITORY}"})
        elif self.path == "/api/validate-yaml":
            errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.path == f"/api/models/{REPOSITORY}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False, "oid": None} for n, m in modes.items()]
            self.answer(200, {"files": files})
        elif self.path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            self.answer(200, {"transfer": "basic", "objects": [self.place(o) for o in json.loads(body)["objects"]]})
        elif self.path == f"/api/models/{REPOSITORY}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.answer(200, {"commitUrl": f"{self.server.shown}/{REPOSITORY}/commit/1", "commitOid": "1"})
        else:
            self.answer(404, {"error": self.path})

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to send a large file; nothing to do for one that is there."""
        if wanted["oid"] in self.server.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.address}/upload/{wanted['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of several shards."""
    from phimr_nemo.model.files.hf import HFDirectory, write_hf_directory

    output = tmp_path_factory.mktemp("base")
    run_stage("base", load_config(STAGES["base"], Path("conf/base/tiny.yaml"), [f"run.output={output / 'run'}"]))
    whole = HFDirectory(output / "run" / "hf")
    tensors = ((name, whole.read(name)) for name in whole.names())
    write_hf_directory(
        output / "sharded",
        whole.architecture,
        tensors,
        tokenizer_from=whole.path,
        max_shard_bytes=SHARD_BYTES,
        extra_files={"README.md": "---\nlicense: mit\n---\n\n# A model\n"},
    )
    return output / "sharded"


def phimr_push(
    release: Path, endpoint: str, home: Path, *arguments: str, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """`push` in a process of its own: huggingface_hub reads its environment when it is imported."""
    program = (
        "import sys; from pathlib import Path; from phimr_nemo.report.hub import push\n"
        "from phimr_nemo.errors import UserError\n"
        "try: print(push(Path(sys.argv[1]), sys.argv[2], private=True))\n"
        "except UserError as error: sys.exit(f'error: {error}')"
    )
    return run(endpoint, home, token, "-c", program, str(release), *(arguments or (REPOSITORY,)))


def run(endpoint: str, home: Path, token: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    # With everything that huggingface_hub can say, requests and their headers included.
    said = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **said}
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def test_an_interrupted_upload_is_continued_and_arrives_whole(model: Path, hub: Hub, tmp_path: Path) -> None:
    shards = sorted(file.name for file in model.glob("*.safetensors"))
    assert len(shards) > 2
    hub.broken_after = 1
    first = phimr_push(model, hub.address, tmp_path)
    assert first.returncode == 1
    assert "run the same command again" in first.stderr
    assert hub.files == {}
    hub.broken_after = None
    second = phimr_push(model, hub.address, tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == f"{hub.address}/{REPOSITORY}/commit/1"
    # A hub that stands behind another address has the same files, and no address of ours for the commit.
    hub.shown = "http://hub.example"
    third = phimr_push(model, hub.address, tmp_path)
    assert third.returncode == 0, third.stderr
    assert third.stdout.strip() == f"{hub.address}/{REPOSITORY}"
    assert hub.files == {file.name: file.read_bytes() for file in model.iterdir()}
    assert hub.private is True
    # Each shard went over the line once.
    assert len(hub.sent) == len(set(hub.sent)) == len(shards)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert "authorization" in second.stderr.lower(), "requests are in this log, so the token could be"
    for done in (first, second):
        assert TOKEN not in done.stdout + done.stderr


def test_what_the_hub_refuses_is_one_message(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.denied = True
    done = phimr_push(model, hub.address, tmp_path)
    assert "HTTP status 403" in done.stderr
    assert "/api/repos/create" not in hub.asked
    assert TOKEN not in done.stdout + done.stderr
    for arguments, token, named in [
        ((REPOSITORY,), None, "HF_TOKEN"),
        (("no-organisation",), TOKEN, "'no-organisation'"),
        (("a/b/c",), TOKEN, "'a/b/c'"),
    ]:
        done = phimr_push(model, hub.address, tmp_path, *arguments, token=token)
        assert done.returncode == 1
        assert named in done.stderr
        assert "Traceback" not in done.stderr
    assert hub.files == {}


def test_export_uploads_its_release_and_keeps_the_token_out_of_the_run(model: Path, hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "release"
    export = (
        *("-m", "phimr_nemo.cli", "export", "--config", "conf/export/tiny.yaml"),
        *(f"run.output={output}", f"model={model}", "stages={}", "evaluations={}", "--push-to-hub", REPOSITORY),
    )
    without = run(hub.address, tmp_path / "home", None, *export)
    assert without.returncode == 2
    assert "HF_TOKEN" in without.stderr
    assert not output.exists()
    unknown = run(hub.address, tmp_path / "home", TOKEN, *export, "licence=my own")
    assert unknown.returncode == 2, unknown.stderr
    assert '"license" must be one of' in unknown.stderr
    assert hub.asked == ["/api/validate-yaml"]
    assert not output.exists()
    hub.denied = True
    refused = run(hub.address, tmp_path / "home", TOKEN, *export)
    assert refused.returncode == 2, refused.stderr
    hub.denied = False
    done = run(hub.address, tmp_path / "home", TOKEN, *export)
    assert done.returncode == 0, done.stderr
    assert hub.files == {file.name: file.read_bytes() for file in (output / "hf").iterdir()}
    written = b"".join(file.read_bytes() for file in output.rglob("*") if file.is_file())
    for text in (written, *(part.encode() for each in (refused, done) for part in (each.stdout, each.stderr))):
        assert TOKEN.encode() not in text
