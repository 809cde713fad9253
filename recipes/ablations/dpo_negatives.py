"""Ablation: near-miss against random negatives in rollout DPO, from one SFT model and one set of rollouts a seed.

    python -m recipes.ablations.dpo_negatives quickstarts=[runs/quickstart] output=runs/ablation-dpo-negatives

Each seed of the finished quickstarts gives its SFT model and that model's verified rollouts. Both arms curate their
pairs from them, as many each, train with conf/dpo/tiny.yaml, and are evaluated on the same held-out problems with the
same sampling seeds, so that they are compared question by question. Finished steps are not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from phimr_nemo.atomic import atomic_write_text
from phimr_nemo.config import load_config
from phimr_nemo.config.alignment import DPONegativesConfig
from phimr_nemo.errors import UserError, exit_with_message
from phimr_nemo.picture import save_png
from phimr_nemo.pipeline import Step, run_step
from phimr_nemo.runs import RunDirectory

TINY: Final = "conf/ablations/dpo_negatives.yaml"
START: Final = "sft"
START_ROW: Final = "SFT, where both begin"
PLOT_FILE: Final = "ablation-dpo-negatives.png"
PLOT_INCHES: Final = (7.5, 3.2)
DPI: Final = 110
SEED_OFFSET: Final = 0.16
"""Between the lines of two seeds, in rows."""
AXIS: Final = (
    "difference of pass@1 in points, paired by question\n"
    "(bars: one standard error; a seed's over questions, the mean's over seeds)"
)
NEEDED: Final = ("sft", "own-verdicts")


def seed_directories(config: DPONegativesConfig) -> dict[int, Path]:
    """The finished quickstart of each seed.

    Raises:
        UserError: a seed twice, none at all, or one whose SFT model or rollouts are not finished.
    """
    found: dict[int, Path] = {}
    for quickstart in config.quickstarts:
        for root in sorted(filter(Path.is_dir, quickstart.glob("seed-*"))):  # plots lie beside them
            seed = int(root.name.removeprefix("seed-"))
            unfinished = [name for name in NEEDED if not RunDirectory(root / name).is_done]
            if seed in found or unfinished:
                raise UserError(
                    f"{root} " + (f"has no finished {unfinished}" if unfinished else f"is seed {seed} again"),
                    rule="every seed has one quickstart, finished at least up to its own verified rollouts",
                    remedy="finish it with `phimr quickstart`, or leave it out of quickstarts=",
                )
            found[seed] = root
    if not found:
        raise UserError(
            f"no seed-* directories in {[str(path) for path in config.quickstarts]}",
            rule="the ablation starts from finished quickstarts",
            remedy="run `phimr quickstart --seeds 0,1,2 --out runs/quickstart` first",
        )
    return dict(sorted(found.items()))


def plan(config: DPONegativesConfig) -> list[Step]:
    """Every command of the ablation, in order."""
    return [step for seed, root in seed_directories(config).items() for step in _seed_steps(config, seed, root)]


def _seed_steps(config: DPONegativesConfig, seed: int, root: Path) -> list[Step]:
    out = config.output / f"seed-{seed}"

    def step(name: str, stage: str, *overrides: str, preset: str = "tiny") -> Step:
        fixed = (f"run.output={out / name}", f"run.seed={seed}")
        return Step(name, (stage, "--config", f"conf/{stage}/{preset}.yaml", *fixed, *overrides), out / name)

    def evaluation(name: str, model: Path) -> Step:
        sizes = (f"problems.count={config.heldout_problems}", f"samples={config.evaluation_samples}")
        return step(f"evaluate-{name}", "evaluate", f"model={model}", *sizes)

    base = root / "sft" / "hf"
    steps = [evaluation(START, base)]
    for mode in config.modes:
        pairs, trained = out / f"pairs-{mode}", out / f"dpo-{mode}"
        source = (f"verdicts={root / 'own-verdicts'}", "prompts=null", f"pairs.mode={mode}")
        steps += [
            step(f"pairs-{mode}", "curate", *source, preset="tiny-rollouts"),
            step(f"dpo-{mode}", "dpo", f"base={base}", f"pairs={pairs / 'pairs'}"),
            evaluation(mode, trained / "hf"),
        ]
    return steps


def report(config: DPONegativesConfig) -> str:
    """Write the table and the picture; returns the table in markdown.

    Raises:
        UserError: an arm's evaluation is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, Result, read_result
    from phimr_nemo.evaluate.report import entry, table_markdown, write_table

    arms = (START, *config.modes)
    seeds = list(seed_directories(config))
    results: dict[tuple[str, int], Result] = {
        (arm, seed): read_result(config.output / f"seed-{seed}" / f"evaluate-{arm}" / RESULTS_FILE)
        for arm in arms
        for seed in seeds
    }
    names: dict[str, str] = {START: START_ROW}
    names |= {mode: f"DPO, {mode.replace('_', '-')} negatives" for mode in config.modes}
    rows = write_table(config.output, [entry(names[arm], seed, results[arm, seed]) for arm in arms for seed in seeds])
    contrasts = [(START, mode) for mode in config.modes]
    contrasts += [(other, mode) for mode in config.modes[:1] for other in config.modes[1:]]
    differences = {
        f"{names[second]} minus {names[first]}": [
            _paired(results[first, seed].per_question, results[second, seed].per_question) for seed in seeds
        ]
        for first, second in contrasts
    }
    text = table_markdown(rows) + "\n" + _differences_markdown(differences, seeds)
    atomic_write_text(config.output / "table.md", text)
    _plot(differences, seeds, config.output / PLOT_FILE)
    return text


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """Mean difference over the same questions, and its standard error over them, in per cent."""
    from phimr_nemo.evaluate.statistics import mean_and_error

    mean, error = mean_and_error([second[question] - first[question] for question in sorted(first)])
    return 100 * mean, 100 * error


def _differences_markdown(differences: dict[str, list[tuple[float, float]]], seeds: Sequence[int]) -> str:
    from phimr_nemo.evaluate.statistics import mean_and_error

    lines = [
        "| difference of pass@1, paired by question (points) | mean | stderr, seeds | "
        + " | ".join(f"seed {seed} (stderr, questions)" for seed in seeds)
        + " |",
        "|---|---:|---:|" + "---:|" * len(seeds),
    ]
    for name, each in differences.items():
        mean, error = mean_and_error([value for value, _ in each])
        cells = " | ".join(f"{value:+.1f} ({stderr:.1f})" for value, stderr in each)
        lines.append(f"| {name} | {mean:+.1f} | {error:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


def _plot(differences: dict[str, list[tuple[float, float]]], seeds: Sequence[int], path: Path) -> None:
    """Each seed's paired difference with its error over questions, and their mean with its error over seeds."""
    from matplotlib.figure import Figure

    from phimr_nemo.evaluate.statistics import mean_and_error

    figure = Figure(figsize=PLOT_INCHES)
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
    axes.set_xlabel(AXIS, fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(seeds) + 1)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def run_ablation(config: DPONegativesConfig) -> None:
    """Run every step that has not finished yet, then write the table and the picture.

    Raises:
        UserError, Preempted, RuntimeError: as :func:`phimr_nemo.pipeline.run_step`.
    """
    steps = plan(config)
    for number, step in enumerate(steps, 1):
        if not RunDirectory(step.output).is_done:
            print(f"[{number}/{len(steps)}] {step.output.parent.name}: {step.name}", flush=True)
            run_step(step)
    print(report(config))


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    config: Annotated[str, typer.Option("--config")] = TINY,
) -> None:
    """Near-miss against random negatives in rollout DPO."""
    with exit_with_message():
        run_ablation(load_config(DPONegativesConfig, Path(config), overrides or []))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
