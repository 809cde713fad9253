"""Which views a directory of runs has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from phimr_nemo.data.prepare.written import DROPS_FILE
from phimr_nemo.errors import UserError
from phimr_nemo.report.collect import PASSED_OVER, Evaluated, read_evaluation
from phimr_nemo.report.scores import PAPER_STAGES
from phimr_nemo.show.chosen import pairs_view
from phimr_nemo.show.drops import drops_view
from phimr_nemo.show.fates import fates_of
from phimr_nemo.show.graded import Fates, Source, graded_view
from phimr_nemo.show.items import View
from phimr_nemo.show.records import Records
from phimr_nemo.show.samples import samples_view
from phimr_nemo.store.responses import kept_steps
from phimr_nemo.store.runs import RESULTS_FILE
from phimr_nemo.store.shards import SHARD_NAME

VERDICTS: Final = "verdicts"
SURVEY: Final = "survey"
DROPS: Final = "drops"
ORDER: Final = ("questions", "samples", "pairs", "rollouts", "drops")


def find_views(root: Path) -> list[View]:
    """Everything below a directory that can be shown: evaluations, GRPO's samples, pairs, rollouts, what was dropped.

    Evaluations of one benchmark with one seed are one view, a pane a model, in the order of the recipe's stages.

    Args:
        root: a run directory, or one above several; runs that are not finished show what they have so far.

    Raises:
        UserError: there is nothing, or something is damaged.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} is no directory",
            rule="phimr show reads run directories",
            remedy="give a run.output, or a directory with runs in it, for example runs/quickstart",
        )
    directories = list(_directories(root))
    evaluations = [read_evaluation(path) for path in directories if (path / RESULTS_FILE).is_file()]
    views = [*_questions(evaluations, root)]
    fates, notes = _fates(directories)
    for path in directories:
        name = _name(path, root)
        if kept_steps(path):
            views.append(samples_view(name, path))
        if (path / DROPS_FILE).is_file():
            views.append(drops_view(f"{name}/{DROPS}", path / DROPS_FILE))
        if not _holds_shards(path) or (path.parent / RESULTS_FILE).is_file():
            continue
        records = Records(path)
        if records.kind == "pairs":
            views.append(pairs_view(name, records))
        elif records.kind == "verdicts" or (records.kind == "rollouts" and not _is_graded(path, directories)):
            views.append(graded_view(name, "rollouts", {name: Source(records, fates)}, notes))
    found = [view for view in views if len(view.index)]
    if not found:
        raise UserError(
            f"nothing below {root} can be shown",
            rule="shown are evaluations, rollouts, preference pairs, GRPO's samples, and rows that prepare dropped",
            remedy="give the run.output of evaluate, prepare, generate, verify, curate or grpo, or one above it",
        )
    return sorted(found, key=lambda view: (ORDER.index(view.kind), view.name))


def _directories(root: Path) -> Iterator[Path]:
    """All directories that may hold something, behind links too."""
    seen = set()
    for directory, below, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        below[:] = [] if real in seen else sorted(set(below) - PASSED_OVER - {SURVEY})
        if real not in seen:
            seen.add(real)
            yield Path(directory)


def _name(path: Path, root: Path) -> str:
    below = path.relative_to(root)
    return str(below) if below.parts else path.name or str(path)


def _holds_shards(path: Path) -> bool:
    return any(SHARD_NAME.fullmatch(file.name) for file in path.glob("part-*.parquet"))


def _is_graded(rollouts: Path, directories: Sequence[Path]) -> bool:
    """Whether the verdicts of some rollouts are among the directories: they show the same texts, graded."""
    import json

    from phimr_nemo.store.shards import MANIFEST, is_complete, read_manifest

    if not is_complete(rollouts, "rollouts"):
        return False
    content = read_manifest(rollouts, "rollouts").content
    graded = (path / MANIFEST for path in directories if is_complete(path, "verdicts"))
    return any(content in json.loads(path.read_text("utf-8"))["inputs"].values() for path in graded)


def _questions(evaluations: Sequence[Evaluated], root: Path) -> Iterator[View]:
    stages = list(PAPER_STAGES)

    def rank(one: Evaluated) -> tuple[str, int, int, str]:
        return one.benchmark, one.seed, stages.index(one.row) if one.row in stages else len(stages), str(one.path)

    for (benchmark, seed), group in groupby(sorted(evaluations, key=rank), lambda one: (one.benchmark, one.seed)):
        sources: dict[str, Source] = {}
        for one in group:
            # Two runs may have evaluated the same model.
            name = one.row if one.row not in sources else f"{one.row} ({_name(one.path, root)})"
            sources[name] = Source(Records(one.path / VERDICTS))
        yield graded_view(f"{benchmark}, seed {seed}", "questions", sources)


def _fates(directories: Sequence[Path]) -> tuple[Fates, str]:
    """The fates of all rollouts that a curate run below the directories has decided on, and what is not known."""
    found: dict[str, dict[str, object]] = {}
    notes = []
    for path in directories:
        if (path / SURVEY).is_dir():
            try:
                for shard, sets in fates_of(path).items():
                    found.setdefault(shard, {}).update(sets)
            except UserError as error:
                notes.append(f"What curation dropped is not known: {error.problem}.")
    return found, " ".join(notes)
