"""A step of each stage makes no more products, operators, copies and Python calls than are written down.

A slow-down shows here on a machine too busy to measure it. The counts of tests/golden/work.json are of tiny shapes on
a CPU; what is intended to change them changes that file too, with the numbers that the failing test prints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed import run_distributed
from floor_runs import STAGES, make_inputs, settings
from work_worker import STEPS, Work, count

from phimr_nemo.training.metrics import Stage

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "work.json"
MARGIN = {"flops": 0.001, "operators": 0.005, "bytes": 0.005, "python_calls": 0.15}
"""How far a count may be from the written one: torch's work follows from the shapes and is the same in every run;
other versions of Python make other calls of the same source."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("work"))


def counted(stage: Stage, inputs: Path, output: Path, *, is_planted: bool = False) -> Work:
    steps = f"steps={STEPS}" if stage == "grpo" else f"max_steps={STEPS}"
    overrides = [*settings(stage, inputs, output), "checkpoint.every=100", steps]
    [work] = run_distributed(count, 1, stage, overrides, is_planted)
    found: Work = work
    return found


def apart(found: Work, wanted: Work) -> dict[str, str]:
    """What differs by more than its margin."""
    return {
        name: f"{found[name]:,} instead of {wanted[name]:,}"
        for name, margin in MARGIN.items()
        if abs(found[name] - wanted[name]) > margin * wanted[name]
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_does_the_work_that_is_written_down(stage: Stage, inputs: Path, tmp_path: Path) -> None:
    found = counted(stage, inputs, tmp_path / "run")
    wanted = json.loads(GOLDEN.read_text("utf-8")).get(stage, dict.fromkeys(MARGIN, 0))
    assert not apart(found, wanted), f'"{stage}": {json.dumps(found)}'


def test_two_more_copies_a_layer_are_seen(inputs: Path, tmp_path: Path) -> None:
    found = counted("midtrain", inputs, tmp_path / "run", is_planted=True)
    different = apart(found, json.loads(GOLDEN.read_text("utf-8"))["midtrain"])
    assert "bytes" in different
    assert "flops" not in different
