"""What the ablations of GRPO share: the step of an arm, figures of stability, curves with a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.runs import RunDirectory, read_metrics
from recipes.ablations.common import stage_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
"""The lines of one run's metrics.jsonl."""

WINDOW: Final = 5
"""Steps of a moving mean."""
GRADIENT: Final = "gradient norm"
SPIKE: Final = "largest / median gradient norm"
ENTROPY: Final = "entropy (nats a token)"
SPREAD: Final = "length spread in a group"
ZERO: Final = "groups without gradient (%)"
JITTER: Final = "step-to-step change of the pass rate, standard deviation (points)"
DROP: Final = "worst drop of the pass rate (points)"
DIGITS: Final[Mapping[str, int]] = {GRADIENT: 3, SPIKE: 1, ENTROPY: 4, SPREAD: 4, ZERO: 1, JITTER: 2, DROP: 2}
PANELS: Final[Mapping[str, str]] = {
    "pass_rate": "pass rate of the rollouts",
    "entropy": "entropy (nats a token)",
    "zero_gradient_groups": "share of groups without gradient",
    "length_spread": "length spread in a group",
    "grad_norm": "gradient norm",
    "temperature": "temperature",
}
PLOT_INCHES: Final = (11.0, 5.6)
COLUMNS: Final = 3
DPI: Final = 110
FINISH: Final = "run the ablation again; it continues where it was"


def grpo_step(out: Path, seed: int, root: Path, arm: str, steps: int, *overrides: str) -> Step:
    """`out/<arm>`: GRPO with conf/grpo/tiny.yaml from the DPO model and the prompts of a finished quickstart.

    Args:
        out: the seed's directory of the ablation.
        seed: of the run.
        root: the seed's directory of the quickstart.
        arm: name of the step.
        steps: rounds.
        overrides: the arm's own settings.
    """
    start = (f"base={root / 'dpo' / 'hf'}", f"prompts={root / 'preferences' / 'prompts'}", f"steps={steps}")
    return stage_step(out, seed, arm, "grpo", *start, *overrides)


def finished_rows(run: Path) -> Rows:
    """The metrics of a finished run.

    Raises:
        UserError: it has not finished.
    """
    if not RunDirectory(run).is_done:
        raise UserError(f"{run} has not finished", rule="the report reads finished runs", remedy=FINISH)
    return list(read_metrics(run))


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over each value and up to `window` - 1 before it."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def worst_drop(values: Sequence[float], window: int) -> float:
    """How far the mean over `window` values falls at most below the best such mean before it; 0 if it never falls."""
    means = [fmean(values[end - window : end]) for end in range(window, len(values) + 1)]
    best, worst = means[0], 0.0
    for mean in means:
        best = max(best, mean)
        worst = max(worst, best - mean)
    return worst


def figures(rows: Rows) -> dict[str, float]:
    """What a run says of its stability; means are over its steps.

    The pass rate stands for the reward, of which it is an affine function, so that runs with other rewards compare.
    Its change from step to step holds the luck of drawing prompts and samples as well: 64 prompts a step alone give
    some points.

    Args:
        rows: at least `WINDOW` steps.
    """
    gradients = [row["grad_norm"] for row in rows if "grad_norm" in row]
    rates = [100 * row["pass_rate"] for row in rows]
    found = {
        ENTROPY: fmean(row["entropy"] for row in rows),
        SPREAD: fmean(row["length_spread"] for row in rows),
        ZERO: 100 * fmean(row["zero_gradient_groups"] for row in rows),
        JITTER: stdev(after - before for before, after in pairwise(rates)),
        DROP: worst_drop(rates, WINDOW),
    }
    if gradients:
        found |= {GRADIENT: fmean(gradients), SPIKE: max(gradients) / median(gradients)}
    return found


def figures_by_seed(runs: Sequence[Rows]) -> dict[str, list[float]]:
    """:func:`figures` of each seed's run; a figure that one of them lacks is left out."""
    each = [figures(rows) for rows in runs]
    return {name: [found[name] for found in each] for name in DIGITS if all(name in found for found in each)}


def agreement(first: Rows, second: Rows) -> tuple[int, float]:
    """How long two runs do the same.

    Returns:
        The steps before the first at which their pass rates differ, and the largest relative difference of their
        gradient norms over these steps.
    """
    same, largest = 0, 0.0
    for one, other in zip(first, second, strict=False):
        if one["pass_rate"] != other["pass_rate"]:
            break
        same += 1
        if one.get("grad_norm"):
            largest = max(largest, abs(other["grad_norm"] / one["grad_norm"] - 1))
    return same, largest


def plot_curves(runs: Mapping[str, Sequence[Rows]], path: Path) -> None:
    """A line an arm: mean over seeds of the moving means, with a band of one standard error where seeds are several.

    Args:
        runs: arm -> the rows of each seed's run.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    lines = -(-len(PANELS) // COLUMNS)
    figure = Figure(figsize=PLOT_INCHES)
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes, (metric, title) in zip(grid.flat, PANELS.items(), strict=False):
        for number, (arm, seeds) in enumerate(runs.items()):
            _band(axes, [[row for row in rows if metric in row] for rows in seeds], metric, f"C{number}", arm)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        tidy(axes)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="lower center", ncols=min(len(runs), 7))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save_png(figure, path, dpi=DPI)


def _band(axes: Axes, seeds: Sequence[Rows], metric: str, color: str, label: str) -> None:
    from phimr_nemo.evaluate.statistics import mean_and_error

    smooth = [
        dict(zip([row["step"] for row in rows], moving_mean([row[metric] for row in rows], WINDOW), strict=True))
        for rows in seeds
    ]
    steps = [step for step in smooth[0] if all(step in values for values in smooth)]
    each = [mean_and_error([values[step] for values in smooth]) for step in steps]
    means = [mean for mean, _ in each]
    axes.plot(steps, means, color=color, linewidth=1.2, label=label)
    if len(seeds) > 1:
        low = [mean - error for mean, error in each]
        high = [mean + error for mean, error in each]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
