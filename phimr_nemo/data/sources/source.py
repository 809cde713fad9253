"""Where a source's rows come from: a file, a directory of shards, a Hugging Face dataset on disk or on the hub."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.sources.item import Item, Trajectory, UnusableRow
from phimr_nemo.data.sources.labels import domain_of
from phimr_nemo.data.sources.presets import PRESETS
from phimr_nemo.data.sources.problems import (
    SOURCE_NAMING,
    Columns,
    IncompleteRow,
    find_columns,
    missing_column,
    problem_of,
)
from phimr_nemo.data.sources.rawfiles import Row, files_in, read_rows
from phimr_nemo.data.sources.recorded import responses_of
from phimr_nemo.errors import UserError

DATASET_STATE: Final = ("state.json", "dataset_dict.json")
HUB_NAME_PARTS: Final = 2


def read_items(source: SourceConfig) -> Iterator[tuple[str, Item | UnusableRow]]:
    """Each row of a source with its place, as a problem or as the reason why it is none.

    Raises:
        UserError: the source is missing, empty or damaged, its first row has not the columns of the preset, or
            (without a preset) question and answer are not found by their usual names.
    """
    rows = itertools.islice(source_rows(source), source.limit or None)
    if source.preset is None:
        yield from _items_by_usual_names(source, rows)
        return
    preset = PRESETS[source.preset]
    fitted = False
    for place, row in rows:
        if not preset.fits(row):
            if not fitted:
                raise _wrong_columns(source, place, row)
            yield place, UnusableRow("other columns than the first row")
            continue
        fitted = True
        try:
            yield place, preset.read(row)
        except UnusableRow as unusable:
            yield place, unusable


def source_rows(source: SourceConfig) -> Iterator[tuple[str, Row]]:
    """The rows of a source with their places, in bounded memory.

    Raises:
        UserError: the source does not exist, cannot be read, or has no such split.
    """
    array_column = PRESETS[source.preset].array_column if source.preset else None
    path = Path(source.path)
    if path.is_file() and path.suffix == ".arrow":
        yield from _rows_of_dataset(source, _datasets().Dataset.from_file(str(path)))
    elif path.is_file():
        yield from read_rows(path, array_column=array_column)
    elif path.is_dir() and any((path / name).is_file() for name in DATASET_STATE):
        yield from _rows_of_dataset(source, _split(source, _datasets().load_from_disk(str(path))))
    elif path.is_dir():
        for file in files_in(path):
            for place, row in read_rows(file, array_column=array_column):
                yield f"{file.name}, {place}", row
    elif source.hub:
        yield from _rows_of_dataset(source, _from_hub(source))
    else:
        raise UserError(
            f"source {source.name}: {source.path} does not exist",
            rule="path is a file, a directory of .parquet, .json or .jsonl files, a dataset that `datasets` saved, "
            "or with hub=true the name of a dataset on the Hugging Face hub",
            remedy="correct the path, or set hub=true for a dataset on the hub",
        )


def _items_by_usual_names(
    source: SourceConfig, rows: Iterator[tuple[str, Row]]
) -> Iterator[tuple[str, Item | UnusableRow]]:
    """Problems of a file of unknown layout, with its responses where their column is given."""
    columns: Columns | None = None
    for place, row in rows:
        where = f"{source.path}, {place}"
        if columns is None:
            columns = find_columns(
                Path(source.path),
                row,
                naming=SOURCE_NAMING,
                question=source.question,
                answer=source.answer,
                solution=source.solution,
            )
            if source.response is not None and not any(responses_of(row, source.response, None, where)):
                raise missing_column(
                    Path(source.path), f"the response column {source.response!r}", row, SOURCE_NAMING
                )
        try:
            problem = problem_of(row, columns, where=where, source=source.name)
            recorded = list(responses_of(row, source.response, None, where)) if source.response else []
        except IncompleteRow:
            yield place, UnusableRow("no question, no answer or no response")
            continue
        own_domain = {"domain": problem["domain"]} if problem["domain"] else {}
        yield (
            place,
            Item(
                question=problem["question"],
                answer=problem["answer"],
                solution=problem["solution"],
                domain=domain_of(problem["domain"]),
                difficulty=problem["difficulty"],
                labels=json.loads(problem["metadata"]) | own_domain,
                trajectories=tuple(
                    Trajectory(one.response, one.teacher, one.finish_reason, one.labels) for one in recorded
                ),
            ),
        )


def _rows_of_dataset(source: SourceConfig, dataset: Any) -> Iterator[tuple[str, Row]]:
    empty = True
    for number, row in enumerate(dataset):
        empty = False
        yield f"row {number + 1}", row
    if empty:
        raise UserError(
            f"{source.path} holds no rows", rule="an input has at least one row", remedy="correct path or split"
        )


def _from_hub(source: SourceConfig) -> Any:
    """A dataset of the hub, streamed; `datasets` runs no code of the repository (it no longer can)."""
    library = _datasets()
    if len(source.path.split("/")) > HUB_NAME_PARTS or source.path.startswith((".", "/")):
        raise UserError(
            f"source {source.name}: {source.path!r} with hub=true",
            rule="the name of a dataset on the hub is NAME or OWNER/NAME",
            remedy="correct it, or set hub=false for a path",
        )
    try:
        return library.load_dataset(source.path, source.subset, split=source.split, streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"source {source.name}: {source.path} (subset {source.subset}, split {source.split}) cannot be loaded: "
            f"{str(error)[:300]}",
            rule="the dataset exists on the hub with this subset and split, and the hub can be reached",
            remedy="correct path, subset or split, or download it and give the directory",
        ) from error


def _split(source: SourceConfig, dataset: Any) -> Any:
    """The split of a saved DatasetDict; a saved Dataset is its own."""
    if not isinstance(dataset, dict):
        return dataset
    if source.split not in dataset:
        raise UserError(
            f"{source.path} has the splits {sorted(dataset)}, not {source.split!r}",
            rule="split names one of them",
            remedy=f"set split={sorted(dataset)[0]}" if dataset else "correct the path",
        )
    return dataset[source.split]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "the package datasets is not installed",
            rule="it reads datasets of the Hugging Face hub and those that it saved",
            remedy="pip install datasets, or convert the source to parquet or JSONL",
        ) from error
    return datasets


def _wrong_columns(source: SourceConfig, place: str, row: Row) -> UserError:
    layouts = " or ".join(str(list(layout)) for layout in PRESETS[str(source.preset)].layouts)
    return UserError(
        f"source {source.name}: {source.path}, {place} has the columns {sorted(row)}",
        rule=f"preset {source.preset} reads the columns {layouts}",
        remedy="give the preset of this set, or none and name the columns: question=COLUMN answer=COLUMN",
    )
