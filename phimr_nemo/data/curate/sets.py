"""Writes the training sets that were decided on, shard by shard: each shard is made from a few shards of verdicts.

Where shards begin and end follows from the decisions alone, so an interrupted or damaged set is continued with the
shards that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.decide import ChosenPrompts, Decisions
from phimr_nemo.data.curate.fates import Indices
from phimr_nemo.data.curate.shape import SHAPE_FILE, shape_where
from phimr_nemo.data.curate.survey import Shard, Survey, gather, measured
from phimr_nemo.data.fate import Fate
from phimr_nemo.data.parallel import Team
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.content import content_id
from phimr_nemo.store.provenance import BEGUN_FILE, MadeFrom, begin, begun_from
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import MANIFEST, shard_is_complete, write_shard

Sizes = npt.NDArray[np.signedinteger[Any]]

MAX_SHARD_ROWS: Final = 50_000
MAX_SHARD_BYTES: Final = 1 << 26
ORIGIN: Final = ("source", "teacher", "sample_index", "verdict", "finish_reason")
CONVERSATION: Final = ("problem_id", "question", "response", "domain", "difficulty", *ORIGIN)
# Names of counts in the manifest of a set.
DROPPED: Final = "dropped: "
INPUT: Final = {**dict.fromkeys(("midtrain", "sft", "pairs"), "input: rollouts"), "prompts": "input: problems"}


def begin_set(directory: Path, made_from: MadeFrom) -> None:
    """Forget the shards of a set that was begun from other verdicts or settings: one row decides about others."""
    if begun_from(directory) == made_from:
        return
    if directory.is_dir():
        for path in (*directory.glob("part-*"), *directory.glob("paired-*"), directory / MANIFEST):
            path.unlink(missing_ok=True)
        (directory / BEGUN_FILE).unlink(missing_ok=True)
    begin(directory, made_from)


def cut(sizes: Sizes, groups: Sizes | None = None) -> list[slice]:
    """Where a sequence of rows is cut into shards: at most so many rows and bytes each, and at least one row.

    Args:
        sizes: bytes of each row, [rows].
        groups: rows of one number, which follow each other, stay together, [rows]; a group larger than a shard
            has one of its own.

    Returns:
        Slices that follow each other from the first row to the last.
    """
    ends = np.arange(1, len(sizes) + 1)
    if groups is not None:
        ends = np.append(np.flatnonzero(groups[1:] != groups[:-1]) + 1, len(sizes))
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    slices: list[slice] = []
    start = 0
    while start < len(sizes):
        most = min(start + MAX_SHARD_ROWS, int(np.searchsorted(before, before[start] + MAX_SHARD_BYTES, "right")) - 1)
        place = np.searchsorted(ends, most, side="right") - 1
        end = int(ends[place]) if place >= 0 and ends[place] > start else int(ends[ends > start][0])
        slices.append(slice(start, end))
        start = end
    return slices


@dataclass(frozen=True)
class Making:
    """What every set is made from.

    Attributes:
        survey: the shards of verdicts and their narrow columns.
        decisions: about every rollout.
        workers: processes.
        team: those that share the work.
    """

    survey: Survey
    decisions: Decisions
    workers: int
    team: Team


def write_conversations(directory: Path, name: str, making: Making, made_from: MadeFrom) -> None:
    """Write a set of conversations in the order of the verdicts."""
    decisions = making.decisions
    fates = decisions.fates[name]
    rows = np.flatnonzero(fates == Fate.KEPT)
    work = [(index, rows[part]) for index, part in enumerate(cut(decisions.bytes[rows]))]
    _share(making, partial(_write_conversations, directory, making.survey, made_from), work, directory, name)
    kept = shape_where(fates, Fate.KEPT, decisions.difficulty, decisions.bins)
    write_json(directory / SHAPE_FILE, {"kept": kept.tolist()})


def _share(
    making: Making,
    write: Callable[[tuple[int, Any]], None],
    work: Sequence[tuple[int, Any]],
    directory: Path,
    name: str,
) -> None:
    making.team.share(
        write,
        work,
        is_done=lambda item: (directory / f"part-{item[0]:05d}.json").is_file(),
        workers=making.workers,
        title=name,
    )


def _write_conversations(directory: Path, survey: Survey, made_from: MadeFrom, work: tuple[int, Indices]) -> None:
    import pyarrow as pa

    index, rows = work
    if shard_is_complete(directory, index, made_from):
        return
    table = gather(survey.shards, rows, ["id", *CONVERSATION])
    ids = [content_id("conversation", identity) for identity in table.column("id").to_pylist()]
    table = table.set_column(0, "id", pa.array(ids))
    table = table.append_column("repetition", pa.array(measured(survey.shards, survey.files, rows, "repetition")))
    write_shard(directory, index, table, kind="conversations", made_from=made_from)


def write_prompts(directory: Path, hard_below: float, making: Making, made_from: MadeFrom) -> None:
    """Write the prompts, in the order of their first rollouts."""
    chosen = making.decisions.prompts
    if chosen is None:
        raise ValueError("no prompts were decided on")
    work = [
        (
            index,
            ChosenPrompts(
                chosen.rows[part], chosen.pass_rate[part], chosen.mean_length[part], chosen.length_spread[part]
            ),
        )
        for index, part in enumerate(cut(np.zeros(len(chosen.rows), np.int32)))
    ]
    task = partial(_write_prompts, directory, making.survey.shards, hard_below, made_from)
    _share(making, task, work, directory, "prompts")


def _write_prompts(
    directory: Path,
    shards: Sequence[Shard],
    hard_below: float,
    made_from: MadeFrom,
    work: tuple[int, ChosenPrompts],
) -> None:
    import pyarrow as pa

    index, chosen = work
    if shard_is_complete(directory, index, made_from):
        return
    columns = ["problem_id", "question", "answer", "domain", "difficulty", "source"]
    table = gather(shards, chosen.rows, columns)
    ids = [content_id("prompt", identity) for identity in table.column("problem_id").to_pylist()]
    numbers = {
        "id": pa.array(ids),
        "pass_rate": pa.array(chosen.pass_rate),
        "mean_length": pa.array(chosen.mean_length),
        "length_spread": pa.array(chosen.length_spread),
        "hard": pa.array(chosen.pass_rate < hard_below),
    }
    for name, column in numbers.items():
        table = table.append_column(name, column)
    write_shard(directory, index, table, kind="prompts", made_from=made_from)


def _reasons(counts: Indices) -> dict[str, int]:
    """Drops by reason, without what was kept and without zeros."""
    return {
        f"{DROPPED}{Fate(fate).reason}": int(count)
        for fate, count in enumerate(counts)
        if count and fate != Fate.KEPT
    }


def kind_of(name: str) -> Kind:
    """The record kind of a set."""
    if name == "pairs":
        return "pairs"
    return "prompts" if name == "prompts" else "conversations"


def counts_of(name: str, decisions: Decisions) -> dict[str, int]:
    """What came in and was dropped, by reason: rollouts, or problems where prompts are chosen.

    What came in is the sum of what was dropped and what is kept; of pairs, both responses count, and candidates
    count as kept.
    """
    if name == "prompts":
        counts = {INPUT[name]: decisions.problems, "ungraded rollouts": decisions.ungraded}
        return {**counts, **_reasons(decisions.prompt_counts)}
    fates = decisions.fates[name]
    return {INPUT[name]: len(fates), **_reasons(np.bincount(fates, minlength=len(Fate)))}
