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
from phimr_nemo.jobs.cluster import (
    SITE_VARIABLES,
    check_layout,
    job_settings,
    parse_allocation,
    read_directives,
    read_site,
    stage_command,
)

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
    assert got[15:] == ["-m", "phimr_nemo.cli", "sft", "--config", "c.yaml", *HOSTILE]


def test_the_allocation_must_fit_the_layout() -> None:
    config = load_config(STAGES["midtrain"], REPOSITORY / "conf/midtrain/paper.yaml", ["base=models/phi-4-mini"])
    check_layout("midtrain", config, 16, 8)
    with pytest.raises(UserError, match="8 nodes with 8 processes each, for a layout of 128"):
        check_layout("midtrain", config, 8, 8)


SETTINGS = """
export SBATCH_ACCOUNT=mine SBATCH_PARTITION=$(printf batch)
SBATCH_OPTIONS=(--constraint=h100 '--comment=a b')
SBATCH_OPTIONS_sft=(--time=1:00:00 --nodes=2)
export PHIMR_PROCS_PER_NODE=4
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's settings; this machine's own say nothing."""
    for name in SITE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "site.env"
    path.write_text(SETTINGS, "utf-8")
    return path


def test_a_site_is_read_as_its_jobs_read_it(site: Path) -> None:
    facts = read_site(site, "sft")
    assert facts.variables == {"SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "batch", "PHIMR_PROCS_PER_NODE": "4"}
    common = {"constraint": "h100", "comment": "a b"}
    assert facts.options == {**common, "time": "1:00:00", "nodes": "2"}
    assert read_site(site, "grpo").options == common
    assert facts.file == site


def test_the_example_of_a_site_is_read(site: Path) -> None:
    facts = read_site(REPOSITORY / "slurm" / "site.env.example", "sft")
    assert facts.variables == {
        "SBATCH_ACCOUNT": "my-account",
        "SBATCH_PARTITION": "batch",
        "PHIMR_CONTAINER_RUNTIME": "none",
    }
    assert facts.options == {}


def test_directives_preset_and_site_come_together(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's directives, the preset's nodes over them, and the site's own words over both."""
    eight = load_config(STAGES["sft"], REPOSITORY / "conf/sft/phi4mini-8xh100.yaml", ["base=models/b"])
    assert read_directives("sft")["nodes"] == "16"
    plain = job_settings("sft", eight, read_site(site, "grpo"), REPOSITORY)
    assert (plain["nodes"], plain["gpus_per_node"], plain["time"]) == (1, 8, "1-00:00:00")
    assert (plain["account"], plain["partition"]) == ("mine", "batch")
    assert plain["additional_parameters"] == {
        "requeue": True,
        "dependency": "singleton",
        "constraint": "h100",
        "comment": "a b",
    }
    own = job_settings("sft", eight, read_site(site, "sft"), REPOSITORY)
    assert (own["nodes"], own["time"]) == (2, "1:00:00")
    # The job reads the file itself, before anything else.
    assert own["setup_lines"].startswith(f"source {site}\n")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("SBATCH_OPTIONS=(-N 2)\n", "-N"),
        ("if then\n", "site.env"),
        ("PHIMR_CONTAINER_RUNTIME=apptainer\n", "apptainer"),
        ("PHIMR_SERVER_NODES=2\n", "PHIMR_SERVER_NODES=2"),
        ("PHIMR_COLOCATED=1\n", "PHIMR_COLOCATED=1"),
    ],
)
def test_a_site_that_cannot_be_followed_is_named(text: str, named: str, site: Path) -> None:
    site.write_text(text, "utf-8")
    config = load_config(STAGES["sft"], REPOSITORY / "conf/sft/paper.yaml", ["base=models/b"])
    with pytest.raises(UserError, match=named):
        job_settings("sft", config, read_site(site, "sft"), REPOSITORY)


def test_a_site_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.env does not exist"):
        read_site(tmp_path / "no.env", "sft")


@pytest.mark.parametrize("text", ["16", "x8", "16x", "0x8", "16 x 8", "-1x8", "axb"])
def test_an_allocation_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="allocation"):
        parse_allocation(text)
    assert parse_allocation("16x8") == (16, 8)


def test_a_stage_that_is_not_there_is_refused() -> None:
    result = CliRunner().invoke(app, ["launch", "midtrian", "--dry-run"])
    assert isinstance(result.exception, UserError)


def test_the_dry_run_is_in_substance_the_sbatch_script(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMR_PYTHON", "/opt/python")
    site.write_text("export SBATCH_ACCOUNT=mine\n", "utf-8")
    values = ["base=models/a b", "optim.lr=2e-5"]
    result = CliRunner().invoke(app, ["launch", "midtrain", *values, "--site", str(site), "--dry-run"])
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
    assert words[-7:] == ["-m", "phimr_nemo.cli", "midtrain", "--config", "conf/midtrain/paper.yaml", *values]
    assert "#SBATCH --account=mine" in script


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
