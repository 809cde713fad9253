"""What `prepare` says about its own work: what it was made of, the first examples of each drop, the conflicts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import PrepareConfig, to_dict
from phimr_nemo.data.parallel import Team
from phimr_nemo.data.prepare.candidates import SHOWN_CHARS, Work, candidate_tables, rows_at
from phimr_nemo.data.prepare.golds import Golds
from phimr_nemo.data.sources.source import hub_revision
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.content import content_id
from phimr_nemo.store.lease import FreeUnits
from phimr_nemo.store.provenance import MadeFrom, begin, begun_from, content_of
from phimr_nemo.store.records import GOLD, GoldKind
from phimr_nemo.store.shards import is_complete, read_manifest

PROBLEMS: Final = "problems"
ROLLOUTS: Final = "rollouts"
DROPS_FILE: Final = "drops.jsonl"
CONFLICTS_FILE: Final = "conflicts.jsonl"
SHOWN_EXAMPLES: Final = 3
EXAMPLE_CHARS: Final = 120


def inputs_of(config: PrepareConfig) -> dict[str, str]:
    """What the problems are made of: files, directories and evaluation sets by checksum, hub sources by commit."""
    inputs = {}
    for number, source in enumerate(config.sources):
        if source.hub and not Path(source.path).exists():
            name = "/".join(part for part in ("hub", source.path, source.subset, source.split) if part)
            inputs[name] = hub_revision(source)
        else:
            inputs[f"sources.{number}.path"] = content_of(Path(source.path))
    for number, one in enumerate(config.decontamination.sets if config.decontamination else ()):
        inputs[f"decontamination.sets.{number}.path"] = content_of(one.path)
    return inputs


def made_from_of(config: PrepareConfig) -> MadeFrom:
    """What decides the content of both record directories: one row decides about others."""
    settings = to_dict(config)
    for source in settings["sources"]:
        source.pop("path")
    for one in settings["decontamination"]["sets"] if settings["decontamination"] else ():
        one.pop("path")
    # Which process of an array this is, where it writes and whom it asks is nothing about the records.
    deciding = {
        name: value for name, value in settings.items() if name not in ("run", "shard", "workers", "annotation")
    }
    return MadeFrom(inputs_of(config), {**deciding, "annotated": config.annotation is not None})


def is_prepared_in(output: Path) -> bool:
    """Whether all record directories are there; `phimr data check --redo` may have opened one of them again."""
    if not is_complete(output / PROBLEMS, "problems"):
        return False
    brings_rollouts = read_manifest(output / PROBLEMS, "problems").counts.get("trajectories", 0) > 0
    return not brings_rollouts or is_complete(output / ROLLOUTS, "rollouts")


def settled(row: dict[str, Any], index: int, golds: Golds) -> dict[str, Any]:
    """What a kept question's answer, and with it its id and its mark, are after the decision about it."""
    answer = golds.answers.get(index, row["answer"])
    metadata = marked(row["metadata"], golds.questions.get(index))
    return {"id": content_id("problem", row["question"], answer), "answer": answer, "metadata": metadata}


def marked(metadata: str, kind: GoldKind | None) -> str:
    """A problem's metadata with what is known of its gold answer."""
    return metadata if kind is None else json.dumps(json.loads(metadata) | {GOLD: kind}, ensure_ascii=False)


def begin_once(output: Path, made_from: MadeFrom, team: Team, forget: Callable[[Path], None]) -> None:
    """Say what the output is made from, in an array once; `forget` takes back what was made from something else."""

    def is_begun(_: int) -> bool:
        return begun_from(output) == made_from

    for _ in FreeUnits([0], team.leases, name="begin", is_done=is_begun, wait=True).one_by_one():
        forget(output)
        begin(output, made_from)


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


def write_conflicts(path: Path, works: Sequence[Work], names: Sequence[str], golds: Golds) -> None:
    """One JSON line for every question whose sources have several answers."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as lines:
        start = 0
        for source, table in candidate_tables(works, ["place", "question"]):
            places = [place for place in range(table.num_rows) if start + place in golds.conflicts]
            for place, row in zip(places, rows_at(table, places), strict=True):
                told = {"source": names[source], "place": row["place"], "question": row["question"][:SHOWN_CHARS]}
                lines.write(json.dumps(told | golds.conflicts[start + place], ensure_ascii=False) + "\n")
            start += table.num_rows
