"""How every picture of this project looks and is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.text import Text

from phimr_nemo.store.atomic import atomic_file

GRID_COLOR: Final = "#e6e6e6"
TEXT_COLOR: Final = "#2b2b2b"
BAR_COLOR: Final = "#4c78a8"
BAR_WIDTH: Final = 0.66


def tidy(axes: Any) -> None:
    """A quiet horizontal grid behind the data, and no frame above and on the right."""
    axes.grid(axis="y", color=GRID_COLOR)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def labelled_bars(axes: Any, names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> None:
    """Horizontal bars from top to bottom, each with its value written behind it instead of an axis.

    Args:
        axes: matplotlib's.
        names: of the bars.
        values: their lengths.
        labels: the values as texts.
    """
    axes.barh(range(len(names)), values, BAR_WIDTH, color=BAR_COLOR)
    for index, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.annotate(label, (value, index), xytext=(6, 0), textcoords="offset points", va="center", color=TEXT_COLOR)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def save_png(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a picture that exists whole or not at all; names in it are text, never mathematics."""
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)  # a name may hold dollar signs
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
