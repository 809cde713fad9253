"""Run directories: what made a run, and metrics that survive a kill with each step once."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import start

from phimr_nemo import __version__
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import (
    CONFIG_FILE,
    METRICS_FILE,
    RUN_FILE,
    MetricsWriter,
    RunDirectory,
    code_versions,
    git_sha,
    read_metrics,
)

WAIT_SECONDS = 60.0


def board_steps(directory: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory / "tensorboard"))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)]


def test_versions_are_those_installed() -> None:
    versions = code_versions()
    assert versions["phimr-nemo"] == __version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["pyarrow"] == importlib.metadata.version("pyarrow")
    assert set(versions) - {"python", "git", "phimr-nemo"} <= {
        (d.metadata["Name"] or "").lower().replace("_", "-") for d in importlib.metadata.distributions()
    }


def test_git_sha_is_the_commit_or_unknown(repository: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", git_sha())
    if (repository / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert git_sha().removesuffix("+dirty") == head.stdout.strip()


def test_git_sha_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_sha() == "unknown"


def test_a_run_directory_tells_what_made_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.describe(stage="sft", config_yaml="optim:\n  lr: 1.0e-5\n", seed=3, facts={"world_size": 4})
    assert (run.path / CONFIG_FILE).read_text("utf-8") == "optim:\n  lr: 1.0e-5\n"
    described = json.loads((run.path / RUN_FILE).read_text("utf-8"))
    assert described["stage"] == "sft"
    assert described["seed"] == 3
    assert described["world_size"] == 4
    assert described["command"] == sys.argv
    assert described["versions"] == code_versions()
    assert run.checkpoints.parent == run.path


def test_done_only_after_finish(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.describe(stage="sft", config_yaml="", seed=0, facts={})
    assert not run.is_done
    run.finish(steps=12, loss=0.5)
    assert run.is_done
    assert RunDirectory(tmp_path / "run").closing_facts() == {"steps": 12, "loss": 0.5}


def test_metrics_are_read_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {"loss": 1.0 / (step + 1), "lr": 1e-5})
    rows = list(read_metrics(tmp_path))
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == [(s, 1.0 / (s + 1), 1e-5) for s in range(3)]
    assert board_steps(tmp_path, "loss") == [0, 1, 2]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {"loss": 10.0 + step})
    # The checkpoint was at step 4: steps 4 and 5 are done again.
    with MetricsWriter(tmp_path, from_step=4) as writer:
        for step in range(4, 8):
            writer.write(step, {"loss": 20.0 + step})
    rows = list(read_metrics(tmp_path))
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["loss"] for row in rows] == [10.0, 11.0, 12.0, 13.0, 24.0, 25.0, 26.0, 27.0]
    assert board_steps(tmp_path, "loss") == list(range(8))


def test_a_fresh_run_drops_an_older_ones_metrics(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
    with MetricsWriter(tmp_path):
        pass
    assert list(read_metrics(tmp_path)) == []


def test_a_line_cut_by_a_kill_is_skipped(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {"loss": float(step)})
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    # Resuming after the cut leaves a file in which every line is whole.
    with MetricsWriter(tmp_path, from_step=2) as writer:
        writer.write(2, {"loss": 2.0})
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("line", [b"[1]", b"7", b'{"loss": 1}', b'{"step": "1"}', b"\xff\xfe", b"[" * 100_000])
def test_a_line_that_no_run_writes_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged") as caught:
        list(read_metrics(tmp_path))
    assert "take that line out" in caught.value.remedy


def test_nan_is_kept(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": math.nan, "grad_norm": math.inf})
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "nothing")) == []


def test_what_was_written_before_a_kill_is_there(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from phimr_nemo.store.runs import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]))\n"
        "for step in range(5):\n"
        "    writer.write(step, {'loss': float(step)})\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = start(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    started = time.monotonic()
    while "written" not in process.stdout.readline():
        assert process.poll() is None
        assert time.monotonic() - started < WAIT_SECONDS
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.0, 1.0, 2.0, 3.0, 4.0]
