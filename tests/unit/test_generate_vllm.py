"""vLLM in the process of `phimr generate`: greedy responses are the built-in engine's; LongRoPE's trap is shut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import start
from warm_phimr import Phimr

from phimr_nemo.config import BaseConfig, GenerateConfig, LongRopePolicy, load_config
from phimr_nemo.endpoint import ChatReply
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.vllm import check_longrope, weights_hash
from phimr_nemo.generate.stage import run_generate
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.shards import read_manifest, read_table

pytestmark = pytest.mark.slow

NEW_TOKENS, COUNT, SAMPLES = 24, 6, 2
SERVER_START_SECONDS, SERVER_STOP_SECONDS = 300, 20
# vLLM's attention on CPU wants heads of 32 dimensions or more.
SHAPE = ("hidden_size=128", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4")
# Large enough that a random model does not repeat its last token.
WEIGHTS = "initializer_range=0.2"


def base_model(out: Path, *changes: str) -> Path:
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={out}", *SHAPE, WEIGHTS, *changes]))
    return out / "hf"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"question": f"What is {'1' * (1 + 5 * i)}+1?", "answer": str(i + 1)} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def settings(out: Path, model: Path, problems: Path, **changes: Any) -> list[str]:
    values = {
        "run.output": out,
        "problems.path": problems,
        "teacher.path": model,
        "teacher.temperature": 0.0,
        "teacher.top_p": 1.0,
        "teacher.max_new_tokens": NEW_TOKENS,
        "teacher.prompt": "'{question}'",
        "teacher.engine.dtype": "fp32",
        "teacher.engine.max_batch": 4,
        "teacher.engine.eager": True,
        "rollouts_per_problem": SAMPLES,
        "shard_size": 4,
        **changes,
    }
    return [f"{name}={value}" for name, value in values.items()]


def generate(vllm_phimr: Phimr, repository: Path, arguments: list[str]) -> None:
    done = vllm_phimr("generate", "--config", "conf/generate/vllm.yaml", *arguments, place=repository)
    assert done.returncode == 0, done.stderr[-4000:]


def built_in(out: Path, model: Path, problems: Path) -> list[dict[str, Any]]:
    """The greedy rollouts of the engine that the project brings."""
    local = [
        *(f"run.output={out}", "problems.kind=file", f"problems.path={problems}", "shard_size=4"),
        *(
            "teacher.kind=model",
            "teacher.engine.kind=local",
            f"teacher.path={model}",
            "teacher.temperature=0",
            "teacher.top_p=1",
        ),
        *(f"teacher.max_new_tokens={NEW_TOKENS}", f"rollouts_per_problem={SAMPLES}"),
    ]
    run_generate(load_config(GenerateConfig, Path("conf/generate/tiny.yaml"), local))
    return read_table(out, "rollouts").to_pylist()


@pytest.mark.parametrize("original", [1024, 16], ids=["short factors", "long factors"])
def test_greedy_responses_are_those_of_the_built_in_engine(
    original: int,
    problems: Path,
    tmp_path: Path,
    repository: Path,
    vllm_phimr: Phimr,
) -> None:
    model = base_model(tmp_path / "base", f"original_max_position_embeddings={original}")
    generate(vllm_phimr, repository, settings(tmp_path / "vllm", model, problems))
    found = read_table(tmp_path / "vllm", "rollouts").to_pylist()
    # Ids and seeds too: they follow from the weights, not from the engine.
    assert found == built_in(tmp_path / "local", model, problems)
    assert len({row["response"] for row in found}) > 1
    counts = read_manifest(tmp_path / "vllm", "rollouts").counts
    assert counts["tokens"] == sum(row["tokens"] for row in found)


def test_the_other_factors_would_be_seen(problems: Path, tmp_path: Path) -> None:
    """The twin of the test above: equal weights in the other regime give other responses."""
    responses = []
    for original in (1024, 16):
        model = base_model(tmp_path / f"base-{original}", f"original_max_position_embeddings={original}")
        responses.append([row["response"] for row in built_in(tmp_path / f"out-{original}", model, problems)])
    assert responses[0] != responses[1]


def test_seeds_decide_the_responses(
    model: Path,
    problems: Path,
    tmp_path: Path,
    repository: Path,
    vllm_phimr: Phimr,
) -> None:
    rows = []
    for name, shard_size in (("a", 4), ("b", 6)):
        changes = {"teacher.temperature": 1.0, "shard_size": shard_size}
        generate(vllm_phimr, repository, settings(tmp_path / name, model, problems, **changes))
        rows.append(read_table(tmp_path / name, "rollouts").to_pylist())
    assert rows[0] == rows[1]
    assert len({row["response"] for row in rows[0]}) > COUNT


@contextlib.contextmanager
def served(python: Path, variables: dict[str, str], model: Path, name: str, log: Path) -> Iterator[str]:
    """vLLM's own server of a model; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(model), "--served-model-name", name, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "4"),
    ]
    with log.open("wb") as output:
        # A group of its own: the server starts processes that would outlive it.
        server = start(command, env=variables, stdout=output, stderr=output, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(SERVER_START_SECONDS):
            assert server.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                    break
            time.sleep(1.0)
        yield f"{url}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(SERVER_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_served_model_gives_the_same(
    model: Path, problems: Path, tmp_path: Path, vllm_python: Path, vllm_variables: dict[str, str]
) -> None:
    """The endpoint teacher against vLLM's real server, named as the built-in engine names the model."""
    name = weights_hash(model)
    with served(vllm_python, vllm_variables, model, name, tmp_path / "server.log") as url:
        overrides = [
            *(f"run.output={tmp_path / 'served'}", f"problems.path={problems}", "shard_size=4"),
            *(
                f"teacher.engine.endpoint.base_urls=[{url}]",
                f"teacher.engine.endpoint.model={name}",
                # Else a server leaves special tokens out of the text, which the built-in engine keeps.
                "teacher.engine.endpoint.extra_body={skip_special_tokens: false}",
                "teacher.temperature=0",
            ),
            *("teacher.top_p=1", f"teacher.max_new_tokens={NEW_TOKENS}", "teacher.prompt='{question}'"),
            *(f"rollouts_per_problem={SAMPLES}", "teacher.engine.endpoint.concurrency=4"),
        ]
        run_generate(load_config(GenerateConfig, Path("conf/generate/paper.yaml"), overrides))
    expected = built_in(tmp_path / "local", model, problems)
    for row in expected:
        # A random model may close a tag of its own accord; an endpoint's response gets the opening one back.
        # Where the limit cuts a character, the server leaves its first bytes out of the stream.
        row["response"] = ChatReply(row["response"].rstrip("\ufffd"), "", row["finish_reason"], 0, 0).response
    assert read_table(tmp_path / "served", "rollouts").to_pylist() == expected


def test_without_vllm_the_remedy_is_named(model: Path, problems: Path, tmp_path: Path) -> None:
    assert "vllm" not in sys.modules
    arguments = settings(tmp_path / "out", model, problems)
    config = load_config(GenerateConfig, Path("conf/generate/vllm.yaml"), arguments)
    with pytest.raises(UserError, match="setup-vllm"):
        run_generate(config)


def test_the_trap_of_longrope_is_shut(model: Path) -> None:
    architecture = HFDirectory(model).architecture
    original = architecture.original_max_position_embeddings
    assert architecture.long_factor is not None
    default: LongRopePolicy = "long_when_max_length_exceeds_original"
    check_longrope(model, default, original + 1)
    for policy in ("per_sequence", "always_short"):
        check_longrope(model, policy, original)
        with pytest.raises(UserError, match=policy):
            check_longrope(model, policy, original + 1)


def test_weights_of_other_families_have_a_hash_of_their_files(model: Path, tmp_path: Path) -> None:
    assert weights_hash(model) == HFDirectory(model).weights_hash()
    hashes = set()
    for content in (b"a", b"b"):
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        (tmp_path / "model.safetensors").write_bytes(content)
        hashes |= {weights_hash(tmp_path), weights_hash(tmp_path)}
    assert len(hashes) == 2
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        weights_hash(tmp_path)
