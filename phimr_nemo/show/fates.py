"""What became of every rollout in curation: decided again from the narrow columns that `curate` has left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from phimr_nemo.config import CurateConfig, load_config
from phimr_nemo.data.curate.decide import decide
from phimr_nemo.data.curate.fates import Fates
from phimr_nemo.data.curate.narrow import NARROW, Narrow
from phimr_nemo.data.curate.stage import SURVEY
from phimr_nemo.data.curate.survey import Shard, Survey
from phimr_nemo.data.fate import Fate
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import CONFIG_FILE

KEPT: Final = {"pairs": "a candidate for a pair"}


@dataclass(frozen=True)
class _InMemory(Survey):
    """A survey that writes nothing: all narrow columns at once, some 90 bytes a rollout."""

    def buckets(self) -> Iterator[Narrow]:
        import pyarrow.parquet as pq

        parts = []
        for file in self.files:
            table = pq.read_table(file)
            part = np.empty(table.num_rows, NARROW)
            for name in NARROW.names or ():
                part[name] = table[name].to_numpy()
            parts.append(part)
        narrow = np.concatenate(parts)
        yield narrow[np.lexsort((narrow["row"], narrow["problem"]))]


def fates_of(curated: Path) -> Mapping[str, Mapping[str, Fates]]:
    """The fate of every rollout in every set of a curate run.

    Args:
        curated: its run directory.

    Returns:
        sha256 of a shard of verdicts -> set -> fates, [rows of the shard].

    Raises:
        UserError: an earlier version surveyed the verdicts, or the survey is damaged or has been removed.
    """
    import pyarrow as pa

    config = load_config(CurateConfig, curated / CONFIG_FILE)
    files = sorted((curated / SURVEY).glob("narrow-*.parquet"), key=lambda file: (len(file.name), file.name))
    try:
        made = [json.loads(file.with_suffix(".json").read_text("utf-8"))["made_of"] for file in files]
        starts = [(int(one["start"]), str(one["shard"])) for one in made]
        if not files or starts[0][0] != 0 or starts != sorted(starts):
            raise ValueError("its shards are not there from the first on")
        decisions = decide(config, _InMemory(_shards(starts, files), files))
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as error:
        raise UserError(
            f"the survey of {curated} cannot be read: {error}",
            rule="curation decides on narrow columns that it leaves in survey/",
            remedy="curate again with this version, into another run.output",
        ) from error
    ends = [start for start, _ in starts[1:]] + [None]
    return {
        shard: {name: fates[start:end] for name, fates in decisions.fates.items()}
        for (start, shard), end in zip(starts, ends, strict=True)
    }


def _shards(starts: Sequence[tuple[int, str]], files: Sequence[Path]) -> list[Shard]:
    import pyarrow.parquet as pq

    rows = [pq.read_metadata(file).num_rows for file in files]
    return [
        Shard(file, sha256, start, count) for file, (start, sha256), count in zip(files, starts, rows, strict=True)
    ]


def in_words(name: str, fate: int) -> str:
    """What became of a rollout in a set, as "sft: balance" or "midtrain: kept"."""
    return f"{name}: {KEPT.get(name, 'kept') if fate == Fate.KEPT else Fate(fate).reason}"
