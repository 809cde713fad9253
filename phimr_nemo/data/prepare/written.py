"""What `prepare` says about its own work: what it was made of, the first examples of each drop, the conflicts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from phimr_nemo.config import PrepareConfig
from phimr_nemo.data.prepare.candidates import SHOWN_CHARS, candidate_shards, rows_at
from phimr_nemo.data.prepare.golds import Golds
from phimr_nemo.data.sources.source import hub_revision
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.shards import input_hash

CONFLICTS_FILE: Final = "conflicts.jsonl"
SHOWN_EXAMPLES: Final = 3
EXAMPLE_CHARS: Final = 120


def inputs_of(config: PrepareConfig) -> dict[str, str]:
    """What the problems are made of: files, directories and evaluation sets by checksum, hub sources by commit."""
    inputs = {}
    for source in config.sources:
        if source.hub and not Path(source.path).exists():
            name = "/".join(part for part in ("hub", source.path, source.subset, source.split) if part)
            inputs[name] = hub_revision(source)
        else:
            inputs[source.path] = input_hash(Path(source.path))
    for one in config.decontamination.sets if config.decontamination else ():
        inputs[str(one.path)] = input_hash(one.path)
    return inputs


def examples_of(drops: Path) -> Mapping[str, Sequence[str]]:
    """The first dropped rows of each reason, in a line each."""
    found: dict[str, list[str]] = defaultdict(list)
    with drops.open(encoding="utf-8") as lines:
        for line in lines:
            drop = json.loads(line)
            shown = found[drop["reason"]]
            if len(shown) < SHOWN_EXAMPLES:
                text = " ".join(str(drop.get("question", "")).split())[:EXAMPLE_CHARS]
                shown.append(
                    f"{drop['source']}, {drop['place']}: {text}" if text else f"{drop['source']}, {drop['place']}"
                )
    return dict(found)


def write_conflicts(path: Path, directories: list[Path], names: Sequence[str], golds: Golds) -> None:
    """One JSON line for every question whose sources have several answers."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
        start = 0
        for source, table in candidate_shards(directories, ["place", "question"]):
            places = [place for place in range(table.num_rows) if start + place in golds.conflicts]
            for place, row in zip(places, rows_at(table, places), strict=True):
                told = {"source": names[source], "place": row["place"], "question": row["question"][:SHOWN_CHARS]}
                lines.write(json.dumps(told | golds.conflicts[start + place], ensure_ascii=False) + "\n")
            start += table.num_rows
