"""The ranks of a machine as copies of their launcher: they meet, they fail and they stop as torchrun's do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import left_of, start, wait_for

from phimr_nemo.errors import EXIT_PREEMPTED
from phimr_nemo.jobs.launch import RANK_VARIABLES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torchrun starts the ranks")

RANKS = 2
# Every rank tells what it is and the sum over all of its number and what it was given.
MEETS = """
import json, os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + float(sys.argv[1])])
dist.all_reduce(total)
seen = {"sum": total.item(), "size": dist.get_world_size(), "pid": os.getpid(), "environment": dict(os.environ)}
open(f"rank-{dist.get_rank()}", "w").write(json.dumps(seen))
dist.destroy_process_group()
"""
# Rank 1 ends, each time in another way; rank 0 waits until it is told to stop.
FAILS = """
import os, signal, sys, time
from phimr_nemo.errors import Preempted, UserError, exit_with_message
how = sys.argv[1]
with exit_with_message():
    if os.environ["RANK"] == "0":
        time.sleep(600)
    elif how == "refuses":
        raise UserError("a value", rule="a rule", remedy="a remedy")
    elif how == "stops":
        raise Preempted("stopped at step 7")
    elif how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(7)
"""
SLEEPS = """
import os, time
open(f"ready-{os.environ['RANK']}.tmp", "w").write(str(os.getpid()))
os.rename(f"ready-{os.environ['RANK']}.tmp", f"ready-{os.environ['RANK']}")
time.sleep(600)
"""
LAUNCHER = """
import sys, torch.distributed
from phimr_nemo.errors import exit_with_message
from phimr_nemo.jobs.node import run_copies
module, *all_arguments = sys.argv[1:]
with exit_with_message():
    for argument in all_arguments:
        if len(all_arguments) == 1:
            run_copies(module, [argument], 2)
            continue
        try:
            run_copies(module, [argument], 2)
        except Exception as error:
            print(f"{argument}: {type(error).__name__}: {error.args[0]}", flush=True)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A place with modules to run."""
    for name, text in (("meets", MEETS), ("fails", FAILS), ("sleeps", SLEEPS), ("launcher", LAUNCHER)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def environment(here: Path) -> dict[str, str]:
    paths = (str(here), os.environ.get("PYTHONPATH", str(Path(__file__).resolve().parents[2])))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def launch(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher.py", *words]
    return subprocess.run(
        command, cwd=here, env=environment(here), capture_output=True, text=True, timeout=300, check=False
    )


def test_the_copies_meet_with_what_torchrun_would_give_them(here: Path) -> None:
    done = launch(here, "meets", "10")
    assert done.returncode == 0, done.stderr
    seen: list[dict[str, Any]] = [json.loads((here / f"rank-{rank}").read_text()) for rank in range(RANKS)]
    # (0 + 10) + (1 + 10)
    assert [one["sum"] for one in seen] == [21.0, 21.0]
    assert {one["size"] for one in seen} == {RANKS}
    assert len({one["pid"] for one in seen}) == RANKS
    of_the_rank = {"RANK", "LOCAL_RANK"}
    for rank, one in enumerate(seen):
        given = one["environment"]
        expected = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert {name: given[name] for name in RANK_VARIABLES} == {**expected, **dict.fromkeys(of_the_rank, str(rank))}
    assert seen[0]["environment"]["MASTER_PORT"] == seen[1]["environment"]["MASTER_PORT"]


def test_what_a_rank_leaves_behind_is_what_its_launcher_says(here: Path) -> None:
    """Rank 0 would wait for ever: it is told to stop as soon as rank 1 has failed."""
    done = launch(here, "fails", "refuses", "stops", "is killed", "breaks")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "refuses: UserError: a value"
    assert said[1] == "stops: Preempted: stopped at step 7"
    assert said[2].endswith("rank 1 ended with signal SIGKILL, see above")
    assert said[3].endswith("rank 1 ended with exit code 7, see above")
    assert "a value" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_end_with_their_launcher(number: signal.Signals, here: Path) -> None:
    ready = [here / f"ready-{rank}" for rank in range(RANKS)]
    with start(
        [sys.executable, "launcher.py", "sleeps", "-"], cwd=here, env=environment(here), stderr=subprocess.PIPE
    ) as launcher:
        wait_for(lambda: all(file.exists() for file in ready), launcher, 120)
        ranks = [psutil.Process(int(file.read_text())) for file in ready]
        launcher.send_signal(number)
        launcher.communicate(timeout=120)
        assert launcher.returncode == (EXIT_PREEMPTED if number == signal.SIGTERM else -number)
    assert left_of(ranks, 60) == []
