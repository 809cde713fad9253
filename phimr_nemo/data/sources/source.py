"""Where a source's rows come from: a file, a directory of shards, a Hugging Face dataset on disk or on the hub."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.sources.cells import first_present, lookup, merged
from phimr_nemo.data.sources.damage import PICTURE, repair_value, shows_picture
from phimr_nemo.data.sources.item import Item, Trajectory, UnusableRow
from phimr_nemo.data.sources.labels import domain_of
from phimr_nemo.data.sources.misfits import unreadable_arrow
from phimr_nemo.data.sources.normalise import storable
from phimr_nemo.data.sources.presets import PRESETS
from phimr_nemo.data.sources.problems import (
    ANSWER_COLUMNS,
    CONVERSATIONS,
    QUESTION_COLUMNS,
    SAMPLE_ROWS,
    SOLUTION_COLUMNS,
    SOURCE_NAMING,
    Columns,
    IncompleteRow,
    find_columns,
    missing_column,
    problem_of,
)
from phimr_nemo.data.sources.rawfiles import WHOLE, Part, Row, files_in, parts_of, read_rows
from phimr_nemo.data.sources.recorded import NO_TEXT, responses_of, unread_response
from phimr_nemo.errors import UserError

DATASET_STATE: Final = "state.json"
DATASET_PARTS: Final = "dataset_dict.json"
DATASET_ROWS: Final = 10_000
"""Of a dataset on the disk, for one process at a time."""
HUB_NAME_PARTS: Final = 2
HUB_SECONDS: Final = 10.0
NEWEST: Final = "newest"
FULL_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read by itself.

    Attributes:
        file: of the source; None = it is a dataset that `datasets` reads, or it is read whole.
        part: of the file; of a dataset on the disk its rows, of a dataset of the hub its files.
    """

    file: str | None = None
    part: Part = WHOLE


ALL: Final = Piece()


@dataclass(frozen=True)
class Layout:
    """How the rows of a source without a preset are read, as its first rows tell.

    Attributes:
        columns: of question, answer and labels.
        response: the column of responses; None = it brings none.
        unread: a column of responses that was not asked for.
    """

    columns: Columns
    response: str | None
    unread: str | None


def read_items(source: SourceConfig) -> Iterator[tuple[str, Item | UnusableRow]]:
    """Each row of a source with its place, as a problem or as the reason why it is none.

    Raises:
        UserError: the source is missing, empty or damaged, its first row has not the columns of the preset, or
            (without a preset) question and answer are not found by their usual names.
    """
    rows = source_rows(source)
    head = list(itertools.islice(rows, SAMPLE_ROWS))
    yield from items_of(source, layout_of(source, head), itertools.chain(head, rows))


def layout_of(source: SourceConfig, head: Sequence[tuple[str, Row]]) -> Layout | None:
    """How a source is read, from its first rows; None: as its preset does.

    Raises:
        UserError: the first row has not the columns of the preset, or question and answer are not found.
    """
    if source.preset is not None:
        for place, given in head[:1]:
            row, _ = repair_value(given)
            if not PRESETS[source.preset].fits(row):
                raise _wrong_columns(source, place, row)
        return None
    first = [row for _, row in head]
    whole = merged(first)
    chat = source.question or first_present(whole, QUESTION_COLUMNS)
    told = source.answer or source.solution or first_present(whole, (*ANSWER_COLUMNS, *SOLUTION_COLUMNS))
    if chat not in CONVERSATIONS:
        # Beside a question without an answer, a conversation has the response.
        chat = None if told else first_present(whole, CONVERSATIONS)
    is_chat = source.response is None and chat is not None
    response = chat if is_chat else source.response
    if response is None and not (told or chat) and (unread := unread_response(whole)):
        raise UserError(
            f"source {source.name}: {source.path} tells no answer, and has responses in the column {unread!r}",
            rule="a source tells answers, or brings responses, which vote where nobody tells one",
            remedy=f"set response: {unread} in its entry of sources, or name the column of answers: answer: COLUMN",
        )
    columns = find_columns(
        Path(source.path),
        whole,
        naming=SOURCE_NAMING,
        question=source.question,
        answer=source.answer,
        solution=source.solution,
        answer_needed=source.response is None and not is_chat,
    )
    if source.response is not None and not any(responses_of(row, source.response, None) for row in first):
        raise missing_column(Path(source.path), f"the response column {source.response!r}", whole, SOURCE_NAMING)
    others = {name: value for name, value in whole.items() if name not in (columns.answer, columns.solution)}
    return Layout(columns, response, unread_response(others) if response is None else None)


def items_of(
    source: SourceConfig, layout: Layout | None, rows: Iterable[tuple[str, Row]]
) -> Iterator[tuple[str, Item | UnusableRow]]:
    """Some rows of a source as :func:`read_items` gives them.

    Args:
        source: the source.
        layout: of :func:`layout_of`.
        rows: with their places.
    """
    if source.preset is None:
        assert layout is not None
        yield from _items_by_usual_names(source, layout, rows)
        return
    preset = PRESETS[source.preset]
    for place, given in rows:
        row, repairs = repair_value(given)
        if not preset.fits(row):
            yield place, UnusableRow("other columns than the first row")
            continue
        try:
            yield place, _noting(preset.read(row), repairs)
        except UnusableRow as unusable:
            yield place, unusable


def _noting(item: Item, repairs: frozenset[str]) -> Item:
    """The item with what was repaired of its row, and a picture in its question, which nobody will see."""
    noted = sorted(repairs) + [PICTURE] * shows_picture(item.question)
    return dataclasses.replace(item, lost=(*item.lost, *noted)) if noted else item


def source_rows(source: SourceConfig) -> Iterator[tuple[str, Row]]:
    """The rows of a source with their places, in bounded memory.

    Raises:
        UserError: the source does not exist, cannot be read, or has no such split.
    """
    files = _files_of(source)
    if files is None:
        rows = _rows_of_dataset(source, WHOLE)
    else:
        rows = (row for file in files for part in parts_of(file) for row in _rows_of_file(source, file, part))
    yield from itertools.islice(rows, source.limit or None)


def pieces_of(source: SourceConfig) -> Iterator[Piece]:
    """A source in pieces, in order; one that is cut off at a number of rows is one piece.

    Raises:
        UserError: as for :func:`source_rows`.
    """
    files = _files_of(source)
    if source.limit:
        yield ALL
    elif files is not None:
        yield from (Piece(str(file), part) for file in files for part in parts_of(file))
    elif Path(source.path).exists():
        for start in range(0, len(_dataset(source)) or 1, DATASET_ROWS):
            yield Piece(None, Part(start, start + DATASET_ROWS, start))
    elif (shards := _dataset(source).num_shards) > 1:
        yield from (Piece(None, Part(number, number + 1)) for number in range(shards))
    else:
        yield ALL


def piece_rows(source: SourceConfig, piece: Piece) -> Iterator[tuple[str, Row]]:
    """The rows of one of a source's pieces with their places.

    Raises:
        UserError: as for :func:`source_rows`.
    """
    if piece == ALL:
        return source_rows(source)
    if piece.file is None:
        return _rows_of_dataset(source, piece.part)
    return _rows_of_file(source, Path(piece.file), piece.part)


def _files_of(source: SourceConfig) -> list[Path] | None:
    """The files of rows of a source; None for a dataset that `datasets` reads.

    Raises:
        UserError: there is nothing.
    """
    path = Path(source.path)
    if (path.is_file() and path.suffix == ".arrow") or _is_saved(path):
        return None
    if path.is_file() or path.is_dir():
        return [path] if path.is_file() else files_in(path)
    if source.hub:
        return None
    raise UserError(
        f"source {source.name}: {source.path} does not exist",
        rule="path is a file, a directory of .parquet, .json or .jsonl files, a dataset that `datasets` saved, "
        "or with hub=true the name of a dataset on the Hugging Face hub",
        remedy="correct the path, or set hub=true for a dataset on the hub",
    )


def _rows_of_file(source: SourceConfig, file: Path, part: Part) -> Iterator[tuple[str, Row]]:
    array_column = PRESETS[source.preset].array_column if source.preset else None
    for place, row in read_rows(file, array_column=array_column, part=part):
        yield (place if Path(source.path) == file else f"{storable(file.name)}, {place}"), row


def _items_by_usual_names(
    source: SourceConfig, layout: Layout, rows: Iterable[tuple[str, Row]]
) -> Iterator[tuple[str, Item | UnusableRow]]:
    """Problems of a file of unknown layout, with its responses where their column is given or is the chat's own."""
    for place, given in rows:
        row, repairs = repair_value(given)
        recorded = responses_of(row, layout.response, None) if layout.response is not None else []
        texts = [one for one in recorded if one.response]
        try:
            problem = problem_of(
                row, layout.columns, where=f"{source.path}, {place}", source=source.name, answer_needed=not texts
            )
        except IncompleteRow as error:
            yield place, UnusableRow(error.reason)
            continue
        lost = [NO_TEXT] * (len(recorded) - len(texts))
        if layout.unread is not None and lookup(row, layout.unread) is not None:
            lost.append(f"responses in a column that was not asked for (response: {layout.unread})")
        item = Item(
            question=problem["question"],
            answer=problem["answer"],
            solution=problem["solution"],
            domain=domain_of(problem["domain"]),
            difficulty=problem["difficulty"],
            labels=json.loads(problem["metadata"]) | ({"domain": problem["domain"]} if problem["domain"] else {}),
            trajectories=tuple(
                Trajectory(one.response, one.teacher, one.finish_reason, one.labels) for one in texts if one.response
            ),
            lost=tuple(lost),
        )
        yield place, _noting(item, repairs)


def _is_saved(path: Path) -> bool:
    """Whether `datasets` saved it."""
    if not path.is_dir():
        return False
    # A state.json beside other files may be anybody's.
    return (path / DATASET_PARTS).is_file() or ((path / DATASET_STATE).is_file() and any(path.glob("*.arrow")))


def _dataset(source: SourceConfig) -> Any:
    path = Path(source.path)
    if path.is_file():
        try:
            return _datasets().Dataset.from_file(str(path))
        except (OSError, ValueError) as error:
            raise unreadable_arrow(path, error) from error
    return _split(source, _datasets().load_from_disk(str(path))) if _is_saved(path) else _from_hub(source)


def _rows_of_dataset(source: SourceConfig, part: Part) -> Iterator[tuple[str, Row]]:
    """All rows; or of a dataset on the disk some rows, of one of the hub a file, whose rows count from 1."""
    dataset, name = _dataset(source), ""
    if part != WHOLE and Path(source.path).exists():
        dataset = dataset.select(range(part.start, min(part.stop or 0, len(dataset))))
    elif part != WHOLE:
        dataset = dataset.shard(num_shards=dataset.num_shards, index=part.start)
        name = f"file {part.start + 1}, "
    empty = True
    for number, row in enumerate(dataset, part.before + 1):
        empty = False
        yield f"{name}row {number}", row
    if empty and not name:
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
        _check_cached_revision(source)
        return library.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"source {source.name}: {source.path} (subset {source.subset}, split {source.split}, "
            f"revision {source.revision or NEWEST}) cannot be loaded: {str(error)[:300]}",
            rule="the dataset exists on the hub with this subset, split and revision, and the hub can be reached",
            remedy="correct path, subset, split or revision, or download it and give the directory",
        ) from error


def hub_revision(source: SourceConfig) -> str:
    """The commit of a dataset of the hub, or offline of its copy in the cache; else what was asked for."""
    asked = source.revision or NEWEST
    try:
        if _datasets().config.HF_HUB_OFFLINE:
            return _cached_revision(source)
        if FULL_COMMIT.fullmatch(asked):
            return asked
        from huggingface_hub import HfApi

        found = HfApi().dataset_info(source.path, revision=source.revision, timeout=HUB_SECONDS)
    except (ImportError, OSError, ValueError):  # a mirror may not have this interface
        return asked
    return found.sha or asked


def _cached_revision(source: SourceConfig) -> str:
    return str(_datasets().load_dataset_builder(source.path, source.subset).hash)


def _check_cached_revision(source: SourceConfig) -> None:
    """Offline, `datasets` takes the newest copy in its cache, whatever revision it is asked for.

    Raises:
        UserError: it is of another revision.
    """
    if source.revision is None or not _datasets().config.HF_HUB_OFFLINE:
        return
    cached = _cached_revision(source)
    if cached != source.revision:
        raise UserError(
            f"source {source.name}: the cache holds {source.path} at {cached}, not at revision {source.revision}",
            rule="offline (HF_HUB_OFFLINE), a pinned dataset is the one in the cache",
            remedy=f"load it once online, or give the commit that is there: revision: {cached}",
        )


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
