"""The tests' own warm `phimr` says and does what the program does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_phimr import MODULE, Phimr

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere every command has an interpreter of its own"
)


@pytest.fixture(scope="module")
def warm() -> Iterator[Phimr]:
    """With little imported, so that it starts at once."""
    warm = Phimr("phimr_nemo.errors")
    yield warm
    warm.stop()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--version",), 0),
        (("generate", "--config", "own.yaml", "--dry-run"), 0),
        (("generate", "--config", "own.yaml", "--dry-run", "problems.count=many"), 2),
        (("no-such-command",), 2),
    ],
    ids=["version", "a file of this place", "a bad value", "no such command"],
)
def test_it_is_the_program(
    arguments: tuple[str, ...], code: int, warm: Phimr, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_bytes((repository / "conf" / "generate" / "tiny.yaml").read_bytes())
    variables = {"COLUMNS": "70", "TERM": "dumb"}
    program = subprocess.run(
        [sys.executable, "-m", MODULE, *arguments],
        cwd=tmp_path,
        env={**os.environ, **variables, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    done = warm(*arguments, place=tmp_path, variables=variables)
    assert (done.returncode, done.stdout, done.stderr) == (code, program.stdout, program.stderr)
    assert program.returncode == code


def test_one_that_was_ended_is_started_again(warm: Phimr) -> None:
    assert warm("--version").returncode == 0
    before = warm.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert warm("--version").returncode == 0
    assert warm.pid != before
