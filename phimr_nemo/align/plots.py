"""The pictures of alignment runs, from their metrics.

DPO: what moves the loss, and where the probability goes. GRPO: everything by which instability shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.training.metrics import PASS_RATE_NAMES

PLOT_FILE: Final = "dpo.png"
COLUMNS: Final = 3
PANEL_INCHES: Final = (3.6, 2.6)
DPI: Final = 110
COLORS: Final = ("#4c78a8", "#e45756")
DPO_PANELS: Final[Mapping[str, Mapping[str, str]]] = {
    "loss": {"loss": ""},
    "accuracy": {"accuracy": ""},
    "reward": {"chosen_reward": "chosen", "rejected_reward": "rejected"},
    "log-probability (nats a response)": {"chosen_logprob": "chosen", "rejected_logprob": "rejected"},
    "drift from the reference (nats)": {"kl_to_reference": "a response"},
    "margin and length: correlation": {"length_margin_correlation": ""},
}
"""Title -> metric -> its name in the legend."""

GRPO_PLOT_FILE: Final = "grpo.png"
GRPO_COLUMNS: Final = 4
GRPO_PANELS: Final[Mapping[str, Mapping[str, str]]] = {
    "reward": {"reward": ""},
    "groups without a gradient, rollouts kept": {"zero_gradient_groups": "groups without", "kept": "rollouts kept"},
    "response length (tokens)": {"response_length": ""},
    "length spread within a group": {"length_spread": ""},
    "overlong and repetitive responses": {"truncated": "hit the limit", "repetitive": "repeat themselves"},
    "entropy (nats a token)": {"entropy": ""},
    "sampling temperature": {"temperature": ""},
    "clipped tokens": {"clipped_low": "low side", "clipped_high": "high side"},
    "log-prob gap, sampler to trainer (nats)": {"logprob_gap": ""},
    "gradient norm": {"grad_norm": ""},
}
"""The same; beside them stand the groups by pass rate and the time, both stacked."""
SHARES: Final = frozenset({"zero_gradient_groups", "kept", "truncated", "repetitive", "clipped_low", "clipped_high"})
TIMES: Final[Mapping[str, str]] = {
    "sample_seconds": "sample",
    "reward_seconds": "reward",
    "logprob_seconds": "log-probs",
    "train_seconds": "train",
}
PASS_RATE_LABELS: Final = ("none right", "to 1/4", "to 1/2", "to 3/4", "below all", "all right")
PASS_RATE_COLORS: Final = ("#b2182b", "#ef8a62", "#fddbc7", "#d1e5f0", "#67a9cf", "#2166ac")
TIME_COLORS: Final = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
WARNING_COLOR: Final = "#d62728"
FONT: Final = 8
LEAST_SPAN: Final = 1e-3
"""The smallest height of an axis of shares: a line of zeros is drawn at the bottom, not in the middle."""


def plot_dpo(directory: Path) -> Path:
    """Write `dpo.png` into a run directory.

    Args:
        directory: the run, with its `metrics.jsonl`.

    Returns:
        The picture.
    """
    rows = list(read_metrics(directory))
    lines = -(-len(DPO_PANELS) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], lines * PANEL_INCHES[1]))
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes, (title, metrics) in zip(grid.flat, DPO_PANELS.items(), strict=False):
        _lines(axes, rows, metrics)
        _finish(axes, title)
    figure.tight_layout()
    path = directory / PLOT_FILE
    save_png(figure, path, dpi=DPI)
    return path


def plot_grpo(directory: Path, collapses: Mapping[str, int]) -> Path:
    """Write the dashboard `grpo.png` into a run directory.

    Args:
        directory: the run, with its `metrics.jsonl`; metrics that it lacks leave their panel empty.
        collapses: kind -> step of the warnings so far; each is a dashed line through every panel.

    Returns:
        The picture.
    """
    rows = list(read_metrics(directory))
    lines = -(-(len(GRPO_PANELS) + 2) // GRPO_COLUMNS)
    figure = Figure(figsize=(GRPO_COLUMNS * PANEL_INCHES[0], lines * PANEL_INCHES[1]))
    panels = iter(figure.subplots(lines, GRPO_COLUMNS, squeeze=False).flat)
    (reward_title, reward), *others = GRPO_PANELS.items()
    axes = next(panels)
    _lines(axes, rows, reward)
    _finish(axes, reward_title)
    axes = next(panels)
    _stack(axes, rows, dict(zip(PASS_RATE_NAMES, PASS_RATE_LABELS, strict=True)), PASS_RATE_COLORS)
    _finish(axes, "groups by share of right responses")
    for title, metrics in others:
        axes = next(panels)
        _lines(axes, rows, metrics)
        _finish(axes, title)
    axes = next(panels)
    _stack(axes, rows, TIMES, TIME_COLORS)
    _finish(axes, "seconds a step")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(rows) > 1:
            axes.set_xlim(rows[0]["step"], rows[-1]["step"])  # a panel may begin or end with nothing
        for step in collapses.values():
            axes.axvline(step, color="black", linewidth=0.9, linestyle="--")
    found = ", ".join(f"{kind} at step {step}" for kind, step in collapses.items())
    figure.suptitle(
        f"warnings: {found}" if found else f"{len(rows)} steps, no warning",
        fontsize=10,
        color=WARNING_COLOR if found else "black",
    )
    figure.tight_layout()
    path = directory / GRPO_PLOT_FILE
    save_png(figure, path, dpi=DPI)
    return path


def _lines(axes: Any, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, str]) -> None:
    """A line for each metric, over the steps that have it."""
    for color, (metric, label) in zip(COLORS, metrics.items(), strict=False):
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=label or None)
    if SHARES.issuperset(metrics):
        axes.set_ylim(bottom=0.0, top=max(axes.get_ylim()[1], LEAST_SPAN))
    if any(metrics.values()) and axes.lines:
        axes.legend(fontsize=FONT, frameon=False)


def _stack(axes: Any, rows: Sequence[Mapping[str, float]], metrics: Mapping[str, str], colors: Sequence[str]) -> None:
    """Metrics that add up to a whole, one upon the other."""
    whole = [row for row in rows if all(metric in row for metric in metrics)]
    if not whole:
        return
    steps = [row["step"] for row in whole]
    values = [[row[metric] for row in whole] for metric in metrics]
    axes.stackplot(steps, values, labels=list(metrics.values()), colors=colors)
    axes.legend(fontsize=FONT - 2, ncols=2, loc="lower left", framealpha=0.7, handlelength=1.0)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=FONT + 1)
    axes.set_xlabel("step", fontsize=FONT)
    tidy(axes)
    axes.tick_params(labelsize=FONT)
