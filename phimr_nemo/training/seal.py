"""Checkpoints that are known to be whole: a seal with every file's size and checksum, written last.

A checkpoint without a seal was never finished. A sealed one whose files are not what the seal says was damaged later.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.content import file_sha256

SEAL_FILE: Final = "SEAL.json"
STEP_DIRECTORY: Final = re.compile(r"step=(\d+)")


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint directory."""
    return f"step={step}"


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint directory.

    Raises:
        ValueError: it is not named as one.
    """
    match = STEP_DIRECTORY.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named step=N")
    return int(match.group(1))


def file_facts(path: Path) -> dict[str, int | str]:
    """Size and checksum of a file, as a seal holds them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_seal(directory: Path, known: Mapping[str, Mapping[str, int | str]]) -> None:
    """Finish a checkpoint.

    Args:
        directory: the checkpoint.
        known: facts of files that were computed already, by path in the directory; the others are computed here.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    names = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {name: dict(known.get(name) or file_facts(directory / name)) for name in names if name != SEAL_FILE}
    write_json(directory / SEAL_FILE, {"files": files})


def read_seal(directory: Path) -> dict[str, dict[str, int | str]] | None:
    """The seal's files with their facts; None for a checkpoint that was never finished or whose seal is damaged."""
    try:
        files = json.loads((directory / SEAL_FILE).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(files) if isinstance(files, dict) else None


def is_sealed(directory: Path) -> bool:
    """Whether a checkpoint was finished."""
    return read_seal(directory) is not None


def missing_or_cut(directory: Path) -> list[str]:
    """The sealed files that are missing or of another size. Reads no contents.

    Raises:
        ValueError: the checkpoint has no seal.
    """
    return [name for name, facts in _sealed(directory).items() if not _has_size(directory / name, facts["bytes"])]


def damaged_files(directory: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """The sealed files that are not what they were when the checkpoint was finished.

    Args:
        directory: a sealed checkpoint.
        share, shares: look at every `shares`-th file only, from number `share` on.

    Raises:
        ValueError: the checkpoint has no seal.
    """
    mine = sorted(_sealed(directory).items())[share::shares]
    return [
        name
        for name, facts in mine
        if not _has_size(directory / name, facts["bytes"]) or file_sha256(directory / name) != facts["sha256"]
    ]


def _sealed(directory: Path) -> dict[str, dict[str, int | str]]:
    files = read_seal(directory)
    if files is None:
        raise ValueError(f"{directory} has no seal")
    return files


def _has_size(path: Path, size: int | str) -> bool:
    return path.is_file() and path.stat().st_size == size


def checkpoints(directory: Path) -> list[Path]:
    """Every checkpoint directory of a run, sealed or not, newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.is_dir() and STEP_DIRECTORY.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def usable_checkpoints(directory: Path) -> tuple[list[Path], list[str]]:
    """What a run could continue from, judged without reading contents.

    Returns:
        The checkpoints with all their files, newest first; and a sentence about each one that is passed over.
    """
    usable, notes = [], []
    for path in checkpoints(directory):
        if not is_sealed(path):
            notes.append(f"{path} was not finished and is passed over")
        elif missing := missing_or_cut(path):
            notes.append(f"{path} is damaged ({', '.join(missing)} missing or cut) and is passed over")
        else:
            usable.append(path)
    return usable, notes


def refuse_all_damaged(directory: Path, notes: list[str]) -> NoReturn:
    """End a run that has finished checkpoints of which none can be read: it would silently start again.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"no checkpoint in {directory} is whole: {'; '.join(notes)}",
        rule="a run that has finished checkpoints continues from one of them",
        remedy=f"restore them, or remove {directory} to start the stage from its beginning",
    )


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; killed in the middle, it leaves one without a seal."""
    (path / SEAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)
