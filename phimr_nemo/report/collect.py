"""What runs have left: scores, training metrics, record directories, configurations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import Result, read_result, read_settings
from phimr_nemo.report.scores import PAPER_STAGES
from phimr_nemo.report.tables import Seeds
from phimr_nemo.store.check import recorded_kind
from phimr_nemo.store.runs import CONFIG_FILE, METRICS_FILE, RESULTS_FILE, RUN_FILE, RunDirectory, read_metrics
from phimr_nemo.store.shards import MANIFEST

SEED_DIRECTORY: Final = "seed-"
# Native checkpoints and TensorBoard files hold no runs.
PASSED_OVER: Final = frozenset(("checkpoints", "tensorboard", "hf"))


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation.

    Attributes:
        row: the model's name in tables.
        benchmark: what it was asked.
        seed: of the run.
        path: its directory.
        result: what was found.
        settings: how (see :func:`phimr_nemo.evaluate.evaluate.read_settings`).
    """

    row: str
    benchmark: str
    seed: int
    path: Path
    result: Result
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Ran:
    """A run directory with its description.

    Attributes:
        name: its path below the directory that was asked for.
        stage: of the recipe.
        made: run.json.
        facts: closing facts; None while it has not finished.
        metrics: the lines of metrics.jsonl.
        config: config.yaml as text.
    """

    name: str
    path: Path
    stage: str
    made: Mapping[str, Any]
    facts: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]
    config: str


def find_evaluations(roots: Sequence[Path]) -> list[Evaluated]:
    """Every finished evaluation under some directories, the recipe's stages in their order, then the others.

    Args:
        roots: directories, searched with everything below them.

    Raises:
        UserError: there is none, or one is damaged.
    """
    paths = sorted({path.parent for root in roots for path in _files(root, RESULTS_FILE)})
    if not paths:
        raise UserError(
            f"no finished evaluation under {[str(root) for root in roots]}",
            rule="a report is made from the output of `phimr quickstart` or `phimr evaluate`",
            remedy="give the directory that --out or run.output named, or one above it",
        )
    order = list(PAPER_STAGES)
    found = [read_evaluation(path) for path in paths]
    return sorted(found, key=lambda one: (one.benchmark, order.index(one.row) if one.row in order else len(order)))


def read_evaluation(path: Path) -> Evaluated:
    """One finished evaluation, from its directory.

    Raises:
        UserError: its result or its configuration cannot be read.
    """
    import yaml

    settings = read_settings(path / RESULTS_FILE)
    try:
        config = yaml.safe_load((path / CONFIG_FILE).read_text("utf-8"))
        seed = int(config["run"]["seed"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / CONFIG_FILE} cannot be read: {error!r}",
            rule="the configuration of an evaluation lies beside its result",
            remedy="run the evaluation again with the same configuration",
        ) from error
    row, benchmark = str(settings["row"]), str(settings["benchmark"])
    return Evaluated(row, benchmark, seed, path, read_result(path / RESULTS_FILE), settings)


def by_benchmark(evaluations: Sequence[Evaluated]) -> dict[str, dict[str, Seeds]]:
    """benchmark -> row -> seed -> result.

    Raises:
        UserError: a model was evaluated twice on a benchmark with one seed.
    """
    found: dict[str, dict[str, dict[int, Evaluated]]] = {}
    for one in evaluations:
        seeds = found.setdefault(one.benchmark, {}).setdefault(one.row, {})
        if one.seed in seeds:
            raise UserError(
                f"{one.path} and {seeds[one.seed].path} are both {one.row!r} on {one.benchmark} with seed {one.seed}",
                rule="a table has each model once a benchmark and seed",
                remedy="give one of them, or name the model when it is evaluated: row=NAME",
            )
        seeds[one.seed] = one
    return {
        benchmark: {row: {seed: one.result for seed, one in seeds.items()} for row, seeds in rows.items()}
        for benchmark, rows in found.items()
    }


def find_runs(roots: Sequence[Path]) -> list[Ran]:
    """Every run directory under some directories, in the order in which the runs began.

    Raises:
        UserError: a description is damaged.
    """
    found = []
    for root in roots:
        for file in _files(root, RUN_FILE):
            below = file.parent.relative_to(root)
            name = str(root.name / below) if len(roots) > 1 or below == Path() else str(below)
            found.append(_run(file.parent, name))
    return sorted(found, key=lambda run: (str(run.made.get("starts", [""])[0]), run.name))


def _run(path: Path, name: str) -> Ran:
    try:
        made = json.loads((path / RUN_FILE).read_text("utf-8"))
        config = (path / CONFIG_FILE).read_text("utf-8")
        run = RunDirectory(path)
        facts = run.closing_facts() if run.is_done else None
        stage = str(made["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the run in {path} cannot be read: {error!r}",
            rule=f"a run directory holds {RUN_FILE} and {CONFIG_FILE}",
            remedy="remove the directory, or run its stage again",
        ) from error
    metrics = list(read_metrics(path)) if (path / METRICS_FILE).is_file() else []
    return Ran(name, path, stage, made, facts, metrics, config)


def data_roots(roots: Sequence[Path]) -> list[Path]:
    """The directories whose data steps belong together: the seeds of a quickstart, else the directory itself."""
    found: list[Path] = []
    for root in roots:
        seeds = sorted(path for path in root.glob(f"{SEED_DIRECTORY}*") if path.is_dir())
        found += [path for path in seeds or [root] if any(map(is_data_step, path.rglob(MANIFEST)))]
    return found


def is_data_step(manifest: Path) -> bool:
    """Whether a manifest is that of records which a data step made; an evaluation's responses are none."""
    directory = manifest.parent
    return recorded_kind(directory) is not None and not (directory.parent / RESULTS_FILE).is_file()


def _files(root: Path, name: str) -> Iterator[Path]:
    """Files of a name under a directory, also behind links, but not in what a run keeps for itself."""
    seen = set()
    for directory, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(set(below) - PASSED_OVER)
        if name in files:
            yield Path(directory) / name
