"""The GPU lane's plan, rehearsed on the CPU: every part runs; one that fails, hangs or lacks a package stops none."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_lane
import gpu_parts
import psutil
import pytest
from gpu_lane import LEAST_SECONDS, PARTS, TOTAL_SECONDS, Part, results_in, run_parts

pytestmark = pytest.mark.slow

FACTS = {"device": "cpu", "versions": {"python": "3"}}
PATIENCE_SECONDS = 600.0
HANG_SECONDS = 15.0
"""Long enough for an interpreter to start on a machine that is busy."""
BREAKS = Part("breaks", PATIENCE_SECONDS, ("-c", "print('RESULT {\"half\": 1}'); raise ValueError('planted')"))
LACKS = Part("lacks", PATIENCE_SECONDS, ("-c", "import no_such_package.inside"))
ABSENT = Part("absent", PATIENCE_SECONDS, ("-c", "raise SystemExit('it was started')"), needs=("no_such_module",))
SILENT = Part("silent", PATIENCE_SECONDS, ("-c", "print('nothing that counts')"))
WORKS = Part("works", PATIENCE_SECONDS, ("-c", "print('RESULT {\"found\": 42}')"))


def hangs(pid_file: Path) -> Part:
    program = (
        "import pathlib, subprocess, sys, time\n"
        "print('RESULT {\"before\": 1}', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "time.sleep(3600)\n"
    )
    return Part("hangs", HANG_SECONDS, ("-c", program))


def records(out: Path, *parts: Part, total: float = 10 * PATIENCE_SECONDS) -> dict[str, dict[str, Any]]:
    """As they were returned, which is as they were written."""
    returned = run_parts(parts, out, total=total, rehearse=True, facts=FACTS)
    written = [json.loads((out / f"{part.name}.json").read_text("utf-8")) for part in parts]
    assert written == returned
    return {record["part"]: record for record in written}


def test_every_part_runs_on_the_cpu_around_a_planted_fault(tmp_path: Path) -> None:
    # The limits are those of a GPU; this machine may be slow.
    parts = [dataclasses.replace(part, seconds=PATIENCE_SECONDS) for part in PARTS]
    found = records(tmp_path, *parts[:4], BREAKS, *parts[4:])
    assert found["breaks"]["status"] == "failed"
    own = {name: record["status"] for name, record in found.items() if name != "breaks"}
    # Transformer Engine is not in this environment.
    lacking = {"parity-te-bf16", "train-fp8"}
    expected = {part.name: "lacks a package" if part.name in lacking else "ok" for part in PARTS}
    assert own == expected, {name: record["reason"] for name, record in found.items()}
    assert found["train-fp8"]["reason"] == "transformer_engine"
    assert found["parity-bf16"]["result"]["relative_error_logits"] < 0.1
    assert found["recipe"]["result"]["loss_last"] < found["recipe"]["result"]["loss_first"]
    assert found["device-tests"]["result"]["skipped"] == found["device-tests"]["result"]["tests"] > 0
    text = (tmp_path / "summary.txt").read_text("utf-8")
    assert text.startswith("A rehearsal")
    assert all(f"{name}: {record['status']}" in text for name, record in found.items())


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    found = records(tmp_path, BREAKS, LACKS, ABSENT, SILENT, WORKS)
    assert {name: (record["status"], record["result"]) for name, record in found.items()} == {
        "breaks": ("failed", {"half": 1}),
        "lacks": ("lacks a package", {}),
        "absent": ("lacks a package", {}),
        "silent": ("failed", {}),
        "works": ("ok", {"found": 42}),
    }
    assert "ValueError: planted" in found["breaks"]["reason"]
    assert (found["lacks"]["reason"], found["absent"]["reason"]) == ("no_such_package", "no_such_module")
    for record in found.values():
        assert record["machine"] == FACTS
        assert record["rehearsal"]
        assert record["date"].startswith("20")


def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    found = records(tmp_path, hangs(tmp_path / "pid"), WORKS)
    assert (found["hangs"]["status"], found["works"]["status"]) == ("out of time", "ok")
    # What it knew before is kept.
    assert found["hangs"]["result"] == {"before": 1}
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + PATIENCE_SECONDS
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process that the part had started is still there"
        time.sleep(0.05)


def test_what_is_known_is_written_before_the_next_part_starts(tmp_path: Path) -> None:
    sees = f"import json; print('RESULT', open({str(tmp_path / 'works.json')!r}).read().replace(chr(10), ' '))"
    found = records(tmp_path, WORKS, Part("sees", PATIENCE_SECONDS, ("-c", sees)))
    assert found["sees"]["result"] == found["works"]


def test_the_total_ends_the_lane(tmp_path: Path) -> None:
    waits = Part("waits", PATIENCE_SECONDS, ("-c", "import time; time.sleep(3600)"))
    found = records(tmp_path, waits, WORKS, total=LEAST_SECONDS + 1.0)
    assert (found["waits"]["status"], found["works"]["status"]) == ("out of time", "not started")


def test_each_part_gets_its_limit_out_of_twelve_minutes() -> None:
    assert sum(part.seconds for part in PARTS) <= TOTAL_SECONDS == 12 * 60
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_results_are_merged_and_half_a_line_is_left_out() -> None:
    text = 'RESULT {"a": 1, "b": 2}\nnoise\nRESULT {"b": 3}\nRESULT {"c": '
    assert results_in(text) == {"a": 1, "b": 3}


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    if gpu_lane.machine_facts().get("devices"):
        pytest.skip("there is a CUDA device")
    command = [sys.executable, gpu_lane.__file__, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "finds no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gib", "recomputed"), [(79.6, "full"), (93.6, "full"), (139.8, "none"), (178.0, "none")])
def test_a_gpu_of_80_gb_trains_the_model_with_recomputation(gib: float, recomputed: str) -> None:
    """16 bytes a parameter and the activations of a row, as transformers' shapes give them, are more than it has."""
    weights, gradients, masters, moments = 2, 2, 4, 8
    states = 3.836e9 * (weights + gradients + masters + moments)
    # Norms' inputs and outputs, queries with keys and values, attention's output, both halves of the MLP, in bf16.
    numbers = 3 * 3072 + (24 + 2 * 8) * 128 + 3072 + 3 * 8192
    needed = states + 2 * numbers * 16_384 * 32
    memory = int(gib * 2**30)
    assert gpu_parts.recomputed_on(memory) == recomputed
    assert (needed < memory) == (recomputed == "none")
