"""The Phi-3 folder stands alone: in Megatron-Bridge's place, with tests of its form, it works as it is."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

FOLDER = Path("phimr_nemo") / "bridges" / "phi3"


def test_its_files_import_nothing_of_this_project(repository: Path) -> None:
    files = sorted((repository / FOLDER).glob("*.py"))
    assert [file.name for file in files] == ["__init__.py", "phi3_bridge.py", "phi3_provider.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not [name for name in names if name.startswith("phimr_nemo")], file


def test_its_tests_pass_in_megatron_bridges_place(
    repository: Path, bridge_python: Path, bridge_variables: dict[str, str]
) -> None:
    tests = repository / "tests" / "bridge" / "contribution"
    command = [str(bridge_python), "-m", "pytest", "-q", "-p", "contribution_place", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(tests)], env=bridge_variables, cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"\b11 passed", done.stdout), done.stdout[-300:]
