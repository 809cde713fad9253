"""What a process has freed: a stage over shards does not keep it, one that computes step after step does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from phimr_nemo.process.memory import ARROW_POOL

# What every command does before it imports Arrow.
PROGRAM = """
import sys
from phimr_nemo.cli import main
sys.argv = ["phimr", "--help"]
try:
    main.main()
except SystemExit:
    pass
assert "pyarrow" not in sys.modules
import pyarrow
print(pyarrow.default_memory_pool().backend_name)
"""


@pytest.mark.parametrize(("chosen", "found"), [(None, "system"), ("mimalloc", "mimalloc")])
def test_arrow_takes_the_c_librarys_memory_unless_the_user_chose(chosen: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != ARROW_POOL}
    if chosen is not None:
        environment[ARROW_POOL] = chosen
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == found


# Two tensors a step, the second freed last: it is the heap's end that goes back. Prints the pages that were mapped.
STEPS, STEP_BYTES = 20, 12 * 2**20
HUGE_PAGE = 2**21
"""The largest that the system maps at once."""
FAULTS = f"""
import resource, sys
import numpy
from phimr_nemo.process.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    first = numpy.ones({STEP_BYTES}, numpy.uint8)
    return first + 1
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str, **variables: str) -> int:
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)} | variables
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, way], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_a_steps_freed_memory_is_the_next_ones() -> None:
    """Else each step asks the system for its pages again; a user's own settings are left alone."""
    assert faults("keep") < STEPS
    at_least = STEPS * STEP_BYTES // HUGE_PAGE
    assert faults("default") >= at_least
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") >= at_least
