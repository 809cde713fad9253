"""Names of tests are plain words, and the same ones whenever, wherever and in whatever process they are collected.

Two workers that collect different names end the whole run before its first test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLAIN = re.compile(r"[ -~]+")
ESCAPE = re.compile(r"\\[xnutr0-9]|0x[0-9a-f]{6,}|<lambda>")
CLOCKED = """import gzip, pytest
@pytest.mark.parametrize("x", [1], ids=[str(gzip.compress(b"x")[4:8])])
def test_it(x): pass
"""
SEEDED = """import pytest
@pytest.mark.parametrize("x", {"one", "two", "three", "four", "five", "six"})
def test_it(x): pass
"""


def collected(root: Path, directory: Path, seed: int, options: Mapping[str, str]) -> list[str]:
    """The names of the tests below a directory, as a process of its own collects them.

    Args:
        root: what the names are relative to.
        directory: the working directory.
        seed: of Python's hashes.
        options: further pytest options.
    """
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "--collect-only",
                "-q",
                "--rootdir",
                str(root),
                "-p",
                "no:cacheprovider",
            ),
            *(word for option in options.items() for word in option),
            str(root / "tests"),
        ],
        cwd=directory,
        env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{root}{os.pathsep}{HERE}", "TZ": "UTC-9"},
        capture_output=True,
        text=True,
        check=False,
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return names


def test_names_are_the_same_on_another_day_in_another_place(
    request: pytest.FixtureRequest, repository: Path, tmp_path: Path
) -> None:
    options = {"-p": "another_day", "-c": str(repository / "pyproject.toml")}
    names = collected(repository, tmp_path, seed=7, options=options)
    assert len(set(names)) == len(names)
    assert {item.nodeid for item in request.session.items} <= set(names)


def test_names_are_plain_words(request: pytest.FixtureRequest) -> None:
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if not PLAIN.fullmatch(name) or ESCAPE.search(name)] == []


@pytest.mark.parametrize("text", [CLOCKED, SEEDED], ids=["the clock", "the hash seed"])
def test_a_name_that_moves_would_be_seen(text: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_planted.py").write_text(text, "utf-8")
    here = collected(tmp_path, tmp_path, seed=1, options={})
    assert here != collected(tmp_path, tmp_path, seed=2, options={"-p": "another_day"})
