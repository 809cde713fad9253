"""The command `phimr plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from phimr_nemo.config import GenerationPlanConfig
from phimr_nemo.errors import UserError
from phimr_nemo.plan.generation import plan_generation
from phimr_nemo.plan.request import read_request
from phimr_nemo.plan.search import plan_training
from phimr_nemo.plan.tables import (
    describe,
    generation_values,
    largest_part,
    print_generation,
    print_training,
    training_values,
)
from phimr_nemo.process.memory import GIBIBYTE

WIDTH: Final = 126


def run_plan(arguments: Sequence[str], stage_config: Path | None, *, as_json: bool) -> None:
    """Plan and print.

    Args:
        arguments: `key=value` items (see :func:`phimr_nemo.plan.request.read_request`).
        stage_config: a YAML file whose own layout is planned; None = every layout of the paper's.
        as_json: one JSON object instead of tables.

    Raises:
        UserError: a mistake in the arguments, or nothing fits: the nearest layout, its excess and its largest part.
    """
    # A table's columns fit a terminal of this width; a file or pipe has none of its own.
    console = Console(width=max(Console().width, WIDTH))
    request = read_request(arguments, stage_config)
    if isinstance(request, GenerationPlanConfig):
        generation = plan_generation(request)
        if as_json:
            print(json.dumps(generation_values(request, generation)))
        else:
            print_generation(request, generation, console)
        return
    plan = plan_training(request.plan, request.config, request.arch, request.pinned)
    if as_json:
        print(json.dumps(training_values(request, plan)))
    else:
        print_training(request, plan, console)
    if not plan.fitting:
        nearest = plan.refused[0]
        raise UserError(
            f"no layout fits {request.plan.gpus} x {request.plan.gpu}: the nearest, {describe(nearest.candidate)}, "
            f"needs {nearest.memory.total / GIBIBYTE:.1f} of {plan.usable / GIBIBYTE:.1f} GiB; "
            f"largest part: {largest_part(nearest)}",
            rule=f"a GPU's memory without {request.plan.head_room:.0%} head-room holds every part",
            remedy="use more or larger GPUs, shorter sequences or recomputation",
        )
