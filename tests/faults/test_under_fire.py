"""The tiny recipe killed by SIGKILL at random moments, each time continued on another layout: the end is the same.

`make faults` kills all stages 50 times, the short form two of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_length import LONG
from under_fire import DATA, SIZES, TRAINING, settings

from phimr_nemo.config import STAGES, load_config

pytestmark = pytest.mark.slow

Injected = Callable[[str, str, int, str], None]
KILLS = 50 if LONG else 3
FLOWN = (*DATA, *TRAINING) if LONG else ("pack", "midtrain")
LOSS_BOUND = 1e-3
"""Of a step's loss on another layout (nats, or the objective's own unit): sums are taken in another order."""


def weight_bound(stage: str, root: Path) -> float:
    """The largest difference of a weight: Adam moves it by about lr a step, and where its gradient is nothing but
    rounding, another order of sums turns the way it moves."""
    config: Any = load_config(STAGES[stage], Path(settings(root, stage, root)[0]), settings(root, stage, root)[1:])
    steps = config.steps if stage in ("grpo", "distill") else config.max_steps
    return 2.0 * config.optim.lr * float(steps)


@pytest.fixture(scope="module")
def flights(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("fire")
    program = Path(__file__).with_name("under_fire.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(program), str(root), str(KILLS), "0", *FLOWN],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]


def test_every_stage_ends_where_the_undisturbed_run_did(
    flights: list[dict[str, Any]], tmp_path: Path, injected: Injected
) -> None:
    assert {flight["stage"] for flight in flights} <= set(FLOWN)
    kills = Counter[tuple[str, str]]()
    for flight in flights:
        layouts, stage = set(flight["layouts"]), flight["stage"]
        if stage in DATA or layouts == {"1"}:
            assert flight["same"], flight
            outcome = "the same bits"
        else:
            assert flight["weight"] <= weight_bound(stage, tmp_path), flight
            assert flight["loss"] <= LOSS_BOUND, flight
            outcome = "within the bound"
        kills[stage, outcome] += len(flight["layouts"]) - 1
    assert kills.total() == KILLS
    for (stage, outcome), count in kills.items():
        injected(stage, "SIGKILL of all ranks, continued on another layout", count, outcome)


def test_the_short_recipe_has_a_size_for_every_stage() -> None:
    assert set(SIZES) == {"base", *DATA, *TRAINING}
