"""A Slurm that lives for one test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from controller import Slurm, missing


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Two nodes on this machine; skipped, with the reason, where that cannot be."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Slurm() as running:
        yield running
        left = [" ".join(process.cmdline()) for process in running.processes()]
    assert left == [], "jobs left processes behind"
