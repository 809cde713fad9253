"""The notebooks of examples/notebooks run from their first cell to their last, without torch and without Jupyter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "examples" / "notebooks").glob("*.ipynb"))
ABSENT = ("torch", "transformers", "nemo", "megatron", "matplotlib", "duckdb")
SECONDS = 300
RUN = f"""
import json, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
namespace = {{"__name__": "__main__"}}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {{number}}", "exec"), namespace)
"""


def execute(notebook: Path) -> subprocess.CompletedProcess[str]:
    """Run the code cells in order in one namespace."""
    return subprocess.run(
        [sys.executable, "-c", RUN, str(notebook)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=SECONDS,
        check=False,
    )


def test_each_part_of_the_surface_has_a_notebook() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["grader", "packing", "pairs", "statistics"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path) -> None:
    done = execute(notebook)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []


def test_a_cell_that_fails_is_found(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": [line]} for line in ("value = 2\n", "assert value == 3\n")]
    path = tmp_path / "failing.ipynb"
    path.write_text(json.dumps({"cells": cells}), "utf-8")
    done = execute(path)
    assert done.returncode == 1
    assert "cell 1" in done.stderr
