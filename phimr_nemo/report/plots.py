"""The report's pictures, as PNG: accuracy per stage, training losses, reward and length, the data funnel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

from phimr_nemo.errors import UserError
from phimr_nemo.report.data_figures import COLORS, FONT_POINTS, short_name
from phimr_nemo.report.picture import BAR_COLOR, BAR_WIDTH, TEXT_COLOR, labelled_bars, save_png, tidy
from phimr_nemo.store.runs import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from phimr_nemo.report.scores import Row

DPI: Final = 120
PAGE_DPI: Final = 200
MOST_NAMED: Final = 8
HEIGHT_INCHES: Final = 3.6
INCHES_PER_BAR: Final = 1.1
INCHES_PER_PANEL: Final = 3.6
INCHES_PER_STEP: Final = 0.42
NARROWEST_INCHES: Final = 5.0
LINE_COLOR: Final = "#4c78a8"
HEADROOM: Final = 1.15


@dataclass(frozen=True)
class Curve:
    """A metric over training steps; both sequences have one length."""

    steps: Sequence[int]
    values: Sequence[float]


def read_curve(run_directory: Path, metric: str) -> Curve:
    """A metric of a run directory, as its `metrics.jsonl` has it; steps without it are left out.

    Raises:
        UserError: no line of the run holds the metric.
    """
    points = [(row["step"], row[metric]) for row in read_metrics(run_directory) if metric in row]
    if not points:
        raise UserError(
            f"{run_directory / METRICS_FILE} has no metric {metric!r}",
            rule="a curve needs at least one logged value",
            remedy="give the directory of a training run, and a metric that it logs",
        )
    return Curve([step for step, _ in points], [value for _, value in points])


def plot_accuracy(rows: Sequence[Row], path: Path) -> None:
    """pass@1 per stage in per cent, with one standard error: across seeds where there are several."""
    figure = Figure(figsize=(max(NARROWEST_INCHES, INCHES_PER_BAR * len(rows)), HEIGHT_INCHES))
    axes = figure.subplots()
    heights = [100 * row.pass1 for row in rows]
    errors = [100 * _shown_error(row) for row in rows]
    axes.bar(range(len(rows)), heights, BAR_WIDTH, color=BAR_COLOR, yerr=errors, capsize=4, ecolor=TEXT_COLOR)
    for index, (height, error) in enumerate(zip(heights, errors, strict=True)):
        axes.annotate(
            f"{height:.1f}",
            (index, height + error),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=TEXT_COLOR,
        )
    tops = [height + error for height, error in zip(heights, errors, strict=True)]
    axes.set_ylim(0, max(1.0, *tops) * HEADROOM)
    axes.set_xticks(range(len(rows)), [_wrapped(row.row) for row in rows])
    axes.set_ylabel("pass@1 (%)")
    seeds = max((len(row.seeds) for row in rows), default=0)
    unit = f"across {seeds} seeds" if seeds > 1 else "clustered by question"
    axes.set_title(f"Accuracy per stage\n(bars: one standard error, {unit})", fontsize=10)
    tidy(axes)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def draw_scores(rows: Sequence[Row], path: Path) -> None:
    """pass@1 per model in per cent as lying bars, which a phone shows as well; errors as :func:`plot_accuracy`."""
    figure = Figure(figsize=(NARROWEST_INCHES, 1.0 + INCHES_PER_STEP * len(rows)), layout="constrained")
    axes = figure.subplots()
    heights = [100 * row.pass1 for row in rows]
    errors = [100 * _shown_error(row) for row in rows]
    axes.barh(range(len(rows)), heights, BAR_WIDTH, color=BAR_COLOR, xerr=errors, capsize=3, ecolor=TEXT_COLOR)
    for place, (height, error) in enumerate(zip(heights, errors, strict=True)):
        axes.annotate(
            f"{height:.1f}",
            (height + error, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=TEXT_COLOR,
        )
    axes.set_yticks(range(len(rows)), [short_name(row.row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, *(height + error for height, error in zip(heights, errors, strict=True))) * HEADROOM)
    seeds = max((len(row.seeds) for row in rows), default=0)
    unit = f"over {seeds} seeds" if seeds > 1 else "clustered by question"
    # Beneath the whole picture: names of models leave the axis little room.
    figure.supxlabel(f"pass@1 (%) ± one standard error,\n{unit}", fontsize=FONT_POINTS, color=TEXT_COLOR)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    save_png(figure, path, dpi=PAGE_DPI)


def draw_curves(curves: Mapping[str, Curve], name: str, path: Path) -> None:
    """A metric over the steps of one or several runs, named where they are several."""
    figure = Figure(figsize=(NARROWEST_INCHES, HEIGHT_INCHES), layout="constrained")
    axes = figure.subplots()
    for place, (run, curve) in enumerate(curves.items()):
        marker = "o" if len(curve.steps) == 1 else None
        color = COLORS[place % len(COLORS)]
        axes.plot(curve.steps, curve.values, color=color, linewidth=1.3, marker=marker, label=short_name(run))
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    if 1 < len(curves) <= MOST_NAMED:
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False, fontsize=FONT_POINTS - 1)
    tidy(axes)
    save_png(figure, path, dpi=PAGE_DPI)


def plot_losses(curves: Mapping[str, Curve], path: Path) -> None:
    """Training loss of each stage over its steps; a panel each, because the losses have different scales."""
    _plot_panels({f"{short_name(stage)}: loss": curve for stage, curve in curves.items()}, path)


def plot_reward_and_length(reward: Curve, length: Curve, path: Path) -> None:
    """Mean reward and mean response length (tokens) over the steps of reinforcement learning."""
    _plot_panels({"mean reward": reward, "mean response length (tokens)": length}, path)


def plot_funnel(counts: Mapping[str, int], path: Path) -> None:
    """How many records there are after each data step, from first to last."""
    names, values = list(counts), list(counts.values())
    height = max(HEIGHT_INCHES / 2, 1.0 + INCHES_PER_STEP * len(names))
    figure = Figure(figsize=(1.5 * NARROWEST_INCHES, height))
    axes = figure.subplots()
    labelled_bars(axes, names, values, [f"{value:,}" for value in values])
    axes.set_title("Records after each data step", fontsize=10)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def _plot_panels(curves: Mapping[str, Curve], path: Path) -> None:
    count = max(1, len(curves))
    figure = Figure(figsize=(max(NARROWEST_INCHES, INCHES_PER_PANEL * count), HEIGHT_INCHES))
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, (title, curve) in zip(panels, curves.items(), strict=False):
        marker = "o" if len(curve.steps) == 1 else None
        axes.plot(curve.steps, curve.values, color=LINE_COLOR, linewidth=1.4, marker=marker)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        tidy(axes)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def _shown_error(row: Row) -> float:
    error = row.seed_stderr if len(row.seeds) > 1 else row.question_stderr
    return 0.0 if math.isnan(error) else error


def _wrapped(name: str) -> str:
    return name.replace(" ", "\n")
