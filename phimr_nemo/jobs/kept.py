"""What an unfinished run has on the disk, for the message of a stage that was stopped."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.training.seal import usable_checkpoints


def kept(path: Path) -> str:
    """What of a run directory will not be done again, in words: the newest whole checkpoint, or finished shards."""
    usable, _ = usable_checkpoints(RunDirectory(path).checkpoints)
    if usable:
        return str(usable[0])
    shards = sum(1 for _ in path.rglob("part-*.json"))
    return f"{shards} finished shards in {path}" if shards else f"nothing yet in {path}"
