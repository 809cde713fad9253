"""Finds damaged shards under a directory, and makes the steps that wrote them make those, and only those, again; and
opens a finished directory for a step that makes something else in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from phimr_nemo.errors import UserError
from phimr_nemo.store.provenance import MADE_FROM, MadeFrom, read_made_from
from phimr_nemo.store.records import KINDS, Kind
from phimr_nemo.store.runs import DONE_FILE
from phimr_nemo.store.shards import MANIFEST, SHARD_NAME, read_manifest, shard_is_complete


@dataclass(frozen=True)
class Damage:
    """The state of a record directory.

    Attributes:
        directory: the record directory.
        count: its shards.
        shards: names of those that are missing, damaged or half-written.
        run: the run directory that it belongs to, itself or the one above it; None when there is none.
    """

    directory: Path
    count: int
    shards: list[str]
    run: Path | None


def check_directory(root: Path) -> list[Damage]:
    """Check every shard of every finished record directory under `root` against its checksum.

    Raises:
        UserError: there is no finished record directory, or a manifest is damaged.
    """
    found = []
    for manifest in sorted(root.rglob(MANIFEST)):
        directory = manifest.parent
        kind = recorded_kind(directory)
        if kind is None:
            continue
        names = sorted(read_manifest(directory, kind).shards, key=lambda name: (len(name), name))
        damaged = [name for name in names if not shard_is_complete(directory, _number(name))]
        runs = [path for path in (directory, directory.parent) if (path / DONE_FILE).is_file()]
        found.append(Damage(directory, len(names), damaged, runs[0] if runs else None))
    if not found:
        raise UserError(
            f"{root} holds no finished record directory",
            rule=f"a finished record directory has a {MANIFEST}",
            remedy="correct the path; an unfinished step finds its damaged shards itself when it is run again",
        )
    return found


def recorded_kind(directory: Path) -> Kind | None:
    """The kind of record that a finished directory holds; None where the manifest is no record directory's.

    Raises:
        UserError: the manifest is damaged.
    """
    path = directory / MANIFEST
    try:
        facts = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}",
            rule="a manifest is a JSON object",
            remedy="delete it and run the step that made it again: finished shards are kept",
        ) from error
    kind = facts.get("kind") if isinstance(facts, dict) else None
    return next((known for known in KINDS if known == kind), None)


def _number(name: str) -> int:
    """The number of a shard in its name, which :func:`read_manifest` has checked."""
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return int(match.group(1))


def open_for(directory: Path, made_from: MadeFrom, shards: int) -> None:
    """Take back that a directory is finished where it was made from other things, and shards that there are no more.

    Args:
        directory: a record directory, finished or not, or nothing.
        made_from: what it is to be made from.
        shards: how many it is to have.
    """
    if not directory.is_dir():
        return
    manifest = directory / MANIFEST
    if manifest.is_file() and read_made_from(_object(manifest)) != made_from:
        manifest.unlink(missing_ok=True)
    for path in directory.iterdir():
        match = SHARD_NAME.fullmatch(path.name)
        if match is not None and int(match.group(1)) >= shards:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()


def is_declared(directory: Path, index: int, made_from: MadeFrom) -> bool:
    """Whether a sidecar says that shard `index` was made from this; without a look at the shard itself."""
    sidecar = directory / f"part-{index:05d}.json"
    facts = _object(sidecar) if sidecar.is_file() else None
    return isinstance(facts, dict) and read_made_from(facts.get(MADE_FROM)) == made_from


def _object(path: Path) -> object:
    """What a JSON file holds; None where it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def forget_damaged(damage: Damage) -> None:
    """Remove what declares damaged shards complete, so that the step that made them makes them again."""
    if not damage.shards:
        return
    # The marks of completeness first: if this is interrupted, the directory is unfinished and not wrong.
    if damage.run is not None:
        (damage.run / DONE_FILE).unlink(missing_ok=True)
    (damage.directory / MANIFEST).unlink(missing_ok=True)
    for name in damage.shards:
        (damage.directory / name).with_suffix(".json").unlink(missing_ok=True)
        (damage.directory / name).unlink(missing_ok=True)
