"""The look at a source before it is read: what stands around its questions, how its rows are read, and its pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.normalise import clean
from phimr_nemo.data.sources.problems import SAMPLE_ROWS, Columns
from phimr_nemo.data.sources.rawfiles import Part
from phimr_nemo.data.sources.source import Layout, Piece, items_of, layout_of, pieces_of, source_rows
from phimr_nemo.data.sources.wrapping import Wrappers, learn_wrappers
from phimr_nemo.store.atomic import write_json

WRAPPER_ROWS: Final = 2_000
WRAPPER_CHARS: Final = 64 << 20
"""Of a source, from which its wrappers are learned; what comes first."""


@dataclass(frozen=True)
class Look:
    """What is known of a source before it is read.

    Attributes:
        wrappers: what many of its first questions begin and end with.
        layout: how its rows are read; None: as its preset does.
        pieces: in order.
    """

    wrappers: Wrappers
    layout: Layout | None
    pieces: tuple[Piece, ...]


def look_at(source: SourceConfig, path: Path) -> None:
    """Look at a source, unless that is done.

    Raises:
        UserError: it cannot be read, or has other columns than it should.
    """
    if path.is_file():
        return
    rows = source_rows(source)
    head = list(itertools.islice(rows, SAMPLE_ROWS))
    layout = layout_of(source, head)
    wrappers = _learned(items_of(source, layout, itertools.chain(head, rows)))
    write_json(path, asdict(Look(wrappers, layout, tuple(pieces_of(source)))))


def read_look(path: Path) -> Look:
    """What :func:`look_at` wrote."""
    told = json.loads(path.read_text("utf-8"))
    wrappers = {name: tuple(tuple(words) for words in texts) for name, texts in told["wrappers"].items()}
    layout = told["layout"]
    return Look(
        Wrappers(**wrappers),
        None if layout is None else Layout(**(layout | {"columns": Columns(**layout["columns"])})),
        tuple(Piece(one["file"], Part(**one["part"])) for one in told["pieces"]),
    )


def _learned(items: Iterable[tuple[str, Item | UnusableRow]]) -> Wrappers:
    """What many of a source's first questions begin and end with."""
    questions: dict[str, None] = {}
    chars = 0
    for count, (_, item) in enumerate(items, 1):
        if isinstance(item, Item):
            questions[clean(item.question)] = None
            chars += len(item.question) + sum(len(one.response) for one in item.trajectories)
        if count >= WRAPPER_ROWS or chars >= WRAPPER_CHARS:
            break
    return learn_wrappers(list(questions))
