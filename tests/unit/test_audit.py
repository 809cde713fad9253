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


def advisory(name: str, *ranges: list[dict[str, str]], kind: str = "ECOSYSTEM", **more: Any) -> dict[str, Any]:
    affected = {
        "package": {"ecosystem": "PyPI", "name": name},
        "ranges": [{"type": kind, "events": events} for events in ranges],
        "versions": more.pop("versions", []),
    }
    return {"id": "PYSEC-1", "published": "2026-01-02T00:00:00Z", "affected": [affected], **more}


ALWAYS = [{"introduced": "0"}]


@pytest.mark.parametrize(
    ("version", "is_weak", "ranges", "more"),
    [
        ("1.0", True, [ALWAYS], {}),
        ("0.0.1.dev1", True, [ALWAYS], {}),
        ("2.0", False, [[{"introduced": "0"}, {"fixed": "2.0"}]], {}),
        ("2.0rc1", True, [[{"introduced": "0"}, {"fixed": "2.0"}]], {}),
        ("1.10", True, [[{"introduced": "1.9"}, {"fixed": "1.11"}]], {}),  # as numbers, not as text
        ("2.0", True, [[{"introduced": "0"}, {"last_affected": "2.0"}]], {}),
        ("2.0.1", False, [[{"introduced": "0"}, {"last_affected": "2.0"}]], {}),
        ("2.0+cpu", True, [[{"introduced": "0"}, {"last_affected": "2.0"}]], {}),
        ("2.0+cpu", False, [[{"introduced": "0"}, {"fixed": "2.0"}]], {}),
        # Two intervals in one range, not in their order; and two ranges.
        ("3.5", True, [[{"fixed": "4.0"}, {"introduced": "0"}, {"fixed": "2.0"}, {"introduced": "3.0"}]], {}),
        ("2.5", False, [[{"fixed": "4.0"}, {"introduced": "0"}, {"fixed": "2.0"}, {"introduced": "3.0"}]], {}),
        ("2.5", True, [[{"introduced": "9"}], [{"introduced": "2"}]], {}),
        ("2.5", False, [[{"introduced": "0"}, {"limit": "2.0"}]], {}),
        ("2.5", True, [[{"introduced": "0"}, {"limit": "*"}]], {}),
        ("1.0", False, [], {}),
        ("1.0.0", True, [], {"versions": ["not-a-version", "1.0"]}),
        ("1.0", False, [ALWAYS], {"kind": "GIT"}),
        ("1.0", False, [ALWAYS], {"withdrawn": "2026-02-01T00:00:00Z"}),
        # Bounds that are no versions of PEP 440: by the numbers they begin with; unreadable means all of them.
        ("2.6.1", False, [[{"introduced": "0"}, {"fixed": "2.6.0-cu124"}]], {}),
        ("2.5.9", True, [[{"introduced": "0"}, {"fixed": "2.6.0-cu124"}]], {}),
        ("2.5.9", True, [[{"introduced": "0"}, {"fixed": "nobody knows"}]], {}),
    ],
)
def test_a_version_is_weak_where_the_advisory_says_so(
    version: str, is_weak: bool, ranges: list[Any], more: dict[str, Any], audit: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "one.json").write_text(json.dumps(advisory("weak", *ranges, **more)))
    (tmp_path / "other.json").write_text(json.dumps(advisory("other", ALWAYS)))
    found, newest = audit.known(tmp_path, {"weak": {version}})
    assert found == ({f"weak {version}": ["PYSEC-1"]} if is_weak else {})
    assert newest == "2026-01-02"


def test_pins_are_compared_with_a_copy_of_the_database(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names in any spelling, extras, both Pythons' lines, YAML and JSON, several databases' names of one weakness."""
    pins, copy, stored = tmp_path / "pins.txt", tmp_path / "copy", tmp_path / "audit.json"
    pins.write_text(
        "# pinned\nGood==1.0\nSome_Thing[extra]==2.0 # why\n"
        'both==1.0; python_version < "3.11"\nboth==2.0; python_version >= "3.11"\n'
    )
    (copy / "vulns" / "deep").mkdir(parents=True)
    (copy / ".hidden").mkdir()
    (copy / ".hidden" / "broken.json").write_text("{")
    (copy / "README.yaml").write_text("a: list of something else\n")
    own = advisory("some.thing", [{"introduced": "0"}, {"fixed": "3"}], aliases=["CVE-1", "GHSA-1"])
    (copy / "vulns" / "own.json").write_text(json.dumps(own))
    (copy / "vulns" / "again.json").write_text(json.dumps({**own, "id": "GHSA-1", "aliases": ["CVE-1"]}))
    (copy / "vulns" / "deep" / "other.yaml").write_text(
        "id: PYSEC-2\npublished: '2025-01-01T00:00:00Z'\naffected:\n- package: {ecosystem: PyPI, name: Both}\n"
        "  ranges:\n  - {type: ECOSYSTEM, events: [{introduced: '0'}, {fixed: '1.5'}]}\n"
        "- package: {ecosystem: npm, name: good}\n  ranges:\n  - {type: SEMVER, events: [{introduced: '0'}]}\n"
    )
    assert audit.compare(copy, [pins], stored) == 1
    facts = json.loads(stored.read_text())
    assert facts["weaknesses"] == {"both 1.0": ["PYSEC-2"], "some-thing 2.0": ["PYSEC-1 (CVE-1, GHSA-1)"]}
    assert facts["packages"] == 4
    assert "advisories until 2026-01-02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pin", "content", "said"),
    [
        ("good==1.0", '{"id": ', "cannot be read"),
        ("good==1.0", '{"id": "x", "affected": []}', "no advisory about PyPI"),
        ("good>=1.0", json.dumps(advisory("good", ALWAYS)), "no exact pin"),
        ("good", json.dumps(advisory("good", ALWAYS)), "no exact pin"),
        ("good==1.*", json.dumps(advisory("good", ALWAYS)), "no exact pin"),
    ],
)
def test_a_copy_or_a_pin_that_cannot_be_read_is_a_failure(
    pin: str, content: str, said: str, audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pins.txt").write_text(pin)
    (tmp_path / "one.json").write_text(content)
    assert audit.compare(tmp_path, [tmp_path / "pins.txt"], tmp_path / "audit" / "stored.json") == 2
    assert said in capsys.readouterr().out


def test_every_stored_weakness_is_judged(repository: Path) -> None:
    """With its pin and its name, in the page that says what is trusted."""
    facts = json.loads((repository / "requirements" / "audit.json").read_text("utf-8"))
    judged = (repository / "SECURITY.md").read_text("utf-8")
    for pin, ids in facts["weaknesses"].items():
        assert pin in judged
        assert [name for name in ids if name.split(" ")[0] not in judged] == []
    assert facts["date"] in judged
    assert f"{facts['packages']} pins" in judged


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
