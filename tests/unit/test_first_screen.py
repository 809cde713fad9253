"""What a user sees first is the project's own: libraries say nothing while a stage is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOAD = """
import sys
from phimr_nemo.jobs.launch import stage_function
for stage in sys.argv[1:]:
    assert callable(stage_function(stage))
"""


@pytest.mark.parametrize(
    "stages", [("base", "generate", "verify", "pack", "evaluate", "export"), ("midtrain", "grpo")]
)
def test_libraries_are_silent_while_a_stage_is_loaded(stages: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, *stages], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
