"""Known weaknesses of the pinned packages: looked up, stored with their date, and how old that is.

audit.py look-up FILE...      ask pip-audit (needs the network) and store what it says; 1 when it finds something
audit.py compare DIR FILE...  the same against a copy of a database in DIR: advisories in OSV's form, a JSON or YAML
                              file each (a clone of github.com/pypa/advisory-database, OSV's export of PyPI)
audit.py age                  say when that was, and what was found; never fails
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # `age` runs in a Python that has no packages
    from packaging.version import Version

STORED: Final = Path(__file__).resolve().parents[1] / "requirements" / "audit.json"
COMMAND: Final = ("--strict", "--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json")
ECOSYSTEM: Final = "PyPI"
COMPARED: Final = ("ECOSYSTEM", "SEMVER")
"""Ranges of versions; those of commits (GIT) say nothing about a release."""
THE_FIRST: Final = "0"
BEFORE_ALL: Final = "0.dev0"
NO_LIMIT: Final = "*"
RELEASE: Final = re.compile(r"v?\d+(\.\d+)*")


def pins_hash(files: Sequence[Path]) -> str:
    """Of the files' contents, in their order."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def pins(files: Sequence[Path]) -> dict[str, set[str]]:
    """Normalized name -> pinned versions, of whatever Python a line is meant for.

    Raises:
        ValueError: a line that is no exact pin.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, set[str]] = {}
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            text = line.partition("#")[0].strip()
            if not text:
                continue
            requirement = Requirement(text)
            exact = [pin.version for pin in requirement.specifier if pin.operator == "==" and "*" not in pin.version]
            if not exact:
                raise ValueError(f"{path}: {text!r} is no exact pin")
            found.setdefault(canonicalize_name(requirement.name), set()).update(exact)
    return found


def is_affected(version: str, affected: Mapping[str, Any]) -> bool:
    """Whether one entry of an advisory's `affected` means this version (OSV schema 1.7, "Evaluation").

    A build's local part ("+cpu") is not compared: it is the same source. A range with a bound that nobody can read
    counts as one that means every version.
    """
    from packaging.version import InvalidVersion, Version

    found = Version(Version(version).public)
    for listed in affected.get("versions", ()):
        try:
            if Version(listed) == found:
                return True
        except InvalidVersion:  # of a time before PEP 440: no pin is one of those
            continue
    try:
        return any(
            _in_range(found, each["events"]) for each in affected.get("ranges", ()) if each.get("type") in COMPARED
        )
    except InvalidVersion:
        return True


def _bound(text: str) -> Version:
    """A range's; of a spelling that is none of PEP 440 ("2.6.0-cu124") the numbers that it begins with."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text)
    except InvalidVersion:
        numbers = RELEASE.match(text)
        if numbers is None:
            raise
        return Version(numbers[0])


def _in_range(version: Version, events: Sequence[Mapping[str, str]]) -> bool:
    limits = [event["limit"] for event in events if "limit" in event]
    if limits and not any(limit == NO_LIMIT or version < _bound(limit) for limit in limits):
        return False
    changes: list[tuple[Version, bool, bool]] = []
    for event in events:
        for kind, text in event.items():
            if kind != "limit":
                lowest = BEFORE_ALL if kind == "introduced" and text == THE_FIRST else text
                changes.append((_bound(lowest), kind == "last_affected", kind == "introduced"))
    inside = False
    for bound, is_last, begins in sorted(changes):
        if version > bound or (version == bound and not is_last):
            inside = begins
    return inside


def advisories(directory: Path) -> Iterator[Mapping[str, Any]]:
    """Those in force, of every file below a directory; what is no advisory in OSV's form is passed over.

    Raises:
        ValueError: a file that cannot be read.
    """
    import yaml

    load = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if hidden or path.suffix not in (".json", ".yaml"):
            continue
        text = path.read_text("utf-8")
        try:
            advisory = json.loads(text) if path.suffix == ".json" else yaml.load(text, load)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if isinstance(advisory, dict) and {"id", "affected"} <= advisory.keys() and not advisory.get("withdrawn"):
            yield advisory


def known(directory: Path, pinned: Mapping[str, set[str]]) -> tuple[dict[str, list[str]], str]:
    """What a database knows of the pins, and the day of its newest advisory.

    Returns:
        "name version" -> ids, one for each weakness (of several names of one, the database's own with the others in
        brackets), and the day.

    Raises:
        ValueError: no advisory about this ecosystem's packages.
    """
    from packaging.utils import canonicalize_name

    found: dict[str, dict[frozenset[str], None]] = {}
    today, newest = datetime.now(timezone.utc).date().isoformat(), ""
    for advisory in advisories(directory):
        for affected in advisory.get("affected", ()):
            package = affected.get("package", {})
            if package.get("ecosystem") != ECOSYSTEM:
                continue
            published = str(advisory.get("published") or advisory.get("modified", ""))[:10]
            if published <= today:  # a few are dated ahead
                newest = max(newest, published)
            name = canonicalize_name(package["name"])
            for version in pinned.get(name, ()):
                if is_affected(version, affected):
                    names = frozenset((advisory["id"], *advisory.get("aliases", ())))
                    found.setdefault(f"{name} {version}", {})[names] = None
    if not newest:
        raise ValueError(f"no advisory about {ECOSYSTEM}'s packages in {directory}")
    return {package: _named_once(sets) for package, sets in sorted(found.items())}, newest


def _named_once(sets: Mapping[frozenset[str], None]) -> list[str]:
    """Advisories of several databases about one weakness name each other."""
    groups: list[set[str]] = []
    for names in sets:
        same = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names] + [set(names).union(*same)]
    texts = []
    for group in groups:
        first, *others = sorted(group, key=lambda name: (not name.startswith("PYSEC"), name))
        texts.append(first + (f" ({', '.join(others)})" if others else ""))
    return sorted(texts)


def store(files: Sequence[Path], packages: int, weak: Mapping[str, Sequence[str]], source: str, stored: Path) -> None:
    """The result with today's date."""
    facts = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "source": source,
        "files": [path.name for path in files],
        "pins_sha256": pins_hash(files),
        "packages": packages,
        "weaknesses": weak,
    }
    stored.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def look_up(files: Sequence[Path], stored: Path = STORED) -> int:
    """Ask pip-audit about each file and store its answers; 1 when it finds something.

    Two files may pin one package differently, and together it refuses those.
    """
    program = Path(sys.executable).with_name("pip-audit")
    found: dict[str, list[str]] = {}
    for path in files:
        done = subprocess.run(
            [str(program), *COMMAND, "-r", str(path)], stdout=subprocess.PIPE, text=True, check=False
        )
        try:
            answer: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError):
            print("audit of the pinned packages: not done. pip-audit gave no result (see above): it asks the package")
            print(
                "index and the database of weaknesses. Nothing is stored; a result stored before stays with its date."
            )
            print("A copy of the database serves as well: make audit ADVISORIES=DIR.")
            return done.returncode or 1
        for package in answer:
            ids = sorted(one["id"] for one in package.get("vulns", ()))
            found[f"{package['name']} {package.get('version', '')}".strip()] = ids
    weak = {package: ids for package, ids in sorted(found.items()) if ids}
    store(files, len(found), weak, "pip-audit", stored)
    return 1 if weak else 0


def compare(directory: Path, files: Sequence[Path], stored: Path = STORED) -> int:
    """The same against a copy of a database; 1 when it finds something, 2 when it could not be done."""
    try:
        pinned = pins(files)
        weak, newest = known(directory, pinned)
    except (OSError, ValueError) as error:
        print(f"audit of the pinned packages: not done, and nothing is stored. {error}")
        return 2
    source = f"advisories until {newest}{_commit(directory)}"
    store(files, sum(map(len, pinned.values())), weak, source, stored)
    for package, ids in weak.items():
        print(f"{package}: {', '.join(ids)}")
    print(age(datetime.now(timezone.utc).date(), stored))
    return 1 if weak else 0


def _commit(directory: Path) -> str:
    """Of a clone: ", commit <hash> of <day>"."""
    asked = ["git", "-C", str(directory), "log", "-1", "--format=, commit %h of %cs"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def age(today: date, stored: Path = STORED) -> str:
    """A sentence about the stored result."""
    if not stored.is_file():
        return "audit of the pinned packages: never done (make audit)"
    facts = json.loads(stored.read_text("utf-8"))
    days = (today - date.fromisoformat(facts["date"])).days
    files = [stored.parent / name for name in facts["files"]]
    same = all(path.is_file() for path in files) and pins_hash(files) == facts["pins_sha256"]
    return (
        f"audit of the pinned packages: {facts['date']}, {days} days ago ({facts['source']}), {facts['packages']} "
        f"packages, {len(facts['weaknesses'])} with known weaknesses"
        + ("" if same else "; the pins have changed since")
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["look-up", *names]:
            sys.exit(look_up([Path(name) for name in names]))
        case ["compare", directory, *names]:
            sys.exit(compare(Path(directory), [Path(name) for name in names]))
        case _:
            print(age(datetime.now(timezone.utc).date()))
