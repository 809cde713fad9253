"""The output layer's Triton kernels compile for a Hopper GPU: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import te_lane

pytestmark = pytest.mark.skipif(not te_lane.is_there(), reason=te_lane.REASON)

REPOSITORY = Path(__file__).resolve().parents[2]
FUSED = REPOSITORY / "phimr_nemo" / "losses" / "fused.py"
KERNELS = ("_statistics", "_gradient")


def compile_kernels(module: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    path = os.pathsep.join([str(REPOSITORY), str(te_lane.FOLDER)])
    worker = Path(__file__).with_name("compile_worker.py")
    return subprocess.run(
        [sys.executable, str(worker), str(module)],
        env={**environment, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_kernel_is_compiled_to_machine_code(tmp_path: Path) -> None:
    done = compile_kernels(FUSED, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    # Three formats of logits, with and without entropies.
    assert [words[0] for words in found] == [name for name in KERNELS for _ in range(6)]
    assert all(words[-1] == "cubin" for words in found)


def test_a_planted_name_that_the_compiler_does_not_know_is_caught(tmp_path: Path) -> None:
    text = FUSED.read_text("utf-8")
    planted = tmp_path / "planted.py"
    planted.write_text(text.replace("logits: tl.tensor", "logits: Tensor"), "utf-8")
    assert planted.read_text("utf-8") != text
    done = compile_kernels(planted, tmp_path / "cache")
    assert done.returncode != 0
    assert "Cannot access global variable Tensor" in done.stderr
