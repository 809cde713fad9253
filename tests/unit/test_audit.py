"""The audit of the pinned packages is stored with its date, and its age is said without failing anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ANSWER = {
    "dependencies": [
        {"name": "good", "version": "1.0", "vulns": []},
        {"name": "bad", "version": "2.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}, {"id": "PYSEC-1"}]},
    ],
    "fixes": [],
}


@pytest.fixture
def audit(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", repository / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answering(text: str, code: int) -> Any:
    return lambda command, **_: subprocess.CompletedProcess(command, code, text)


def test_what_was_found_is_stored_and_its_age_is_said(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins, stored = tmp_path / "pins.txt", tmp_path / "audit.json"
    pins.write_text("good==1.0\nbad==2.0\n")
    assert "never done" in audit.age(date(2026, 1, 1), stored)
    monkeypatch.setattr(audit.subprocess, "run", answering(json.dumps(ANSWER), 1))
    assert audit.look_up([pins], stored) == 1
    facts = json.loads(stored.read_text())
    assert facts["weaknesses"] == {"bad 2.0": ["PYSEC-1", "PYSEC-2"]}
    day = date.fromisoformat(facts["date"])
    said = audit.age(day.replace(year=day.year + 1), stored)
    assert f"{facts['date']}, {(day.replace(year=day.year + 1) - day).days} days ago" in said
    assert "2 packages, 1 with known weaknesses" in said
    assert "changed" not in said
    pins.write_text("good==1.1\nbad==2.0\n")
    assert "the pins have changed since" in audit.age(day, stored)


def test_an_audit_that_failed_says_so_and_stores_nothing(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pins.txt").write_text("good==1.0\n")
    monkeypatch.setattr(audit.subprocess, "run", answering("", 0))
    assert audit.look_up([tmp_path / "pins.txt"], tmp_path / "audit.json") == 1
    assert not (tmp_path / "audit.json").exists()
    assert "not done" in capsys.readouterr().out


def test_continuous_integration_says_it(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, ".ci/audit.py", "age"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("audit of the pinned packages: ")
    assert ".ci/audit.py age" in (repository / ".ci" / "run").read_text("utf-8")
