"""Views of graded rollouts: questions with the responses of every stage, and rollouts with what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from phimr_nemo.show.fates import in_words
from phimr_nemo.show.items import (
    NO_VERDICT,
    UNKNOWN_TOKENS,
    VERDICTS,
    Cells,
    Item,
    Mask,
    Numbers,
    Response,
    View,
    ViewKind,
    index_of,
    response_of,
)
from phimr_nemo.show.records import Records

if TYPE_CHECKING:
    import pyarrow as pa

STOPPED: Final = "stop"
TEXTS: Final = ("problem_id", "question", "answer", "response")
GRADED_TEXTS: Final = (*TEXTS, "extracted", "reason")
Fates = Mapping[str, Mapping[str, Any]]


@dataclass
class Source:
    """Rollouts, graded or not yet, and the fates of them in curation.

    Attributes:
        records: of kind "rollouts" or "verdicts".
        fates: shard's sha256 -> set -> fates; empty where nobody curated them.
    """

    records: Records
    fates: Fates = field(default_factory=dict)

    @property
    def is_graded(self) -> bool:
        """Whether they are verdicts."""
        return self.records.kind == "verdicts"

    @cached_property
    def sets(self) -> dict[str, Numbers]:
        """Set -> the fate of every row, [rows]; -1 where it is not known."""
        found: dict[str, Numbers] = {}
        if self.fates:
            for digest, start in zip(self.records.digests, self.records.starts.tolist(), strict=False):
                for name, fates in self.fates.get(digest, {}).items():
                    whole = found.setdefault(name, np.full(len(self.records), -1, np.int64))
                    whole[start : start + len(fates)] = fates
        return found

    def words(self, row: int) -> list[str]:
        """What became of a row in every set."""
        return [in_words(name, int(fates[row])) for name, fates in self.sets.items() if fates[row] >= 0]


@dataclass(frozen=True)
class _Layout:
    """Which rows of which source are an item's: [rows over all sources], sorted by item, pane and sample."""

    problems: list[str]
    source: Numbers
    row: Numbers
    starts: Numbers


def graded_view(name: str, kind: ViewKind, sources: Mapping[str, Source], note: str = "") -> View:
    """A view of rollouts by problem, a pane a source.

    Args:
        name: of the view.
        kind: "questions" or "rollouts".
        sources: name of the pane -> its rollouts.
        note: see :class:`phimr_nemo.show.items.View`.

    Raises:
        UserError: a shard cannot be read.
    """
    held = list(sources.values())
    layout, cells = _survey(held)
    index = index_of(len(layout.problems), len(held), cells)
    return View(name, kind, tuple(sources), index, _fetch(held, layout), _search(held, layout), note)


def _survey(sources: Sequence[Source]) -> tuple[_Layout, Cells]:
    import pyarrow as pa

    problems, samples, tokens, verdicts, pane, rows = [], [], [], [], [], []
    reasons: list[list[str | None]] = [[]]
    for number, source in enumerate(sources):
        columns = ["problem_id", "sample_index", "tokens", *(("verdict", "reason") if source.is_graded else ())]
        for table in source.records.tables(columns):
            problems += table["problem_id"].chunks
            samples.append(table["sample_index"].to_numpy())
            tokens.append(table["tokens"].to_numpy())
            if source.is_graded:
                verdicts.append(codes(table["verdict"].to_pylist()))
                reasons[0] += table["reason"].to_pylist()
            else:
                verdicts.append(np.full(table.num_rows, NO_VERDICT))
                reasons[0] += [None] * table.num_rows
        pane.append(np.full(len(source.records), number))
        rows.append(np.arange(len(source.records)))
    ids = pa.chunked_array(problems, pa.string())
    item, names = numbered(ids)
    of_pane, of_row = np.concatenate([*pane, []]).astype(np.int64), np.concatenate([*rows, []]).astype(np.int64)
    order = np.lexsort((np.concatenate([*samples, []]), of_pane, item))
    starts = np.searchsorted(item[order], np.arange(len(names) + 1))
    cells = Cells(
        item=item,
        pane=of_pane,
        verdict=np.concatenate([*verdicts, []]).astype(np.int64),
        reasons=[*reasons, *_set_reasons(sources)],
        tokens=np.concatenate([*tokens, []]).astype(np.int64),
    )
    return _Layout(names, of_pane[order], of_row[order], starts), cells


def numbered(ids: pa.ChunkedArray) -> tuple[Numbers, list[str]]:
    """The number of each text in the order in which texts first occur, and the texts by number."""
    import pyarrow.compute as pc

    names = ids.unique()
    return pc.index_in(ids, value_set=names).to_numpy().astype(np.int64), names.to_pylist()


def codes(verdicts: Sequence[str]) -> Numbers:
    """The place of each verdict in `VERDICTS`."""
    places: dict[str, int] = {name: place for place, name in enumerate(VERDICTS)}
    return np.array([places.get(verdict, NO_VERDICT) for verdict in verdicts], np.int64)


def _set_reasons(sources: Sequence[Source]) -> list[list[str | None]]:
    """What became of every row, one list a set."""
    names = dict.fromkeys(name for source in sources for name in source.sets)
    columns = []
    for name in names:
        column: list[str | None] = []
        for source in sources:
            fates = source.sets.get(name)
            words = (
                {-1: None}
                if fates is None
                else {f: in_words(name, f) if f >= 0 else None for f in set(fates.tolist())}
            )
            column += [None] * len(source.records) if fates is None else [words[fate] for fate in fates.tolist()]
        columns.append(column)
    return columns


def _fetch(sources: Sequence[Source], layout: _Layout) -> Callable[[Sequence[int]], list[Item]]:
    def fetch(numbers: Sequence[int]) -> list[Item]:
        wanted = {number: slice(layout.starts[number], layout.starts[number + 1]) for number in numbers}
        panes: dict[int, list[list[Response]]] = {number: [[] for _ in sources] for number in wanted}
        first: dict[int, dict[str, Any]] = {}
        for place, source in enumerate(sources):
            rows = {n: layout.row[part][layout.source[part] == place].tolist() for n, part in wanted.items()}
            read = iter(source.records.rows([row for own in rows.values() for row in own]))
            for number, own in rows.items():
                for row in own:
                    record = next(read)
                    first.setdefault(number, record)
                    panes[number][place].append(_response(record, source.words(row)))
        return [
            Item(
                id=layout.problems[number],
                question=first[number]["question"],
                answer=first[number]["answer"],
                facts=tuple(str(first[number][name]) for name in ("domain", "difficulty") if first[number].get(name)),
                panes=tuple(map(tuple, panes[number])),
            )
            for number in numbers
        ]

    return fetch


def _response(record: Mapping[str, Any], fates: Sequence[str]) -> Response:
    return response_of(
        record["response"],
        verdict=record.get("verdict") or "",
        reason=record.get("reason") or "",
        extracted=record.get("extracted") or "",
        tokens=None if record["tokens"] <= UNKNOWN_TOKENS else record["tokens"],
        notes=(*(() if record["finish_reason"] == STOPPED else ("cut off",)), *fates),
    )


def _search(sources: Sequence[Source], layout: _Layout) -> Callable[[str], Mask]:
    def search(text: str) -> Mask:
        found = np.zeros(len(layout.problems), np.bool_)
        item = np.repeat(np.arange(len(layout.problems)), np.diff(layout.starts))
        for place, source in enumerate(sources):
            hits = holds(source.records, GRADED_TEXTS if source.is_graded else TEXTS, text)
            own = layout.source == place
            found[item[own][hits[layout.row[own]]]] = True
        return found

    return search


def holds(records: Records, columns: Sequence[str], text: str) -> Mask:
    """Which rows hold a text in one of some columns, whatever its case, [rows]."""
    import pyarrow.compute as pc

    parts = [np.zeros(0, np.bool_)]
    for table in records.tables(columns):
        hits = np.zeros(table.num_rows, np.bool_)
        for name in columns:
            found = pc.fill_null(pc.match_substring(table[name], text, ignore_case=True), False)
            hits |= found.to_numpy()
        parts.append(hits)
    return np.concatenate(parts)
