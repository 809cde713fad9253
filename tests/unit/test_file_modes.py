"""What a run leaves can be written by nobody else, and read by those whom the umask lets."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

MAKE = """
import os, sys
from pathlib import Path
from phimr_nemo.store.atomic import atomic_directory, atomic_write_text, keep_others_from_writing
os.umask(int(sys.argv[2], 8))
if sys.argv[3] == "guarded":
    keep_others_from_writing()
root = Path(sys.argv[1])
atomic_write_text(root / "made" / "file", "x")
with atomic_directory(root / "made" / "directory") as place:
    (place / "inner").mkdir()
    (place / "inner" / "file").write_text("x")
    (place / "link").symlink_to(root / "elsewhere")
(root / "made" / "plain").write_text("x")
"""


def modes(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode)
        for path in [root, *root.rglob("*")]
        if not path.is_symlink()
    }


@pytest.mark.parametrize(
    ("umask", "file", "directory"),
    [("022", 0o644, 0o755), ("000", 0o644, 0o755), ("027", 0o640, 0o750), ("077", 0o600, 0o700)],
)
def test_the_umask_decides_who_reads_and_nobody_else_writes(
    umask: str, file: int, directory: int, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_text("of somebody else")
    (tmp_path / "elsewhere").chmod(0o666)
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path), umask, "guarded"], check=True)
    assert modes(tmp_path / "made") == {
        ".": directory,
        "file": file,
        "plain": file,
        "directory": directory,
        "directory/inner": directory,
        "directory/inner/file": file,
    }
    # A link is not followed.
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o666


def test_without_the_guard_a_plain_file_would_be_writable(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path), "000", "bare"], check=True)
    found = modes(tmp_path / "made")
    assert found["plain"] == 0o666
    # What is written whole or not at all is safe by itself.
    assert (found["file"], found["directory/inner/file"]) == (0o644, 0o644)


def test_a_stage_leaves_nothing_that_others_can_write(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "phimr_nemo.cli", "generate", "--config", "conf/generate/tiny.yaml"]
    subprocess.run(
        [*command, "run.output=out", "problems.count=4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        check=True,
        preexec_fn=lambda: os.umask(0),
        capture_output=True,
    )
    found = modes(tmp_path / "out")
    assert len(found) > 4
    assert {name: oct(mode) for name, mode in found.items() if mode & 0o022} == {}
    assert json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["stage"] == "generate"
