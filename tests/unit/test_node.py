"""One node's launcher: versions, signals for the workers, exit codes that a scheduler's script can act on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from processes import start
from serving import free_port
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
    c10d_rendezvous_backend,
)

from phimr_nemo.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_PREEMPTED, EXIT_USER, UserError
from phimr_nemo.jobs.node import ALIGNER, GENERATION, check_versions, main, rendezvous_options
from phimr_nemo.process.children import STOP_SIGNALS

WAIT_SECONDS = 60.0
TESTED = {"nemo-toolkit": "2.4.1", "megatron-core": "0.13.1", "nemo-aligner": "0.7.0"}
WORKERS = 2
# Marks that it runs, writes its process id; saves when it is told to; otherwise does what its rank is told to.
WORKER = """
import os, pathlib, signal, sys, time
mark = pathlib.Path(sys.argv[1] + os.environ["RANK"])
def save(number, frame):
    mark.with_suffix(".saved").write_text(signal.Signals(number).name)
    sys.exit(3)
if sys.argv[2] != "unprepared":
    signal.signal(signal.SIGTERM, save)
mark.with_suffix(".tmp").write_text(str(os.getpid()))
mark.with_suffix(".tmp").rename(mark.with_suffix(".ready"))
if sys.argv[2].isdigit():
    sys.exit(int(sys.argv[2]))
time.sleep(120)
"""


class Node:
    """The launcher with two workers of `WORKER`."""

    def __init__(self, directory: Path, behaviour: str) -> None:
        script = directory / "worker.py"
        script.write_text(WORKER, "utf-8")
        self.mark = directory / "worker"
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0")
        self.process: subprocess.Popen[str] = start(
            [
                *(sys.executable, "-m", "phimr_nemo.jobs.node", "--nnodes", "1", "--nproc-per-node", str(WORKERS)),
                *(*rendezvous, str(script), str(self.mark), behaviour),
            ],
            ctrl_c=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        """Process ids, once all are there."""
        files = [self.mark.parent / f"{self.mark.name}{rank}.ready" for rank in range(WORKERS)]
        deadline = time.monotonic() + WAIT_SECONDS
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.05)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, errors


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    started = Node(tmp_path, request.param)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("node", "number"), [("wait", number) for number in STOP_SIGNALS[:3]], indirect=["node"])
def test_a_stop_signal_lets_the_workers_save(node: Node, number: signal.Signals, tmp_path: Path) -> None:
    workers = node.workers()
    # To the launcher alone, as from a shell in a container.
    node.process.send_signal(number)
    assert node.end()[0] == EXIT_PREEMPTED
    for rank in range(WORKERS):
        assert (tmp_path / f"worker{rank}.saved").exists()
    assert not any(is_alive(pid) for pid in workers)


@pytest.mark.parametrize("node", ["unprepared"], indirect=True)
def test_workers_that_have_not_begun_to_listen_are_preempted_too(node: Node) -> None:
    node.workers()
    node.process.send_signal(signal.SIGUSR1)
    assert node.end()[0] == EXIT_PREEMPTED


@pytest.mark.parametrize("node", ["wait"], indirect=True)
def test_a_killed_rank_ends_the_node_and_is_named(node: Node) -> None:
    workers = node.workers()
    os.kill(workers[1], signal.SIGKILL)
    code, errors = node.end()
    assert code == EXIT_INTERNAL
    assert "rank 1 ended with signal SIGKILL" in errors
    assert not any(is_alive(pid) for pid in workers)


@pytest.mark.parametrize(
    ("node", "code"),
    [("0", EXIT_DONE), (str(EXIT_USER), EXIT_USER), ("7", EXIT_INTERNAL)],
    indirect=["node"],
)
def test_the_exit_code_is_the_workers(node: Node, code: int) -> None:
    assert node.end()[0] == code


def test_the_tested_generation_is_accepted() -> None:
    check_versions("grpo", TESTED)
    check_versions("midtrain", {**TESTED, "nemo-toolkit": "2.4.0rc1"})
    # NeMo alone trains stages 1 and 2.
    check_versions("sft", {name: TESTED[name] for name in GENERATION})


@pytest.mark.parametrize(
    ("module", "change", "named"),
    [
        ("sft", {"nemo-toolkit": "2.5.0"}, "nemo-toolkit 2.5.0"),
        ("sft", {"megatron-core": "0.130.0"}, "megatron-core 0.130.0"),
        ("dpo", {"nemo-aligner": None}, "nemo-aligner is absent"),
    ],
)
def test_another_generation_is_refused_by_name(module: str, change: dict[str, str | None], named: str) -> None:
    found = {name: version for name, version in {**TESTED, **change}.items() if version is not None}
    with pytest.raises(UserError, match=named) as caught:
        check_versions(module, found)
    for name, version in GENERATION.items():
        assert f"{name} {version}.x" in caught.value.rule
    assert module in caught.value.problem


def test_a_refusal_comes_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phimr_nemo.jobs.node.installed_versions", lambda _names: {})
    with pytest.raises(UserError, match="nemo-aligner is absent"):
        main(["--nnodes", "1", "-m", "phimr_nemo.cli", "dpo", "x"])


@pytest.mark.parametrize("node", ["wait"], indirect=True)
def test_a_second_ctrl_c_ends_everything_at_once(node: Node) -> None:
    workers = node.workers()
    for pid in workers:
        # They would never answer.
        os.kill(pid, signal.SIGSTOP)
    node.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert node.process.poll() is None
    node.process.send_signal(signal.SIGINT)
    assert node.end()[0] == EXIT_PREEMPTED
    assert not any(is_alive(pid) for pid in workers)


def test_what_is_required_is_what_the_tests_run_with() -> None:
    pins = (Path(__file__).resolve().parents[2] / "setup.cfg").read_text("utf-8")
    assert f"nemo_toolkit[lightning]=={GENERATION['nemo-toolkit']}." in pins
    assert f"megatron-core=={GENERATION['megatron-core']}." in pins
    aligner = (Path(__file__).resolve().parents[2] / "requirements" / "aligner.txt").read_text("utf-8")
    assert f"nemo-aligner=={ALIGNER['nemo-aligner']}." in aligner


def meet(options: str, port: int) -> object:
    """What torch makes of them on a machine whose rendezvous name belongs to another network than its own name."""
    given = dict(pair.split("=") for pair in options.split(",") if pair)
    parameters = RendezvousParameters("c10d", f"localhost:{port}", "job", 2, 2, read_timeout="1", **given)
    with mock.patch.object(c10d_rendezvous_backend, "_matches_machine_hostname", return_value=False):
        return c10d_rendezvous_backend.create_backend(parameters)


def test_the_first_node_opens_the_meeting_place_whatever_its_name() -> None:
    port = free_port()
    first = meet(rendezvous_options("2", "", {"SLURM_PROCID": "0"}), port)
    second = meet(rendezvous_options("2", "", {"SLURM_PROCID": "1"}), port)
    assert (first is None, second is None) == (False, False)


def test_without_being_told_no_node_opens_it() -> None:
    with pytest.raises(RendezvousConnectionError):
        meet("", free_port())


@pytest.mark.parametrize(
    ("nodes", "given", "environment", "options"),
    [
        ("1", "", {"SLURM_PROCID": "0"}, ""),
        ("2", "", {}, ""),
        ("2", "is_host=1", {"SLURM_PROCID": "3"}, "is_host=1"),
        ("16", "read_timeout=9", {"SLURM_PROCID": "10"}, "read_timeout=9,is_host=False"),
    ],
)
def test_who_opens_it_is_said_where_slurm_has_numbered_several(
    nodes: str, given: str, environment: dict[str, str], options: str
) -> None:
    assert rendezvous_options(nodes, given, environment) == options
