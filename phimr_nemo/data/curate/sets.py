"""Writes the training sets that were decided on, shard by shard: each shard is made from a few shards of verdicts.

Where shards begin and end follows from the decisions alone, so an interrupted or damaged set is continued with the
shards that it lacks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.config.data import PairSet
from phimr_nemo.data.curate.decide import Candidates, ChosenPrompts, Decisions, candidates
from phimr_nemo.data.curate.fates import Indices
from phimr_nemo.data.curate.narrow import runs
from phimr_nemo.data.curate.shape import LENGTH_BINS, SHAPE_FILE, length_bins, shape_where
from phimr_nemo.data.curate.survey import Shard, gather
from phimr_nemo.data.fate import Fate
from phimr_nemo.data.pairs import Response, pair_up
from phimr_nemo.data.parallel import in_processes
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.provenance import BEGUN_FILE, MadeFrom, begin, begun_from
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import MANIFEST, rows_to_table, shard_is_complete, write_shard

if TYPE_CHECKING:
    import pyarrow as pa

Sizes = npt.NDArray[np.signedinteger[Any]]

MAX_SHARD_ROWS: Final = 50_000
MAX_SHARD_BYTES: Final = 1 << 26
CONVERSATION: Final = ("problem_id", "question", "response", "domain", "difficulty")
SIDES: Final = ("chosen", "rejected")
# Names of counts in the manifest of a set.
DROPPED: Final = "dropped: "
INPUT: Final = {**dict.fromkeys(("midtrain", "sft", "pairs"), "input: rollouts"), "prompts": "input: problems"}


def begin_set(directory: Path, made_from: MadeFrom) -> None:
    """Forget the shards of a set that was begun from other verdicts or settings: one row decides about others."""
    if begun_from(directory) == made_from:
        return
    if directory.is_dir():
        for path in (*directory.glob("part-*"), *directory.glob("counts-*.json"), directory / MANIFEST):
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


def write_conversations(
    directory: Path, shards: Sequence[Shard], name: str, decisions: Decisions, workers: int, made_from: MadeFrom
) -> None:
    """Write a set of conversations in the order of the verdicts."""
    fates = decisions.fates[name]
    rows = np.flatnonzero(fates == Fate.KEPT)
    work = [(index, rows[part]) for index, part in enumerate(cut(decisions.bytes[rows]))]
    in_processes(partial(_write_conversations, directory, shards, made_from), work, workers, title=name)
    kept = shape_where(fates, Fate.KEPT, decisions.difficulty, decisions.bins)
    write_json(directory / SHAPE_FILE, {"kept": kept.tolist()})


def _write_conversations(
    directory: Path, shards: Sequence[Shard], made_from: MadeFrom, work: tuple[int, Indices]
) -> None:
    import pyarrow as pa

    index, rows = work
    if shard_is_complete(directory, index, made_from):
        return
    table = gather(shards, rows, ["id", *CONVERSATION])
    ids = [content_id("conversation", identity) for identity in table.column("id").to_pylist()]
    table = table.set_column(0, "id", pa.array(ids))
    write_shard(directory, index, table, kind="conversations", made_from=made_from)


def write_prompts(
    directory: Path,
    shards: Sequence[Shard],
    decisions: Decisions,
    hard_below: float,
    workers: int,
    made_from: MadeFrom,
) -> None:
    """Write the prompts, in the order of their first rollouts."""
    chosen = decisions.prompts
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
    task = partial(_write_prompts, directory, shards, hard_below, made_from)
    in_processes(task, work, workers, title="prompts")


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
    table = gather(shards, chosen.rows, ["problem_id", "question", "answer"])
    ids = [content_id("prompt", identity) for identity in table.column("problem_id").to_pylist()]
    columns = {
        "id": pa.array(ids),
        "pass_rate": pa.array(chosen.pass_rate),
        "mean_length": pa.array(chosen.mean_length),
        "length_spread": pa.array(chosen.length_spread),
        "hard": pa.array(chosen.pass_rate < hard_below),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    write_shard(directory, index, table, kind="prompts", made_from=made_from)


def write_pairs(
    directory: Path,
    shards: Sequence[Shard],
    decisions: Decisions,
    chosen: PairSet,
    seed: int,
    *,
    workers: int,
    made_from: MadeFrom,
) -> dict[str, int]:
    """Pair the candidates and write the pairs, in the order of first rollouts; those without a pair by reason."""
    found = candidates(decisions)
    sizes = decisions.bytes[found.rows]
    work = [
        (index, Candidates(found.rows[part], found.groups[part], found.right[part]))
        for index, part in enumerate(cut(sizes, found.groups))
    ]
    task = partial(_write_pairs, directory, shards, chosen, seed, made_from)
    written = in_processes(task, work, workers, title="pairs")
    unpaired: Counter[str] = Counter()
    for counts in written:
        unpaired.update(counts["dropped"])
    write_json(
        directory / SHAPE_FILE,
        {side: np.sum([counts[side] for counts in written], axis=0).tolist() for side in SIDES},
    )
    return dict(unpaired)


def _write_pairs(
    directory: Path,
    shards: Sequence[Shard],
    chosen: PairSet,
    seed: int,
    made_from: MadeFrom,
    work: tuple[int, Candidates],
) -> dict[str, Any]:
    """Write one shard of pairs; what became of its candidates, and the lengths of both sides."""
    index, candidates = work
    counts_path = directory / f"counts-{index:05d}.json"
    if shard_is_complete(directory, index, made_from) and counts_path.is_file():
        return dict(json.loads(counts_path.read_text("utf-8")))
    columns = ["id", "problem_id", "question", "response", "tokens"]
    table = gather(shards, candidates.rows, columns)
    ids = table.column("id").to_pylist()
    bins = length_bins(table.column("tokens").to_numpy(), _characters(table))
    rows, fates = [], Counter[Fate]()
    lengths = {side: np.zeros(LENGTH_BINS, np.int64) for side in SIDES}
    for start, end in runs(candidates.groups):
        # By id, so that draws do not depend on the shards.
        places = sorted(range(start, end), key=ids.__getitem__)
        question, problem_id = table["question"][start].as_py(), table["problem_id"][start].as_py()
        sides = [
            [
                Response(ids[place], table["response"][place].as_py())
                for place in places
                if candidates.right[place] == right
            ]
            for right in (True, False)
        ]
        pairs, fate_of = pair_up(
            *sides,
            mode=chosen.mode,
            nearness=chosen.nearness,
            max_per_problem=chosen.max_per_problem,
            max_length_ratio=chosen.max_length_ratio,
            seed=content_seed("pairs", str(seed), problem_id),
        )
        fates.update(fate_of.values())
        bin_of = {ids[place]: bins[place] for place in places}
        for pair in pairs:
            texts = {"problem_id": problem_id, "question": question, "mode": chosen.mode}
            for side, response in zip(SIDES, pair, strict=True):
                texts[side] = response.text
                lengths[side][bin_of[response.id]] += 1
            rows.append({"id": content_id("pair", chosen.mode, pair[0].id, pair[1].id), **texts})
    dropped = {f"{DROPPED}{fate.reason}": count for fate, count in sorted(fates.items()) if fate != Fate.KEPT}
    counts = {"dropped": dropped, **{side: bins.tolist() for side, bins in lengths.items()}}
    # Counts first: a complete shard always has them.
    write_json(counts_path, counts)
    write_shard(directory, index, rows_to_table(rows, "pairs"), kind="pairs", made_from=made_from)
    return counts


def _characters(table: pa.Table) -> Indices:
    import pyarrow.compute as pc

    return np.asarray(pc.utf8_length(table.column("response")).to_numpy(), np.int64)


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
