"""What the ablations share: finished quickstarts by seed, steps of `phimr`, paired differences, the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from phimr_nemo.config import load_config
from phimr_nemo.errors import UserError, exit_with_message
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.report.picture import save_png
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.runs import RunDirectory

Config = TypeVar("Config")
Differences = Mapping[str, Sequence[tuple[float, float]]]
"""What is compared -> each seed's mean difference and its standard error (over questions, in per cent)."""
Measures = Mapping[str, Mapping[str, Sequence[float]]]
"""Row -> measure -> one value a seed, in the unit that is shown."""

TABLE_MARKDOWN: Final = "table.md"
"""What an ablation found, in its output directory."""
PLOT_WIDTH: Final = 7.5
PLOT_MARGIN: Final = 1.1
PLOT_ROW: Final = 0.7
"""Inches: the picture's width, what axis and legend take, and the height of a comparison."""
DPI: Final = 110
LONGEST_LEGEND: Final = 4
SEED_OFFSET: Final = 0.16
"""Between the lines of two seeds, in rows."""
POINTS: Final = "difference of pass@1, paired by question (points)"
AXIS: Final = (
    "difference of pass@1 in points, paired by question\n"
    "(bars: one standard error; a seed's over questions, the mean's over seeds)"
)


def seed_directories(quickstarts: Sequence[Path], *, needed: Sequence[str]) -> dict[int, Path]:
    """The finished quickstart of each seed, ascending.

    Args:
        quickstarts: output directories of `phimr quickstart`.
        needed: the steps that must have finished.

    Raises:
        UserError: a seed twice, none at all, or one with an unfinished step among `needed`.
    """
    found: dict[int, Path] = {}
    for quickstart in quickstarts:
        for root in sorted(filter(Path.is_dir, quickstart.glob("seed-*"))):  # plots lie beside them
            seed = int(root.name.removeprefix("seed-"))
            unfinished = [name for name in needed if not RunDirectory(root / name).is_done]
            if seed in found or unfinished:
                raise UserError(
                    f"{root} " + (f"has no finished {unfinished}" if unfinished else f"is seed {seed} again"),
                    rule=f"every seed has one quickstart, with {', '.join(needed)} finished",
                    remedy="finish it with `phimr quickstart`, or leave it out of quickstarts=",
                )
            found[seed] = root
    if not found:
        raise UserError(
            f"no seed-* directories in {[str(path) for path in quickstarts]}",
            rule="the ablation starts from finished quickstarts",
            remedy="run `phimr quickstart --seeds 0,1,2 --out runs/quickstart` first",
        )
    return dict(sorted(found.items()))


def stage_step(out: Path, seed: int, name: str, stage: str, *overrides: str, preset: str = "tiny") -> Step:
    """One `phimr` command that writes `out/name`.

    Args:
        out: the seed's directory.
        seed: of the run.
        name: of the step.
        stage: the command.
        overrides: `key=value` items beside output and seed.
        preset: conf/<stage>/<preset>.yaml.
    """
    fixed = (f"run.output={out / name}", f"run.seed={seed}")
    return Step(name, (stage, "--config", f"conf/{stage}/{preset}.yaml", *fixed, *overrides), out / name)


def evaluation_step(out: Path, seed: int, arm: str, model: Path, *, problems: int, samples: int) -> Step:
    """`out/evaluate-<arm>`: the model on held-out problems, the same for every arm of a seed."""
    sizes = (f"problems.count={problems}", f"samples={samples}")
    return stage_step(out, seed, f"evaluate-{arm}", "evaluate", f"model={model}", *sizes)


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """Mean of second minus first over the same questions, and its standard error over them, in per cent.

    Raises:
        UserError: they were asked different questions.
    """
    from phimr_nemo.evaluate.statistics import mean_and_error

    if first.keys() != second.keys():
        raise UserError(
            f"{len(first)} and {len(second)} questions, {len(first.keys() & second.keys())} of them in both",
            rule="two arms of a seed are compared on the same questions",
            remedy="evaluate both with the same problems and seed",
        )
    mean, error = mean_and_error([second[question] - first[question] for question in sorted(first)])
    return 100 * mean, 100 * error


def differences_markdown(
    differences: Differences, seeds: Sequence[int], *, title: str = POINTS, digits: int = 1
) -> str:
    """One line a comparison: mean and standard error over seeds, and each seed's with its own.

    Args:
        differences: see the type.
        seeds: of its values.
        title: what is compared, with its unit.
        digits: after the decimal point.
    """
    from phimr_nemo.evaluate.statistics import mean_and_error

    lines = [
        f"| {title} | mean | SE (across seeds) | "
        + " | ".join(f"seed {seed} (SE, clustered by question)" for seed in seeds)
        + " |",
        "|---|---:|---:|" + "---:|" * len(seeds),
    ]
    for name, each in differences.items():
        mean, error = mean_and_error([value for value, _ in each])
        cells = " | ".join(f"{value:+.{digits}f} ({stderr:.{digits}f})" for value, stderr in each)
        lines.append(f"| {name} | {mean:+.{digits}f} | {error:.{digits}f} | {cells} |")
    return "\n".join(lines) + "\n"


def plot_differences(differences: Differences, seeds: Sequence[int], path: Path, *, axis: str = AXIS) -> None:
    """Each seed's paired difference with its own error, and their mean with its error over seeds."""
    from matplotlib.figure import Figure

    from phimr_nemo.evaluate.statistics import mean_and_error

    figure = Figure(figsize=(PLOT_WIDTH, PLOT_MARGIN + PLOT_ROW * len(differences)))
    axes = figure.subplots()
    axes.axvline(0.0, color="#999999", linewidth=1)
    for place, each in enumerate(differences.values()):
        mean, error = mean_and_error([value for value, _ in each])
        axes.errorbar(
            mean,
            place,
            xerr=error,
            fmt="D",
            color="#333333",
            capsize=5,
            label=None if place else "mean",
        )
        for number, (value, stderr) in enumerate(each):
            label = None if place else f"seed {seeds[number]}"
            height = place + SEED_OFFSET * (number + 1)
            axes.errorbar(
                value, height, xerr=stderr, fmt="o", markersize=4, color=f"C{number}", alpha=0.8, label=label
            )
    axes.set_yticks(
        range(len(differences)), [name.replace(" minus ", "\nminus ") for name in differences], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel(axis, fontsize=8)
    columns = min(len(seeds) + 1, LONGEST_LEGEND)
    axes.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def measures_markdown(first: str, table: Measures, digits: Mapping[str, int], seeds: Sequence[int]) -> str:
    """One line a row: every measure as mean ± standard error over seeds, and each seed's value.

    Args:
        first: title of the rows.
        table: its measures may be absent in a row.
        digits: measure -> digits after the decimal point; the columns in their order.
        seeds: of the values.
    """
    from phimr_nemo.evaluate.statistics import mean_and_error

    lines = [
        f"Mean ± standard error over seeds {', '.join(map(str, seeds))}; in brackets each seed's.",
        "",
        f"| {first} | {' | '.join(digits)} |",
        "|---|" + "---:|" * len(digits),
    ]
    for name, measures in table.items():
        cells = []
        for measure, places in digits.items():
            each = measures.get(measure)
            if each is None:
                cells.append("-")
                continue
            mean, error = mean_and_error(each)
            spread = f" ± {error:.{places}f}" if error > 0 else ""
            values = ", ".join(f"{value:.{places}f}" for value in each)
            cells.append(f"{mean:.{places}f}{spread} ({values})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def publish(
    output: Path,
    title: str,
    table: Measures,
    digits: Mapping[str, int],
    differences: Differences,
    seeds: Sequence[int],
    *,
    json_file: str,
    picture: str,
) -> str:
    """Write what an ablation found: `table.md`, the same numbers as JSON, and the picture of the differences.

    Args:
        output: directory of the ablation.
        title, table, digits: of :func:`measures_markdown`.
        differences: of pass@1, in points.
        seeds: of the values.
        json_file, picture: names in `output`.

    Returns:
        The text of `table.md`.
    """
    write_json(output / json_file, {"seeds": list(seeds), "table": table, "pass1_points": differences})
    text = measures_markdown(title, table, digits, seeds) + "\n" + differences_markdown(differences, seeds)
    atomic_write_text(output / TABLE_MARKDOWN, text)
    plot_differences(differences, seeds, output / picture)
    return text


def require_finished(root: Path, needed: Sequence[str], *, remedy: str) -> Path:
    """`root`, when all the steps under it that are needed have finished.

    Raises:
        UserError: one has not.
    """
    unfinished = [name for name in needed if not RunDirectory(root / name).is_done]
    if unfinished:
        raise UserError(f"{root} has no finished {unfinished}", rule="the ablation builds on them", remedy=remedy)
    return root


def ablation_command(schema: type[Config], preset: str, action: Callable[[Config], Any]) -> typer.Typer:
    """The command of an ablation's file: `--config FILE key=value ...`.

    Args:
        schema: of its configuration.
        preset: the file when none is given.
        action: what it does; its docstring is the help.
    """

    def command(
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
        config: Annotated[str, typer.Option("--config")] = preset,
    ) -> None:
        with exit_with_message():
            action(load_config(schema, Path(config), overrides or []))

    command.__doc__ = action.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app
