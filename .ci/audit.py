"""Known weaknesses of the pinned packages: looked up, stored with their date, and how old that is.

audit.py look-up FILE...    ask pip-audit (needs the network) and store what it says; 1 when it finds something
audit.py age                say when that was, and what was found; never fails
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, Final

STORED: Final = Path(__file__).resolve().parents[1] / "requirements" / "audit.json"
COMMAND: Final = ("--strict", "--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json")


def pins_hash(files: Sequence[Path]) -> str:
    """Of the files' contents, in their order."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def look_up(files: Sequence[Path], stored: Path = STORED) -> int:
    """Ask pip-audit and store its answer; its exit code."""
    program = Path(sys.executable).with_name("pip-audit")
    given = [item for path in files for item in ("-r", str(path))]
    done = subprocess.run([str(program), *COMMAND, *given], stdout=subprocess.PIPE, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(
            "audit of the pinned packages: not done. pip-audit gave no result (see above): it asks the package index"
        )
        print("and the database of weaknesses. Nothing is stored; a result stored before stays with its date.")
        return done.returncode or 1
    weak = {
        f"{package['name']} {package['version']}": sorted(one["id"] for one in package["vulns"])
        for package in found
        if package.get("vulns")
    }
    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "files": [path.name for path in files],
        "pins_sha256": pins_hash(files),
        "packages": len(found),
        "weaknesses": weak,
    }
    stored.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return done.returncode


def age(today: date, stored: Path = STORED) -> str:
    """A sentence about the stored result."""
    if not stored.is_file():
        return "audit of the pinned packages: never done (make audit)"
    facts = json.loads(stored.read_text("utf-8"))
    days = (today - date.fromisoformat(facts["date"])).days
    files = [stored.parent / name for name in facts["files"]]
    same = all(path.is_file() for path in files) and pins_hash(files) == facts["pins_sha256"]
    return (
        f"audit of the pinned packages: {facts['date']}, {days} days ago, {facts['packages']} packages, "
        f"{len(facts['weaknesses'])} with known weaknesses" + ("" if same else "; the pins have changed since")
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["look-up"]:
        sys.exit(look_up([Path(name) for name in sys.argv[2:]]))
    print(age(datetime.now(timezone.utc).date()))
