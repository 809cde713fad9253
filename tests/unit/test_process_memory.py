"""A process that reads one shard after another does not keep what it has freed."""

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
