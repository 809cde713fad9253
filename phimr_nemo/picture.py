"""How every picture of this project looks and is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.text import Text

from phimr_nemo.atomic import atomic_file

GRID_COLOR: Final = "#e6e6e6"


def tidy(axes: Any) -> None:
    """A quiet horizontal grid behind the data, and no frame above and on the right."""
    axes.grid(axis="y", color=GRID_COLOR)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_png(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a picture that exists whole or not at all; names in it are text, never mathematics."""
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)  # a name may hold dollar signs
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
