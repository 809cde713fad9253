"""`phimr` answers without torch, and its exit codes are those that scripts rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phimr_nemo.config import STAGES

BLOCKED = ("torch", "transformers", "nemo", "nemo_run", "megatron", "nemo_aligner", "lightning", "vllm", "datasets")
COMMANDS = (
    *STAGES,
    *("quickstart", "report", "data", "convert", "bridge", "plan", "doctor", "status", "show", "compare", "continue"),
)


def phimr(*arguments: str, cwd: Path, light: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `phimr`; `light` makes every import of a heavy package fail."""
    block = f"sys.modules.update(dict.fromkeys({BLOCKED!r}));" if light else ""
    program = f"import sys; {block} sys.argv = ['phimr', *{list(arguments)!r}]; import phimr_nemo.cli.__main__"
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_help_needs_no_torch_and_names_every_command(tmp_path: Path) -> None:
    done = phimr("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, tmp_path: Path) -> None:
    done = phimr(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("sft", "--no-such-option"),
        ("no-such-command",),
        ("sft", "optim.no_such=1"),
        ("sft", "optim.lr=fast"),
        ("sft", "--config", "no-such-file.yaml"),
        ("sft", "without-an-equals-sign"),
        ("verify", "one-argument"),
        ("quickstart", "--seeds", "one"),
        ("convert", "source", "target", "--tp", "0"),
        ("plan", "stage=none"),
        ("plan", "stage=sft", "gpu=abacus"),
    ],
)
def test_a_mistake_is_one_clear_error_with_exit_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = phimr(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # The value at fault is named.
    assert arguments[-1].lstrip("-").partition("=")[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_doctors_verdict_is_the_exit_code(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['phimr', 'doctor']\n"
        "import phimr_nemo.jobs.doctor as doctor\n"
        "doctor.exit_code = lambda findings: int(sys.stdin.read())\n"
        "from phimr_nemo.cli.main import main; main()\n"
    )
    for code in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=str(code),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_dry_run_needs_no_torch_and_writes_nothing(stage: str, tmp_path: Path, repository: Path) -> None:
    presets = sorted((repository / "conf" / stage).glob("*.yaml"))
    assert presets, f"conf/{stage} holds no preset"
    preset = next((p for p in presets if p.stem == "tiny"), presets[0])
    done = phimr(stage, "--config", str(preset), "--dry-run", "run.seed=17", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seed: 17" in done.stdout
    assert list(tmp_path.iterdir()) == []
