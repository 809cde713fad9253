"""Pictures: nothing reaches over the edge, whatever the names; right and wrong have colours of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from phimr_nemo.data.curate.shape import LENGTH_BINS, TIERS
from phimr_nemo.report import data_figures, plots
from phimr_nemo.report.data_figures import VERDICT_COLORS
from phimr_nemo.report.plots import Curve
from phimr_nemo.report.scores import Entry, Row, paper_table

EDGE_INCHES = 0.01
SHORT = ("base", "SFT")
LONG = ("base", "mid-training", "SFT", "SFT without mid-training", "a model of mine with a name that goes on and on")
Draw = Callable[[Path], None]


def rows(names: tuple[str, ...], seeds: int) -> list[Row]:
    return paper_table([Entry(name, seed, 10, 0.99, 0.1) for name in names for seed in range(seeds)])


def lengths(names: tuple[str, ...]) -> dict[str, Any]:
    counts = np.zeros(LENGTH_BINS, np.int64)
    counts[4:30] = 123_456
    return dict.fromkeys(names, counts)


def tiers(names: tuple[str, ...]) -> dict[str, Any]:
    return dict.fromkeys(names, np.arange(1, len(TIERS) + 1))


def curve(steps: int) -> Curve:
    return Curve(list(range(steps)), [1e-5 * step for step in range(steps)])


PICTURES: dict[str, Callable[[tuple[str, ...]], Draw]] = {
    "scores, one seed": lambda names: lambda path: plots.draw_scores(rows(names, 1), path),
    "scores, three seeds": lambda names: lambda path: plots.draw_scores(rows(names, 3), path),
    "accuracy, one seed": lambda names: lambda path: plots.plot_accuracy(rows(names, 1), path),
    "accuracy, three seeds": lambda names: lambda path: plots.plot_accuracy(rows(names, 3), path),
    "curves": lambda names: lambda path: plots.draw_curves(dict.fromkeys(names, curve(9)), "mean reward", path),
    "one point": lambda names: lambda path: plots.plot_losses(dict.fromkeys(names, curve(1)), path),
    "losses": lambda names: lambda path: plots.plot_losses(dict.fromkeys(names, curve(12_345)), path),
    "reward": lambda _: lambda path: plots.plot_reward_and_length(curve(5), curve(5), path),
    "funnel of a seed": lambda names: lambda path: plots.plot_funnel(dict.fromkeys(names, 12_345_678), path),
    "funnel": lambda names: lambda path: data_figures.draw_funnel(dict.fromkeys(names, 12_345_678), path),
    "lengths": lambda names: lambda path: data_figures.draw_lengths(lengths(names), path, stacked=False),
    "verdicts": lambda _: lambda path: data_figures.draw_lengths(lengths(tuple(VERDICT_COLORS)), path, stacked=True),
    "difficulty": lambda names: lambda path: data_figures.draw_difficulty(tiers(names), path),
    "pass rates": lambda _: lambda path: data_figures.draw_pass_rates(np.array([0.5]), np.array([True]), path),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    figures: list[Figure] = []
    write = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        write(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize("names", [SHORT, LONG], ids=["short names", "long names"])
@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_is_cut(picture: str, names: tuple[str, ...], drawn: list[Figure], tmp_path: Path) -> None:
    PICTURES[picture](names)(tmp_path / "x.png")
    (figure,) = drawn
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert box.xmin >= -EDGE_INCHES
    assert box.ymin >= -EDGE_INCHES
    assert box.xmax <= width + EDGE_INCHES
    assert box.ymax <= height + EDGE_INCHES


@pytest.mark.parametrize(
    "verdicts", [("correct", "wrong"), ("wrong", "unparsable", "correct"), ("correct", "wrong", "error")]
)
def test_a_verdict_has_its_colour_whatever_stands_beside_it(
    verdicts: tuple[str, ...], drawn: list[Figure], tmp_path: Path
) -> None:
    data_figures.draw_lengths(lengths(verdicts), tmp_path / "x.png", stacked=True)
    (axes,) = drawn[0].axes
    handles, labels = axes.get_legend_handles_labels()
    patches = [handle for handle in handles if isinstance(handle, Patch)]
    assert {label: to_hex(patch.get_facecolor()) for label, patch in zip(labels, patches, strict=True)} == {
        verdict: VERDICT_COLORS[verdict] for verdict in verdicts
    }
    red, green, blue = (int(VERDICT_COLORS["wrong"][start : start + 2], 16) for start in (1, 3, 5))
    assert red > 2 * max(green, blue)
