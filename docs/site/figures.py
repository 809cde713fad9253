"""Figures in the tables of docs/, read where they stand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

DOCS: Final = Path(__file__).resolve().parents[1]
VALUE: Final = re.compile(r"^\**(?P<mean>[+-]?[\d.]+)(?: ± (?P<seeds>[\d.]+))?(?: \((?P<questions>[\d.]+)\))?")


class Figure(NamedTuple):
    """A measured value.

    Attributes:
        mean: the value.
        error: its standard error, the larger one where the table has two; NaN where it has none.
        text: as the table has it.
    """

    mean: float
    error: float
    text: str


class Cell(NamedTuple):
    """A cell of a table of docs/.

    Attributes:
        page: of docs/.
        column: beginning of the column's title.
        row: the row's first cell.
        error: title of a column that holds the standard error; None where it stands in the cell.
        table: which of several tables with that row and column.
    """

    page: str
    column: str
    row: str
    error: str | None = None
    table: int = 0


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page of docs/: rows of cells, the header first and no ruler."""
    found: list[list[list[str]]] = []
    inside = False
    for line in (DOCS / page).read_text("utf-8").splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not set("".join(cells)) <= set("-: "):
                found[-1].append(cells)
        inside = line.startswith("|")
    return found


def _pick(row: Sequence[str], header: Sequence[str], column: str) -> str | None:
    """The cell under a title, or else under one that begins so."""
    for number, title in enumerate(header):
        if title == column:
            return row[number]
    return next((row[number] for number, title in enumerate(header) if title.startswith(column)), None)


def look_up(cell: Cell) -> Figure:
    """The figure in a cell.

    Raises:
        LookupError: no table has it, or it is no number.
    """
    candidates = [
        (header, row)
        for header, *rows in tables(cell.page)
        for row in rows
        if row[0] == cell.row and _pick(row, header, cell.column) is not None
    ]
    if len(candidates) <= cell.table:
        raise LookupError(f"docs/{cell.page} has no table with the row {cell.row!r} and the column {cell.column!r}")
    header, row = candidates[cell.table]
    text = _pick(row, header, cell.column) or ""
    match = VALUE.match(text)
    if match is None:
        raise LookupError(f"docs/{cell.page}, {cell.row!r}, {cell.column!r}: {text!r} is no figure")
    if cell.error is not None:
        error = _pick(row, header, cell.error) or ""
        return Figure(float(match["mean"]), float(error), f"{match['mean']} ± {error}")
    errors = [float(match[name]) for name in ("seeds", "questions") if match[name]]
    return Figure(float(match["mean"]), max(errors, default=math.nan), match[0].strip("*"))


def difference(figures: Sequence[Figure]) -> Figure:
    """A difference as it is, or that of two values, with their errors as if independent."""
    if len(figures) == 1:
        return figures[0]
    first, second = figures
    error = math.hypot(*(0.0 if math.isnan(figure.error) else figure.error for figure in figures))
    return Figure(second.mean - first.mean, error, f"{first.text} -> {second.text}")
