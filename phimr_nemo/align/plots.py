"""The picture of a DPO run, from its metrics: what moves the loss, and where the probability goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from phimr_nemo.picture import save_png, tidy
from phimr_nemo.runs import read_metrics

PLOT_FILE: Final = "dpo.png"
COLUMNS: Final = 3
PANEL_INCHES: Final = (3.6, 2.6)
DPI: Final = 110
COLORS: Final = ("#4c78a8", "#e45756")
PANELS: Final[Mapping[str, Mapping[str, str]]] = {
    "loss": {"loss": ""},
    "accuracy": {"accuracy": ""},
    "reward": {"chosen_reward": "chosen", "rejected_reward": "rejected"},
    "log-probability (nats a response)": {"chosen_logprob": "chosen", "rejected_logprob": "rejected"},
    "drift from the reference (nats)": {"kl_to_reference": "a response"},
    "margin and length: correlation": {"length_margin_correlation": ""},
}
"""Title -> metric -> its name in the legend."""


def plot_dpo(directory: Path) -> Path:
    """Write `dpo.png` into a run directory.

    Args:
        directory: the run, with its `metrics.jsonl`.

    Returns:
        The picture.
    """
    rows = list(read_metrics(directory))
    steps = [row["step"] for row in rows]
    lines = -(-len(PANELS) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], lines * PANEL_INCHES[1]))
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes, (title, metrics) in zip(grid.flat, PANELS.items(), strict=False):
        for color, (metric, label) in zip(COLORS, metrics.items(), strict=False):
            axes.plot(steps, [row[metric] for row in rows], color=color, linewidth=1.2, label=label or None)
        if any(metrics.values()):
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        tidy(axes)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    path = directory / PLOT_FILE
    save_png(figure, path, dpi=DPI)
    return path
