"""The set of preference pairs: candidates are paired part by part, all pairs are capped and balanced, then written.

A part of the pairing is a small file of row numbers, so that texts are read once to be compared, and only those of
chosen pairs a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.config.data import PairSet
from phimr_nemo.data.curate.balance import Kinds, chosen_fates
from phimr_nemo.data.curate.decide import Candidates, candidates
from phimr_nemo.data.curate.fates import LENGTH_EDGES, Indices
from phimr_nemo.data.curate.lengths import CHARACTERS_PER_TOKEN
from phimr_nemo.data.curate.narrow import UNKNOWN_DIFFICULTY, label_hash, runs
from phimr_nemo.data.curate.sets import DROPPED, ORIGIN, Making, cut
from phimr_nemo.data.curate.shape import LENGTH_BINS, SHAPE_FILE
from phimr_nemo.data.curate.survey import Shard, Survey, gather, measured
from phimr_nemo.data.fate import Fate
from phimr_nemo.data.pairs import Response, pair_up
from phimr_nemo.store.atomic import atomic_file, write_json
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.records import DIFFICULTIES, PAIR_SIDES
from phimr_nemo.store.shards import rows_to_table, shard_is_complete, write_shard

PAIRED: Final = np.dtype(
    [
        ("chosen", np.int64),
        ("rejected", np.int64),
        ("order", np.uint64),
        ("domain", np.uint64),
        ("source", np.uint64),
        ("difficulty", np.uint8),
        ("length", np.uint8),
    ]
)
"""One pair: the rows of both sides over all shards, a hash of its id, and what caps and balance look at."""


@dataclass(frozen=True)
class _Part:
    """Candidates of some problems, and the file of their pairs."""

    path: Path
    candidates: Candidates


def write_pairs(directory: Path, chosen: PairSet, seed: int, making: Making, made_from: MadeFrom) -> dict[str, int]:
    """Pair the candidates and write the pairs, in the order of first rollouts; dropped responses by reason."""
    found = candidates(making.decisions)
    parts = [
        _Part(
            directory / f"paired-{index:05d}.npy",
            Candidates(found.rows[part], found.groups[part], found.chosen[part]),
        )
        for index, part in enumerate(cut(making.decisions.bytes[found.rows], found.groups))
    ]
    making.team.share(
        partial(_pair_part, making.survey.shards, chosen, seed),
        parts,
        is_done=lambda part: part.path.is_file(),
        workers=making.workers,
        title="pairing",
    )
    pairs, dropped = _all_pairs(parts)
    kinds = Kinds(*(pairs[name] for name in ("order", "domain", "source", "difficulty", "length")))
    fates = chosen_fates(kinds, caps=chosen.caps, balance=chosen.balance, size=chosen.size)
    for fate, count in Counter(fates.tolist()).items():
        dropped[fate] += len(PAIR_SIDES) * count
    pairs = pairs[fates == Fate.KEPT]
    _write_texts(directory, chosen, pairs, making, made_from)
    bins = making.decisions.bins
    shapes = {side: np.bincount(bins[pairs[side]], minlength=LENGTH_BINS).tolist() for side in PAIR_SIDES}
    write_json(directory / SHAPE_FILE, shapes)
    counts = enumerate(dropped.tolist())
    return {f"{DROPPED}{Fate(fate).reason}": n for fate, n in counts if n and fate != Fate.KEPT}


def _all_pairs(parts: Sequence[_Part]) -> tuple[npt.NDArray[np.void], Indices]:
    """The pairs of all parts in order, and what became of their candidates, by fate."""
    arrays, fates = [np.empty(0, PAIRED)], np.zeros(len(Fate), np.int64)
    for part in parts:
        with part.path.open("rb") as file:
            fates += np.load(file, allow_pickle=False)
            arrays.append(np.load(file, allow_pickle=False))
    return np.concatenate(arrays), fates


def _pair_part(shards: Sequence[Shard], chosen: PairSet, seed: int, part: _Part) -> None:
    if part.path.is_file():
        return
    found = part.candidates
    columns = ["id", "problem_id", "response", "tokens", "domain", "difficulty", "source"]
    table = gather(shards, found.rows, columns)
    ids, tokens = table.column("id").to_pylist(), table.column("tokens").to_pylist()
    fates = np.zeros(len(Fate), np.int64)
    paired: list[tuple[Any, ...]] = []
    for start, end in runs(found.groups):
        # By id, so that draws do not depend on the shards.
        places = sorted(range(start, end), key=ids.__getitem__)
        texts = {place: Response(ids[place], table["response"][place].as_py()) for place in places}
        pairs, fate_of = pair_up(
            *([texts[place] for place in places if found.chosen[place] == side] for side in (True, False)),
            mode=chosen.mode,
            nearness=chosen.nearness,
            max_per_problem=chosen.max_per_problem,
            max_length_ratio=chosen.max_length_ratio,
            seed=content_seed("pairs", str(seed), table["problem_id"][start].as_py()),
        )
        for fate in fate_of.values():
            fates[fate] += fate != Fate.KEPT
        names = ("domain", "source", "difficulty")
        labels = [table[name][start].as_py() if name in table.column_names else None for name in names]
        place_of = {ids[place]: place for place in places}
        for one, other in pairs:
            rejected = place_of[other.id]
            paired.append(
                (
                    found.rows[place_of[one.id]],
                    found.rows[rejected],
                    label_hash(pair_id(chosen.mode, one.id, other.id)),
                    label_hash(labels[0]),
                    label_hash(labels[1]),
                    DIFFICULTIES.index(labels[2]) if labels[2] in DIFFICULTIES else UNKNOWN_DIFFICULTY,
                    _length_class(tokens[rejected], other.text),
                )
            )
    with atomic_file(part.path) as temporary, temporary.open("wb") as file:
        np.save(file, fates, allow_pickle=False)
        np.save(file, np.array(paired, PAIRED), allow_pickle=False)


def _length_class(tokens: int, text: str) -> int:
    known = tokens if tokens >= 0 else len(text) / CHARACTERS_PER_TOKEN
    return int(np.searchsorted(LENGTH_EDGES, known, side="left"))


def pair_id(mode: str, chosen: str, rejected: str) -> str:
    """The id of a pair of two rollouts."""
    return content_id("pair", mode, chosen, rejected)


def _write_texts(
    directory: Path, chosen: PairSet, pairs: npt.NDArray[np.void], making: Making, made_from: MadeFrom
) -> None:
    sizes = making.decisions.bytes
    both = sizes[pairs["chosen"]].astype(np.int64) + sizes[pairs["rejected"]]
    work = [(index, pairs[part]) for index, part in enumerate(cut(both))]
    making.team.share(
        partial(_write_part, directory, making.survey, chosen.mode, made_from),
        work,
        is_done=lambda item: (directory / f"part-{item[0]:05d}.json").is_file(),
        workers=making.workers,
        title="pairs",
    )


def _write_part(
    directory: Path, survey: Survey, mode: str, made_from: MadeFrom, work: tuple[int, npt.NDArray[np.void]]
) -> None:
    index, pairs = work
    if shard_is_complete(directory, index, made_from):
        return
    rows = np.concatenate([pairs[side] for side in PAIR_SIDES])
    columns = ["id", "problem_id", "question", "response", "domain", "difficulty", *ORIGIN]
    found = gather(survey.shards, rows, columns).to_pylist()
    repetitions = measured(survey.shards, survey.files, rows, "repetition").tolist()
    written = []
    for place in range(len(pairs)):
        both = [found[place], found[place + len(pairs)]]
        row = {name: both[0].get(name) for name in ("problem_id", "question", "domain", "difficulty", "source")}
        row |= {"id": pair_id(mode, both[0]["id"], both[1]["id"]), "mode": mode}
        for number, (side, one) in enumerate(zip(PAIR_SIDES, both, strict=True)):
            row[side] = one["response"]
            row |= {f"{side}_{name}": one[name] for name in ORIGIN[1:]}
            row[f"{side}_repetition"] = repetitions[place + number * len(pairs)]
        written.append(row)
    write_shard(directory, index, rows_to_table(written, "pairs"), kind="pairs", made_from=made_from)
