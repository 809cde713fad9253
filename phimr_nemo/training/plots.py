"""The pictures of training runs, from their metrics; what a curve is called stands in the table of metrics.

Supervised: loss, throughput and scores. DPO: what moves the loss, and where the probability goes. GRPO and
distillation: everything by which instability shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.metrics import PASS_RATE_NAMES, Metric, Stage, metrics_of

SUPERVISED_PLOT_FILE: Final = "training.png"
DPO_PLOT_FILE: Final = "dpo.png"
ROUNDS_PLOT_FILE: Final = "{stage}.png"
COLUMNS: Final = 3
GRPO_COLUMNS: Final = 4
PANEL_INCHES: Final = (3.6, 2.6)
DPI: Final = 110
COLORS: Final = ("#4c78a8", "#e45756")
PASS_RATE_COLORS: Final = ("#b2182b", "#ef8a62", "#fddbc7", "#d1e5f0", "#67a9cf", "#2166ac")
TIME_COLORS: Final = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
WARNING_COLOR: Final = "#d62728"
FONT: Final = 8
LEAST_SPAN: Final = 1e-3
"""The smallest height of an axis of shares: a line of zeros is drawn at the bottom, not in the middle."""

Panels = Mapping[str, Sequence[str]]
"""Title -> metrics."""

SUPERVISED_PANELS: Final = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second_per_gpu", "mfu", "pass1")
DPO_PANELS: Final[Panels] = {
    "loss": ("loss", "val_loss"),
    "reward accuracy": ("accuracy", "val_accuracy"),
    "reward": ("chosen_reward", "rejected_reward"),
    "log-probability (nats per response)": ("chosen_logprob", "rejected_logprob"),
    "drift from the reference (nats per response)": ("kl_to_reference",),
    "margin and length: correlation": ("length_margin_correlation",),
}
GRPO_PANELS: Final[Panels] = {
    "reward": ("reward", "pass1"),
    "groups without a gradient, rollouts kept": ("zero_gradient_groups", "kept"),
    "response length (tokens)": ("response_length",),
    "length spread within a group": ("length_spread",),
    "overlong and repetitive responses": ("truncated", "repetitive"),
    "entropy (nats per token)": ("entropy",),
    "sampling temperature": ("temperature",),
    "clipped tokens": ("clipped_low", "clipped_high"),
    "log-prob gap, sampler to trainer (nats)": ("logprob_gap",),
    "gradient norm": ("grad_norm",),
}
DISTILL_PANELS: Final[Panels] = {
    "reverse KL from the teacher (nats per token)": ("reverse_kl",),
    "correct responses": ("pass_rate", "pass1"),
    **{title: names for title, names in GRPO_PANELS.items() if not {"reward", "kept"} & set(names)},
}
RoundsStage = Literal["grpo", "distill"]
ROUNDS_PANELS: Final[Mapping[RoundsStage, Panels]] = {"grpo": GRPO_PANELS, "distill": DISTILL_PANELS}
"""Beside them stand the groups by pass rate and the time, both stacked."""
GRPO_TIMES: Final = ("sample_seconds", "reward_seconds", "logprob_seconds", "train_seconds")
SHARES: Final = frozenset({"zero_gradient_groups", "kept", "truncated", "repetitive", "clipped_low", "clipped_high"})


def plot_supervised(directory: Path) -> None:
    """Write `training.png` into a run directory: a panel for each metric that it has; nothing without metrics."""
    rows = list(read_metrics(directory))
    known = metrics_of("sft")
    shown = {known[name].title: (name,) for name in SUPERVISED_PANELS if any(name in row for row in rows)}
    if shown:
        save_png(_grid(rows, shown, "sft", columns=len(shown)), directory / SUPERVISED_PLOT_FILE, dpi=DPI)


def plot_dpo(directory: Path) -> Path:
    """Write `dpo.png` into a run directory and return its path.

    Args:
        directory: the run, with its `metrics.jsonl`.
    """
    path = directory / DPO_PLOT_FILE
    save_png(_grid(list(read_metrics(directory)), DPO_PANELS, "dpo", columns=COLUMNS), path, dpi=DPI)
    return path


def _grid(rows: Sequence[Mapping[str, float]], panels: Panels, stage: Stage, *, columns: int) -> Figure:
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(columns * PANEL_INCHES[0], lines * PANEL_INCHES[1]))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        _lines(axes, rows, _known(stage, names))
        _finish(axes, title)
    figure.tight_layout()
    return figure


def _known(stage: Stage, names: Sequence[str]) -> list[Metric]:
    known = metrics_of(stage)
    return [known[name] for name in names]


def plot_rounds(directory: Path, collapses: Mapping[str, int], stage: RoundsStage) -> Path:
    """Write the dashboard of a run of rounds into its directory: `grpo.png` or `distill.png`.

    Args:
        directory: the run, with its `metrics.jsonl`; metrics that it lacks leave their panel empty.
        collapses: kind -> step of the warnings so far; each is a dashed line through every panel.
        stage: whose panels.

    Returns:
        The picture.
    """
    rows = list(read_metrics(directory))
    lines = -(-(len(ROUNDS_PANELS[stage]) + 2) // GRPO_COLUMNS)
    figure = Figure(figsize=(GRPO_COLUMNS * PANEL_INCHES[0], lines * PANEL_INCHES[1]))
    panels = iter(figure.subplots(lines, GRPO_COLUMNS, squeeze=False).flat)
    (reward_title, reward), *others = ROUNDS_PANELS[stage].items()
    axes = next(panels)
    _lines(axes, rows, _known(stage, reward))
    _finish(axes, reward_title)
    axes = next(panels)
    _stack(axes, rows, _known(stage, PASS_RATE_NAMES), PASS_RATE_COLORS)
    _finish(axes, "groups by share of correct responses")
    for title, names in others:
        axes = next(panels)
        _lines(axes, rows, _known(stage, names))
        _finish(axes, title)
    axes = next(panels)
    _stack(axes, rows, _known(stage, GRPO_TIMES), TIME_COLORS)
    _finish(axes, "seconds per step")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(rows) > 1:
            axes.set_xlim(rows[0]["step"], rows[-1]["step"])  # a panel may begin or end with nothing
        for step in collapses.values():
            axes.axvline(step, color="black", linewidth=0.9, linestyle="--")
    found = ", ".join(f"{kind} at step {step}" for kind, step in collapses.items())
    figure.suptitle(
        f"warnings: {found}" if found else f"{len({row['step'] for row in rows})} steps, no warning",
        fontsize=10,
        color=WARNING_COLOR if found else "black",
    )
    figure.tight_layout()
    path = directory / ROUNDS_PLOT_FILE.format(stage=stage)
    save_png(figure, path, dpi=DPI)
    return path


def _lines(axes: Any, rows: Sequence[Mapping[str, float]], metrics: Sequence[Metric]) -> None:
    """A line for each metric, over the steps that have it."""
    for color, metric in zip(COLORS, metrics, strict=False):
        points = [(row["step"], row[metric.name]) for row in rows if metric.name in row]
        if points:
            marker = "o" if len(points) == 1 else None
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linewidth=1.2,
                marker=marker,
                label=metric.title or metric.name,
            )
    if SHARES.issuperset(metric.name for metric in metrics):
        axes.set_ylim(bottom=0.0, top=max(axes.get_ylim()[1], LEAST_SPAN))
    if len(axes.lines) > 1:
        axes.legend(fontsize=FONT, frameon=False)


def _stack(axes: Any, rows: Sequence[Mapping[str, float]], metrics: Sequence[Metric], colors: Sequence[str]) -> None:
    """Metrics that add up to a whole, one upon the other."""
    names = [metric.name for metric in metrics]
    whole = [row for row in rows if all(name in row for name in names)]
    if not whole:
        return
    steps = [row["step"] for row in whole]
    values = [[row[name] for row in whole] for name in names]
    axes.stackplot(steps, values, labels=[metric.title for metric in metrics], colors=colors)
    axes.legend(fontsize=FONT - 2, ncols=2, loc="lower left", framealpha=0.7, handlelength=1.0)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=FONT + 1)
    axes.set_xlabel("step", fontsize=FONT)
    tidy(axes)
    axes.tick_params(labelsize=FONT)
