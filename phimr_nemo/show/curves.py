"""Learning curves as text, for a terminal: several runs over each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from phimr_nemo.report.plots import Curve

MARKS: Final = "123456789"
BOTH: Final = "*"
"""Where several runs are."""
WIDTH: Final = 72
HEIGHT: Final = 12
LABEL: Final = 9
FIGURES: Final = 4


def text_plot(curves: Mapping[str, Curve], title: str, *, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Curves over each other, each with a digit for a mark, and a legend.

    What falls into one column of characters is its mean. Values that are no numbers are left out.

    Args:
        curves: name of a run -> a metric over its steps; nine at most.
        title: over it.
        width, height: of the field, in characters.

    Returns:
        Lines; nothing but the title and what there is not, where there is no value.
    """
    shown = {
        name: [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
        for name, curve in curves.items()
    }
    points = [point for one in shown.values() for point in one]
    if not points:
        return [title, "  (no values)"]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    means = {name: _means(one, first, last, width) for name, one in shown.items()}
    values = [value for one in means.values() for value in one.values()]
    low, high = min(values), max(values)
    field = [[" "] * width for _ in range(height)]
    for mark, one in zip(MARKS, means.values(), strict=False):
        for column, value in one.items():
            share = 0.5 if high == low else (value - low) / (high - low)
            line = height - 1 - round(share * (height - 1))
            field[line][column] = mark if field[line][column] in (" ", mark) else BOTH
    labels = {0: high, height - 1: low}
    lines = [title]
    for place, row in enumerate(field):
        label = f"{labels[place]:.{FIGURES}g}" if place in labels else ""
        lines.append(f"{label:>{LABEL}} |{''.join(row).rstrip()}")
    lines.append(f"{'':>{LABEL}} +{'-' * width}")
    lines.append(f"{'':>{LABEL}}  {first:<{width - len(str(last))},}{last:,} steps")
    legend = ", ".join(f"{mark} {name}" for mark, name in zip(MARKS, curves, strict=False))
    lines.append(f"{'':>{LABEL}}  {legend}{f', {BOTH} both' if len(curves) > 1 else ''}")
    return lines


def _means(points: Sequence[tuple[int, float]], first: int, last: int, width: int) -> dict[int, float]:
    """Column -> mean of the values in it."""
    columns: dict[int, list[float]] = {}
    for step, value in points:
        place = 0 if last == first else round((step - first) / (last - first) * (width - 1))
        columns.setdefault(place, []).append(value)
    return {column: math.fsum(values) / len(values) for column, values in sorted(columns.items())}
