"""Runs the short quickstart of some families, step by step, each step in a fork of one process.

    family_recipe.py ROOT FAMILY [FAMILY ...]

A family's steps write to ROOT/FAMILY/seed-0. Everything is imported once, which takes longer than the steps.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import small

from phimr_nemo.jobs.launch import launch, stage_function
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.jobs.steps.step import Step


def run(step: Step) -> None:
    """Run a step in a fork, because Megatron's state is one per process."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"failed: {step}"
        return
    code = 1
    try:
        stage, config = small.resolved(step)
        preflight(stage, config)
        launch(stage, config)
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def main(root: Path, families: list[str]) -> None:
    """Every step of every family."""
    for family in families:
        for step in small.quickstart(root / family / "seed-0", f"family={family}"):
            stage_function(step.arguments[0])
            run(step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
