"""phimr launch: the job that NeMo-Run would submit is in substance the sbatch script's."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.cluster import check_layout, read_cluster, stage_command

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = (
    "run.output=a b",
    "x='single' \"double\"",
    "x=$(touch pwned)",
    "x=`touch pwned`",
    "x=; touch pwned #",
    "x=*",
)


def evaluated(words: Sequence[str], **variables: str) -> list[str]:
    """The words as a shell passes them on."""
    program = f"printf '%s\\0' {' '.join(words)}"
    done = subprocess.run(["bash", "-c", program], env=variables, capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.split("\0")[:-1]


def test_values_reach_the_stage_as_they_were_given() -> None:
    words = stage_command("pack", Path("my conf.yaml"), HOSTILE, python="python3", nodes=1, processes=None)
    got = evaluated(words)
    assert got == ["python3", "-m", "phimr_nemo.cli", "pack", "--config", "my conf.yaml", *HOSTILE]


def test_a_distributed_stage_meets_on_the_first_node() -> None:
    words = stage_command("sft", Path("c.yaml"), HOSTILE, python="python3", nodes=4, processes=8)
    got = evaluated(words, head_node_ip="10.0.0.1", SLURM_JOB_ID="12345", SLURM_RESTART_COUNT="2")
    assert got[:7] == ["python3", "-m", "phimr_nemo.jobs.node", "--nnodes", "4", "--nproc-per-node", "8"]
    facts = dict(zip(got[7:15:2], got[8:15:2], strict=True))
    # As in slurm/common.sh: port 20000 + 12345 mod 10000.
    assert facts["--rdzv-endpoint"] == "10.0.0.1:22345"
    assert facts["--rdzv-id"] == "12345-2"
    assert got[15:] == ["-m", "recipes.sft", "--config", "c.yaml", *HOSTILE]


def test_the_allocation_must_fit_the_layout() -> None:
    config = load_config(STAGES["midtrain"], REPOSITORY / "conf/midtrain/paper.yaml", ["base=models/phi-4-mini"])
    check_layout("midtrain", config, 16, 8)
    with pytest.raises(UserError, match="8 nodes with 8 processes each, for a layout of 128"):
        check_layout("midtrain", config, 8, 8)


def test_an_unknown_key_of_a_cluster_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("account: a\nno_such_key: 1\n", "utf-8")
    with pytest.raises(UserError, match="no_such_key"):
        read_cluster(path)


def test_a_stage_that_is_not_there_is_refused() -> None:
    result = CliRunner().invoke(app, ["launch", "midtrian", "--dry-run"])
    assert isinstance(result.exception, UserError)


def test_the_dry_run_is_in_substance_the_sbatch_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    values = ["base=models/a b", "optim.lr=2e-5"]
    result = CliRunner().invoke(app, ["launch", "midtrain", *values, "--python", "/opt/python", "--dry-run"])
    assert result.exit_code == 0, result.output
    script = result.output[result.output.index("#!/bin/bash") :]
    ours = (REPOSITORY / "slurm" / "midtrain.sh").read_text("utf-8")
    directives = {line for line in ours.splitlines() if line.startswith("#SBATCH ")}
    # Slurm signals the tasks here and the batch shell there; the names of logs differ.
    for directive in directives - {"#SBATCH --signal=B:USR1@120", "#SBATCH --output=%x-%j.log"}:
        assert directive in script.splitlines(), directive
    assert "#SBATCH --signal=USR1@120" in script
    line = next(line for line in script.splitlines() if line.startswith("srun --output"))
    words = shlex.split(line)
    # The last of a repeated option counts.
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    assert options["--kill-on-bad-exit"] == "0"
    assert options["--wait"] == "60"
    assert options["--chdir"] == str(REPOSITORY)
    start = words.index("/opt/python")
    assert words[start : start + 7] == shlex.split(
        "/opt/python -m phimr_nemo.jobs.node --nnodes 16 --nproc-per-node 8"
    )
    assert words[-6:] == ["-m", "recipes.midtrain", "--config", "conf/midtrain/paper.yaml", *values]


@pytest.mark.parametrize(("code", "requeued"), [(2, False), (3, True), (0, False)])
def test_what_nemo_runs_script_puts_back_in_the_queue(code: int, requeued: bool, tmp_path: Path) -> None:
    from phimr_nemo.jobs.cluster import SETUP_LINES

    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/said\n', "utf-8")
    scontrol.chmod(0o755)
    # The end of NeMo-Run's template.
    program = f"{SETUP_LINES}\n(exit {code})\nexitcode=$?\nif [ $exitcode -ne 0 ]; then scontrol requeue 7; fi"
    subprocess.run(["bash", "-c", program], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False)
    assert (tmp_path / "said").exists() == requeued
