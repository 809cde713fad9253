"""A rollout server of a GRPO job: what it is told, and that it comes back."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs import server_node

CONF = Path(__file__).resolve().parents[2] / "conf" / "grpo"
PAPER = CONF / "paper.yaml"
KEY = "engine.api_key_env=PHIMR_KEY"
# Counts its starts; dies twice, then refuses its input.
SERVER = """
import pathlib, sys
starts = pathlib.Path(sys.argv[1])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
sys.exit(2 if len(starts.read_text()) == 3 else 1)
"""


@pytest.fixture
def signals() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_server_is_told_what_the_run_needs() -> None:
    config = load_config(
        STAGES["grpo"],
        PAPER,
        ["base=models/b", "sequence_length=4096", "max_new_tokens=3072", KEY, "engine.directory=/shared/w"],
    )
    words = server_node.serve_arguments(config, 3)
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "models/b"
    assert options["--max-length"] == "4096"
    assert options["--port"] == "8003"
    assert options["--dtype"] == config.model.dtype == "bf16"
    assert options["--longrope"] == config.model.longrope
    assert options["--weights-directory"] == "/shared/w"
    assert options["--engine"] == "vllm"
    # The options are the command's own.
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for option in options:
        assert option in shown


def test_a_run_with_tensorrt_llm_gets_its_servers() -> None:
    words = [
        server_node.serve_arguments(load_config(STAGES["grpo"], CONF / f"{preset}.yaml", ["base=models/b", KEY]), 0)
        for preset in ("paper", "trtllm")
    ]
    assert [given[given.index("--engine") + 1] for given in words] == ["vllm", "trtllm"]
    (different,) = [pair for pair in zip(*words, strict=True) if len(set(pair)) > 1]
    assert different == ("vllm", "trtllm")


@pytest.mark.parametrize(("preset", "named"), [("paper", "api_key_env"), ("tiny", "kind=local")])
def test_a_run_without_servers_or_key_is_refused(preset: str, named: str) -> None:
    config = load_config(STAGES["grpo"], CONF / f"{preset}.yaml", ["base=models/b"])
    with pytest.raises(UserError, match=named):
        server_node.serve_arguments(config, 0)


def test_colocated_servers_share_the_gpus_of_their_node() -> None:
    config = load_config(
        STAGES["grpo"],
        PAPER,
        ["base=models/b", KEY, "engine.colocated=true", "engine.memory_share=0.4", "engine.dtype=fp16"],
    )
    words = server_node.serve_arguments(config, 1, 2)
    assert words[-5:] == ["--memory-share", "0.4", "--tensor", "2", "--colocated"]
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in words if word.startswith("--"))
    node = {"SLURM_GPUS_ON_NODE": "8"}
    assert [server_node.own_gpus(number, 4, node) for number in (0, 3)] == [["0", "1"], ["6", "7"]]
    chosen = {**node, "CUDA_VISIBLE_DEVICES": "4,GPU-5"}
    assert [server_node.own_gpus(number, 2, chosen) for number in (0, 1)] == [["4"], ["GPU-5"]]
    assert server_node.own_gpus(0, 2, {}) == []
    for servers in (3, 16):
        with pytest.raises(UserError, match=f"{servers} colocated servers on a node with 8 GPUs"):
            server_node.own_gpus(0, servers, node)


@pytest.mark.usefixtures("signals")
def test_a_server_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_node, "RESTART_SECONDS", 0.01)
    starts = tmp_path / "starts"
    assert server_node.keep_running([sys.executable, "-c", SERVER, str(starts)]) == 2
    assert starts.read_text() == "xxx"
