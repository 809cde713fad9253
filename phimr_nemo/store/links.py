"""Links among the files of a directory from elsewhere, which could name any file of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from phimr_nemo.errors import UserError

SNAPSHOTS: Final = "snapshots"
BLOBS: Final = "blobs"
"""The cache of huggingface_hub: `snapshots/REVISION/FILE` links to `blobs/HASH` beside `snapshots`."""


def refuse_links_out(directory: Path) -> None:
    """Refuse a directory in which a file is a link that leads out of it, or is no file at all.

    A link to the directory itself is the user's own. So are those of the cache of Hugging Face's hub.

    Raises:
        UserError: a file that a model is read from, or that is copied with it, is one.
    """
    if not directory.is_dir():
        return
    real = directory.resolve()
    allowed = [real, *([real.parent.parent / BLOBS] if real.parent.name == SNAPSHOTS else [])]
    for entry in sorted(directory.rglob("*")):
        if any(part.startswith(".") for part in entry.relative_to(directory).parts):
            continue
        if entry.is_symlink():
            target = entry.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise UserError(
                    f"{entry} is a link to {target}, outside its directory",
                    rule="the files of a model directory lie in it, or in the cache of Hugging Face's hub beside it",
                    remedy="copy the file in place of the link, if you know that it belongs to the model",
                )
        if not (entry.is_file() or entry.is_dir()):
            raise UserError(
                f"{entry} is no file",
                rule="a model directory holds files and directories",
                remedy="remove it; copy or download the model again",
            )
