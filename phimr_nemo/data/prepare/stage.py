"""The stage `prepare`: sources -> problems, and rollouts from the sources that bring trajectories.

Three passes, each in bounded memory. Pieces of sources into candidates, by any number of processes
(:mod:`.candidates`). Duplicates from their narrow columns, sorted out of core (:mod:`.dedup`). Then candidates into
record directories, shard by shard (:mod:`.texts`)::

    problems/     record directory of kind "problems"
    rollouts/     record directory of kind "rollouts", if any source brings trajectories
    drops.jsonl   every row that was dropped: source, place, reason, and for which row or evaluation question
    conflicts.jsonl   every question whose sources have several answers, and what was settled
    candidates/   intermediate, removed at the end
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import DecontaminationConfig, NearDuplicatesConfig, PrepareConfig, SourceConfig
from phimr_nemo.data.parallel import Team, team_of
from phimr_nemo.data.prepare.annotate import Annotations, Annotator
from phimr_nemo.data.prepare.candidates import (
    Work,
    all_work,
    candidates_of,
    collect,
    source_counts,
)
from phimr_nemo.data.prepare.decontaminate import EvaluationIndex, read_index
from phimr_nemo.data.prepare.dedup import find_duplicates
from phimr_nemo.data.prepare.golds import settle_golds
from phimr_nemo.data.prepare.look import look_at
from phimr_nemo.data.prepare.narrow import read_facts
from phimr_nemo.data.prepare.texts import Decided, rollouts_of, write_drops, write_problems, write_rollouts
from phimr_nemo.data.prepare.written import (
    CONFLICTS_FILE,
    DROPS_FILE,
    PROBLEMS,
    ROLLOUTS,
    begin_once,
    examples_of,
    is_prepared_in,
    made_from_of,
    write_conflicts,
)
from phimr_nemo.endpoint import OpensModel
from phimr_nemo.store.check import open_for
from phimr_nemo.store.lease import FreeUnits
from phimr_nemo.store.provenance import BEGUN_FILE, MadeFrom, begun_from
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import finish, is_complete, read_manifest

CANDIDATES: Final = "candidates"
ANNOTATIONS: Final = "annotations"
NOTHING: Final = MadeFrom({}, {})


def run_prepare(config: PrepareConfig, open_model: OpensModel) -> dict[str, Any]:
    """Write problems, rollouts and the list of what was dropped; what is finished is kept.

    Args:
        config: of the stage.
        open_model: opens the annotator, where there is one.

    Returns:
        Rows of both record directories and all counts.

    Raises:
        UserError: a source or an evaluation set cannot be read, or none of a source's rows is usable.
    """
    output = config.run.output
    wanted: list[tuple[str, Kind]] = [(PROBLEMS, "problems")]
    made_from = made_from_of(config)
    if begun_from(output) != made_from or not is_prepared_in(output):
        with team_of(config.shard, output) as team:
            begin_once(output, made_from, team, _forget)
            _prepare(config, made_from, team, open_model)
    if (output / CANDIDATES).is_dir():
        # All tasks of an array come here.
        shutil.rmtree(output / CANDIDATES, ignore_errors=True)
    if is_complete(output / ROLLOUTS, "rollouts"):
        wanted.append((ROLLOUTS, "rollouts"))
    manifests = {name: read_manifest(output / name, kind) for name, kind in wanted}
    rows = {name: manifest.rows for name, manifest in manifests.items()}
    return rows | dict(manifests[PROBLEMS].counts)


def _forget(output: Path) -> None:
    """Remove what was made from other sources or settings; replies of an annotator are kept by their questions."""
    (output / BEGUN_FILE).unlink(missing_ok=True)
    for name in (PROBLEMS, ROLLOUTS):
        open_for(output / name, NOTHING, 0)
    if (output / CANDIDATES).is_dir():
        shutil.rmtree(output / CANDIDATES)


def _prepare(config: PrepareConfig, made_from: MadeFrom, team: Team, open_model: OpensModel) -> None:
    """The processes of an array share the pieces of all sources; the first to find them read does the rest alone."""
    output = config.run.output

    def is_prepared() -> bool:
        return is_prepared_in(output)

    looks = [output / CANDIDATES / f"source-{number:03d}.json" for number in range(len(config.sources))]
    team.share(
        _look,
        list(zip(config.sources, looks, strict=True)),
        is_done=lambda item: item[1].is_file() or is_prepared(),
        workers=config.workers,
        title="sources",
    )
    if is_prepared():
        return
    works = all_work(config.sources, looks)
    team.share(
        partial(_collect, config.near_duplicates, config.decontamination),
        works,
        is_done=lambda work: work.counts.is_file() or is_prepared(),
        workers=config.workers,
        title="pieces",
    )
    for _ in FreeUnits([0], team.leases, name="reduce", is_done=lambda _: is_prepared(), wait=True).one_by_one():
        _reduce(config, made_from, works, open_model)


def _look(item: tuple[SourceConfig, Path]) -> None:
    look_at(*item)


def _collect(near: NearDuplicatesConfig | None, config: DecontaminationConfig | None, work: Work) -> None:
    collect(work, permutations=near.permutations if near else 0, evaluation=_evaluation(config))


@lru_cache(maxsize=1)
def _evaluation(config: DecontaminationConfig | None) -> EvaluationIndex | None:
    """The evaluation questions, read once a process."""
    return read_index(config) if config is not None else None


def _reduce(config: PrepareConfig, made_from: MadeFrom, works: Sequence[Work], open_model: OpensModel) -> None:
    """What is decided over all sources, and the record directories."""
    output = config.run.output
    counts: Counter[str] = Counter()
    for source, found in zip(config.sources, source_counts(works), strict=True):
        for name, count in found.items():
            counts[name] += count
            counts[f"{source.name}: {name}"] += count
    candidates = candidates_of(works)
    facts = read_facts(candidates)
    duplicates = find_duplicates(candidates, config.near_duplicates, config.workers)
    golds = settle_golds(works, facts, duplicates, config.golds)
    counts.update(golds.counts)
    labels = Annotations(facts.labels, duplicates)
    decided = Decided(duplicates, golds, labels)
    with Annotator(config.annotation, output / ANNOTATIONS, open_model) as annotate:
        write_problems(config, works, decided, annotate, counts, made_from)
    if counts["trajectories"]:
        rollouts = Counter[str]()
        rows = rollouts_of(works, decided, rollouts)
        write_rollouts(output / ROLLOUTS, config.shard_size, rows, made_from)
        finish(output / ROLLOUTS, kind="rollouts", **made_from.to_json(), counts=rollouts)
        counts.update(rollouts)
    write_drops(output / DROPS_FILE, works, duplicates)
    write_conflicts(output / CONFLICTS_FILE, works, [source.name for source in config.sources], golds)
    # The problems are finished last: with them the whole stage is.
    examples = examples_of(output / DROPS_FILE)
    finish(output / PROBLEMS, kind="problems", **made_from.to_json(), counts=counts, examples=examples)
