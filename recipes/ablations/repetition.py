"""Ablation: repetition or scale? Size of the mid-training set x width of the model, at equal updates.

    python -m recipes.ablations.repetition quickstarts=[runs/quickstart] output=runs/ablation-repetition

Few samples over many epochs beat many samples once in a report on supervised training (arXiv 2602.11149); the paper
calls its 1.6 M mid-training samples essential. Here every set is trained on for the same number of updates, so that a
smaller one is repeated more often, at several widths: whether capacity decides between data and repetition. The sets
are clean (verified solutions of generated problems), and every model begins with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from phimr_nemo.config.ablations import RepetitionConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.atomic import atomic_write_text, write_json
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    evaluation_step,
    measures_markdown,
    seed_directories,
    stage_step,
)
from recipes.ablations.midtrain_scaling import (
    DIGITS,
    DOCUMENTS,
    LOSS,
    PASS1,
    WHOLE,
    arm_measures,
    data_steps,
    fixed_updates,
    rows_of,
)

TINY: Final = "conf/ablations/repetition.yaml"
NEEDED: Final = ("base", "rows")
PICTURE: Final = "ablation-repetition.png"
JSON_FILE: Final = "repetition.json"
LEVELS: Final = 8
"""Of a contour plot."""
PICTURE_INCHES: Final = (10.5, 3.8)
DPI: Final = 110


def sizes(config: RepetitionConfig) -> list[str]:
    """Every set, from the smallest to the whole one."""
    return [*map(str, sorted(config.problems)), WHOLE]


def plan(config: RepetitionConfig) -> list[Step]:
    """Every command of the ablation, seed by seed.

    Raises:
        UserError: see :func:`recipes.ablations.common.seed_directories`.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [step for seed, root in roots.items() for step in _seed_steps(config, seed, root)]


def _seed_steps(config: RepetitionConfig, seed: int, root: Path) -> list[Step]:
    out = config.output / f"seed-{seed}"
    steps = data_steps(out, seed, root, config.problems, config.heldout_documents)
    asked = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    for width, settings in config.widths.items():
        base = f"base-{width}"
        steps.append(stage_step(out, seed, base, "base", *settings))
        for size in sizes(config):
            name, data = f"{width}-{size}", f"data={rows_of(out, root, size)}"
            steps += [
                stage_step(
                    *(out, seed, name, "midtrain", f"base={out / base / 'hf'}", data, "validation_rows=0"),
                    *fixed_updates(config.updates),
                ),
                evaluation_step(out, seed, name, out / name / "hf", **asked),
            ]
    return steps


def report(config: RepetitionConfig) -> str:
    """Write the table (markdown, JSON) and the picture; returns the table in markdown.

    Raises:
        UserError: an arm is not finished.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for width in config.widths:
        for size in sizes(config):
            cell = cells.setdefault((width, size), {measure: [] for measure in DIGITS})
            for seed, root in roots.items():
                out, name = config.output / f"seed-{seed}", f"{width}-{size}"
                found = arm_measures(out / name, out / f"evaluate-{name}", rows_of(out, root, size), out)
                for measure, value in found.items():
                    cell[measure].append(value)
    table = {_title(width, size): cell for (width, size), cell in cells.items()}
    write_json(config.output / JSON_FILE, {"seeds": list(roots), "table": table})
    text = measures_markdown("model and set", table, DIGITS, list(roots))
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    _plot(list(config.widths), sizes(config), cells, config.output / PICTURE)
    return text


def _title(width: str, size: str) -> str:
    return f"{width}, " + ("whole set" if size == WHOLE else f"{int(size):,} problems")


def _plot(
    widths: Sequence[str],
    sets: Sequence[str],
    cells: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    path: Path,
) -> None:
    """pass@1 and held-out loss over documents and width, each point with its mean and standard error over seeds."""
    import math

    from matplotlib.figure import Figure

    from phimr_nemo.evaluate.statistics import mean_and_error

    figure = Figure(figsize=PICTURE_INCHES)
    documents = [mean_and_error(cells[widths[0], size][DOCUMENTS])[0] for size in sets]
    places = [math.log(count) for count in documents]
    for axes, (measure, colours) in zip(
        figure.subplots(1, 2), ((PASS1, "viridis"), (LOSS, "viridis_r")), strict=True
    ):
        found = [[mean_and_error(cells[width, size][measure]) for size in sets] for width in widths]
        means = [[mean for mean, _ in row] for row in found]
        filled = axes.contourf(places, range(len(widths)), means, levels=LEVELS, cmap=colours, alpha=0.75)
        figure.colorbar(filled, ax=axes).ax.tick_params(labelsize=7)
        for height, row in enumerate(found):
            for place, (mean, error) in zip(places, row, strict=True):
                axes.plot(place, height, ".", color="black", clip_on=False)
                axes.annotate(
                    f"{mean:.{DIGITS[measure]}f}\n± {error:.{DIGITS[measure]}f}",
                    (place, height),
                    xytext=(0, 4 if height < len(widths) - 1 else -4),
                    textcoords="offset points",
                    ha={places[0]: "left", places[-1]: "right"}.get(place, "center"),
                    va="bottom" if height < len(widths) - 1 else "top",
                    fontsize=7,
                    bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
                )
        axes.set_xticks(places, [f"{count:,.0f}" for count in documents], fontsize=8)
        axes.set_yticks(range(len(widths)), widths, fontsize=8)
        axes.set_xlabel("documents in the mid-training set", fontsize=8)
        axes.set_title(f"{measure} ± SE (across seeds)", fontsize=9)
        tidy(axes)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def main(config: RepetitionConfig) -> None:
    """Repetition or scale: the size of the mid-training set and the width of the model, at equal updates."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(RepetitionConfig, TINY, main)()
