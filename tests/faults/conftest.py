"""The table of faults: what was injected how often, and what became of it. Printed at the end of the session."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Table = Counter[tuple[str, str, str]]
_table: Table = Counter()


@pytest.fixture
def injected() -> Callable[[str, str, int, str], None]:
    """Count faults: (stage, fault, how many, what became of them)."""

    def record(stage: str, fault: str, count: int, outcome: str) -> None:
        _table[stage, fault, outcome] += count

    return record


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _table:
        return
    terminalreporter.write_line("| stage | fault | injected | outcome |\n|---|---|---:|---|")
    for (stage, fault, outcome), count in _table.items():
        terminalreporter.write_line(f"| {stage} | {fault} | {count} | {outcome} |")
    terminalreporter.write_line(f"| all | | {sum(_table.values())} | |")


def _mount(*arguments: str) -> bool:
    program = shutil.which("mount")
    return program is not None and subprocess.run([program, *arguments], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A directory with a size limit, and a function that sets options of it ("size=64m", "ro")."""
    place = tmp_path / "disk"
    place.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)):
        pytest.skip("mounting a small tmpfs is not permitted here")

    def change(options: str) -> None:
        assert _mount("-o", f"remount,{options}", str(place))

    yield place, change
    subprocess.run(["umount", str(place)], check=True)
