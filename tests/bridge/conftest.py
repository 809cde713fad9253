"""The bridge's environment as a fixture: one process that has Megatron-Bridge imported, asked by function name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start

REPOSITORY = Path(__file__).resolve().parents[2]
# Ranks of the trainers' own side are started by what starts them there.
sys.path.insert(0, str(REPOSITORY / "tests" / "parity"))
# For the same reason worker processes of a grader find the one that lies here.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
SERVER = Path(__file__).with_name("bridge_server.py")
# The tests that Megatron-Bridge's own repository would run; they import what this environment may lack.
collect_ignore_glob = [] if importlib.util.find_spec("megatron.bridge") else ["contribution/*"]

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def bridge_variables() -> dict[str, str]:
    """The environment of a process that runs `bridge_python`: offline, one thread, this tree's modules."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


@pytest.fixture(scope="session")
def in_bridge(
    bridge_python: Path, bridge_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """``run(function, world_size, *arguments)``: each rank's value of a function of bridge_worker.py."""
    log = tmp_path_factory.mktemp("bridge") / "log.txt"
    with (
        log.open("w") as errors,
        start(
            [bridge_python, SERVER],
            env=bridge_variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def run(function: str, world_size: int, *arguments: Any) -> list[Any]:
            request = {"function": function, "world_size": world_size, "arguments": arguments}
            stdin.write(json.dumps(request, default=str) + "\n")
            stdin.flush()
            line = stdout.readline()
            assert line, f"the bridge's process ended: {log.read_text()[-3000:]}"
            outcomes = json.loads(line)
            failures = [value for ok, value in outcomes if not ok]
            assert not failures, "\n".join(failures)
            return [value for _, value in outcomes]

        yield run
        process.kill()
