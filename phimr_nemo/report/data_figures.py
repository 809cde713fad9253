"""Pictures of data: funnels, lengths, difficulty, pass rates. Small enough for a phone, sharp enough for a laptop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from phimr_nemo.data.curate.shape import LENGTH_BINS, TIERS, bin_start
from phimr_nemo.report.picture import BAR_COLOR, BAR_WIDTH, TEXT_COLOR, labelled_bars, save_png, tidy

Counts = npt.NDArray[np.int64]

DPI: Final = 200
WIDTH_INCHES: Final = 5.2
HEIGHT_INCHES: Final = 3.2
INCHES_PER_BAR: Final = 0.34
FONT_POINTS: Final = 10
MARGIN_INCHES: Final = 0.9
HARD_COLOR: Final = "#e45756"
# Distinguishable also for the colour-blind; the first is the colour of everything that stands alone.
# What is wrong is red wherever it stands, and what nobody could read is grey.
VERDICT_COLORS: Final[Mapping[str, str]] = {
    "correct": BAR_COLOR,
    "wrong": HARD_COLOR,
    "unparsable": "#9aa0a6",
    "timeout": "#eeca3b",
    "error": "#b279a2",
}
COLORS: Final = (BAR_COLOR, "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b")
THOUSAND: Final = 1000
MOST_NAME_CHARACTERS: Final = 24
LONG_NAME_CHARACTERS: Final = 12


def short_number(value: float) -> str:
    """A number in at most five characters: 950, 12.3 K, 1.60 M."""
    for size, unit in ((THOUSAND**3, " B"), (THOUSAND**2, " M"), (THOUSAND, " K")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def draw_funnel(counts: Mapping[str, int], path: Path) -> None:
    """How many records there are after each step, from first to last."""
    names, values = [short_name(name) for name in counts], list(counts.values())
    figure, axes = _figure(MARGIN_INCHES + INCHES_PER_BAR * len(names))
    labelled_bars(axes, names, values, [short_number(value) for value in values])
    axes.margins(x=0.14)
    save_png(figure, path, dpi=DPI)


def draw_lengths(series: Mapping[str, Counts], path: Path, *, stacked: bool) -> None:
    """Responses by length in tokens on a logarithmic axis.

    Args:
        series: responses by length class, [bins], by name.
        path: the PNG.
        stacked: parts of one whole on top of each other, as counts; else each its own line, as shares.
    """
    figure, axes = _figure(HEIGHT_INCHES)
    used = np.flatnonzero(np.sum(list(series.values()), axis=0))
    low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, LENGTH_BINS)
    edges = np.array([bin_start(place) for place in range(low, high + 1)])
    if stacked:
        bottom = np.zeros(high - low)
        for color, (name, counts) in zip(_colors(series), series.items(), strict=False):
            axes.stairs(
                bottom + counts[low:high], edges, baseline=bottom, fill=True, color=color, label=short_name(name)
            )
            bottom = bottom + counts[low:high]
    else:
        for color, (name, counts) in zip(COLORS, series.items(), strict=False):
            share = 100 * counts[low:high] / max(int(counts.sum()), 1)
            axes.stairs(share, edges, color=color, linewidth=1.8, label=short_name(name))
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    ticks = 2.0 ** np.arange(np.ceil(np.log2(edges[0])), np.floor(np.log2(edges[-1])) + 1)
    axes.set_xticks(ticks[:: 1 + len(ticks) // 9], [_tokens(tick) for tick in ticks[:: 1 + len(ticks) // 9]])
    axes.minorticks_off()
    axes.set_xlabel("tokens per response")
    axes.set_ylabel("responses" if stacked else "share (%)")
    if stacked:
        axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set_ylim(bottom=0)
    _legend(axes, list(series))
    tidy(axes)
    save_png(figure, path, dpi=DPI)


def draw_difficulty(series: Mapping[str, Counts], path: Path) -> None:
    """The share of every difficulty in each set, one row of bars a set: {name: responses by tier, [tiers]}."""
    figure, axes = _figure(MARGIN_INCHES + 0.5 + INCHES_PER_BAR * len(series))
    names = [short_name(name) for name in series]
    left = np.zeros(len(series))
    table = np.array([100 * counts / max(int(counts.sum()), 1) for counts in series.values()])
    shades = (*COLORS[: len(TIERS) - 1], "#c8c8c8")
    for tier, (title, color) in enumerate(zip(TIERS, shades, strict=True)):
        if table[:, tier].any():
            axes.barh(range(len(series)), table[:, tier], BAR_WIDTH, left=left, color=color, label=_words(title))
        left = left + table[:, tier]
    axes.set_yticks(range(len(series)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share (%)")
    axes.tick_params(axis="y", length=0)
    _legend(axes, TIERS)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save_png(figure, path, dpi=DPI)


def draw_pass_rates(pass_rates: npt.NDArray[np.float64], hard: npt.NDArray[np.bool_], path: Path) -> None:
    """Prompts by pass rate; the hard ones, which are to be oversampled, in another colour."""
    figure, axes = _figure(HEIGHT_INCHES)
    edges = np.linspace(0, 1, 17)
    sides = [pass_rates[hard], pass_rates[~hard]]
    axes.hist(sides, edges, stacked=True, color=[HARD_COLOR, COLORS[0]], label=["hard", "other"])
    axes.set_xlim(0, 1)
    axes.set_xlabel("pass rate")
    axes.set_ylabel("prompts")
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    _legend(axes, ("hard", "other"))
    tidy(axes)
    save_png(figure, path, dpi=DPI)


def _colors(names: Iterable[str]) -> list[str]:
    """A colour a name: a verdict's own, else one after the other."""
    return [VERDICT_COLORS.get(name, COLORS[place % len(COLORS)]) for place, name in enumerate(names)]


def short_name(name: str) -> str:
    """A name that leaves room for the picture: its end, where it is too long."""
    return name if len(name) <= MOST_NAME_CHARACTERS else "…" + name[1 - MOST_NAME_CHARACTERS :]


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=FONT_POINTS, colors=TEXT_COLOR)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=FONT_POINTS, color=TEXT_COLOR)
    return figure, axes


def _legend(axes: Any, names: Sequence[str]) -> None:
    columns = min(len(names), 2 if any(len(name) > LONG_NAME_CHARACTERS for name in names) else 3)
    # Of the whole picture: long names beside the axes leave those little room.
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=FONT_POINTS - 1,
    )


def _tokens(value: float) -> str:
    size = 1024
    return f"{value / size:.0f} K" if value >= size else f"{value:.0f}"


def _words(name: str) -> str:
    return name.replace("_", " ")
