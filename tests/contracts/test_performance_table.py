"""The figures of docs/performance.md are those of the newest file that `make bench` wrote."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "bench" / "performance_table.py"
performance_table = SimpleNamespace(**runpy.run_path(str(PROGRAM)))
RESULT = {
    "tokens_per_second": {"ours": 3000.4, "trl": 2000.0},
    "held_out_loss": {"ours": 1.1004, "trl": 1.2},
    "seconds_to_equal_loss": {"ours": 10.0, "trl": 15.0},
    "ratios": {"trl": 1.5},
    "ratio_to_equal_loss": 1.5,
    "equal_loss": 1.2,
    "sizes": {"documents": 300, "longest": 1024, "dtype": "fp32"},
}


def test_document_has_the_figures_of_the_newest_file() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--check"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_typed_figure_is_replaced(tmp_path: Path) -> None:
    machine = {"cores": 2, "processor": "Z80", "features": []}
    late = {"command": "bench/dpo.py", "failed": "late"}
    runs = {"train": {"command": "bench/train.py", "result": RESULT}, "dpo": late}
    path = tmp_path / "2026-01-02-bench.json"
    path.write_text(json.dumps({"date": "2026-01-02", "machine": machine, "runs": runs}))
    made = performance_table.document(f"before {performance_table.BEGIN} old {performance_table.END} after", path)
    assert made.startswith("before ")
    assert made.endswith(" after")
    assert "Z80" in made
    assert "3,000 (1.100)" in made
    assert "dpo" not in made
    assert performance_table.document(made.replace("3,000", "4,000"), path) == made


def test_a_training_run_becomes_a_line_a_side_and_one_of_the_time_to_its_loss() -> None:
    rows = performance_table.training(RESULT)
    assert [row[1:] for row in rows] == [
        ("3,000 (1.100)", "TRL packed 2,000 (1.200)", "1.50"),
        ("10.0", "TRL packed 15.0", "1.50"),
    ]


def test_both_engines_stand_in_a_line_a_case() -> None:
    found = {
        "ours_wall": 1200,
        "vllm_wall": 1000,
        "ours_cpu": 600,
        "vllm_cpu": 400,
        "ratio_wall": 1.2,
        "ratio_cpu": 1.5,
    }
    result = {"machine": {"dtype": "bf16", "threads": 2}, "cases": {"tiny, equal": found}}
    what = "rollouts, tiny, equal, bf16, 2 threads: tokens/s (per CPU-second)"
    row = (what, "1,200 (600)", "vLLM's CPU build 1,000 (400)", "1.20 (1.50)")
    assert performance_table.engines(result) == [row]


def test_packing_is_compared_with_whoever_was_there() -> None:
    ours = {"documents": 1000, "seconds": 0.5, "waste": 0.0005}
    theirs = {"documents": 1000, "seconds": 10.0, "waste": 0.001}
    found = performance_table.packing({"capacity": 16384, "ours": ours, "trl": theirs, "ratio": 20.0})
    what = "packing 1,000 documents into rows of 16,384: CPU-seconds (wasted)"
    assert found == [(what, "0.5 (0.050 %)", "TRL bfd 10 (0.100 %)", "20.00")]
    assert performance_table.packing({"capacity": 16384, "ours": ours}) == []
