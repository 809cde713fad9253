"""What is tracked holds for every machine: no paths of one machine, no package hosts, no secrets, no large files."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
from pathlib import Path

import pytest

MAX_BYTES = 2 << 20
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 100
LICENSE_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
# Character classes keep these patterns from matching their own text.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(roo[t]|hom[e]/\w+|User[s]/\w+|wor[k]|op[t]/(pypi|wheels))/",
    "a package host": r"(?i)pypi\.or[g]|pythonhoste[d]|download\.pytorc[h]|\b(nvcr|ghcr|docker|quay)\.i[o]\b",
    "an index option with a host": r"(extra-)?index-url[ =]https?:/[/]",
    "the number of a task": r"(?i)\bissue #?\d+",
    "a secret": r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b",
}


@pytest.fixture(scope="module")
def tracked(repository: Path) -> list[Path]:
    done = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    # A file that is deleted but not yet committed is listed and not there.
    return [repository / name for name in done.stdout.split("\0") if name and (repository / name).is_file()]


def violations(text: str) -> list[str]:
    return [
        f"{what}: {match.group(0)}" for what, pattern in FORBIDDEN.items() for match in re.finditer(pattern, text)
    ]


def test_tracked_text_holds_for_every_machine(tracked: list[Path], repository: Path) -> None:
    found = {}
    for path in tracked:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # an image, for instance
        if problems := violations(text):
            found[str(path.relative_to(repository))] = problems
    assert found == {}


@pytest.mark.parametrize(
    "parts",
    [
        ("/roo", "t/.venv"),
        ("see /wor", "k/main"),
        ("'/hom", "e/me/x'"),
        ("https://pypi.or", "g/simple"),
        ("nvcr.i", "o/nvidia/nemo:25.04"),
        ("--index-url https:/", "/somewhere"),
        ("fixes issue", " 12"),
        ("hf_", "a" * 34),
    ],
)
def test_a_violation_is_found(parts: tuple[str, str]) -> None:
    assert len(violations("".join(parts))) == 1


@pytest.mark.parametrize("text", ["runs/paper/midtrain", "network/root/x", "https://arxiv.org/abs/2504.21233"])
def test_ordinary_text_is_not(text: str) -> None:
    assert violations(text) == []


def test_no_large_or_executable_data(tracked: list[Path], repository: Path) -> None:
    for path in tracked:
        assert path.stat().st_size <= MAX_BYTES, path
        assert path.suffix not in {".pkl", ".pt", ".pth", ".bin", ".pyc"}, path


def test_licence_is_apache_2(repository: Path) -> None:
    assert hashlib.sha256((repository / "LICENSE").read_bytes()).hexdigest() == LICENSE_SHA256


def test_modules_and_functions_stay_readable(tracked: list[Path], repository: Path) -> None:
    long = []
    for path in tracked:
        name = str(path.relative_to(repository))
        if path.suffix != ".py" or not name.startswith(("phimr_nemo/", "recipes/")):
            continue
        text = path.read_text("utf-8")
        if len(text.splitlines()) > MAX_MODULE_LINES:
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert long == []
