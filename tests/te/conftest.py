"""What the lane's tests share: the way into processes that have Transformer Engine's Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
# Ranks are started by what starts them there, some inputs are those of the parity tests and of the tests on a GPU.
sys.path[:0] = [str(HERE.parent / "parity"), str(HERE.parent / "gpu")]

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def in_lane() -> Run:
    """``run(function, ranks, *arguments)``: each rank's value, in processes that have Transformer Engine."""
    import te_lane
    from distributed import run_prepared

    if not te_lane.is_there():
        pytest.skip(te_lane.REASON)
    # In a process of the lane `transformer_engine` is imported once; what starts it must not have it.
    assert str(te_lane.FOLDER) not in os.environ.get("PYTHONPATH", "")

    def run(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
        return run_prepared(te_lane.enter, function, ranks, *arguments)

    return run
