"""Ablation: near-miss against random negatives in rollout DPO, from one SFT model and one set of rollouts a seed.

    python -m recipes.ablations.dpo_negatives quickstarts=[runs/quickstart] output=runs/ablation-dpo-negatives

Each seed of the finished quickstarts gives its SFT model and that model's verified rollouts. Both arms curate their
pairs from them, as many each, train with conf/dpo/tiny.yaml, and are evaluated on the same held-out problems with the
same sampling seeds, so that they are compared question by question. Finished steps are not run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from phimr_nemo.config.ablations import DPONegativesConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.atomic import atomic_write_text
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    differences_markdown,
    evaluation_step,
    paired,
    plot_differences,
    seed_directories,
    stage_step,
)

TINY: Final = "conf/ablations/dpo_negatives.yaml"
START: Final = "sft"
START_ROW: Final = "SFT, where both begin"
PLOT_FILE: Final = "ablation-dpo-negatives.png"
NEEDED: Final = ("sft", "own-verdicts")


def plan(config: DPONegativesConfig) -> list[Step]:
    """Every command of the ablation, in order.

    Raises:
        UserError: see :func:`recipes.ablations.common.seed_directories`.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [step for seed, root in roots.items() for step in _seed_steps(config, seed, root)]


def _seed_steps(config: DPONegativesConfig, seed: int, root: Path) -> list[Step]:
    out = config.output / f"seed-{seed}"

    def evaluation(name: str, model: Path) -> Step:
        sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
        return evaluation_step(out, seed, name, model, **sizes)

    base = root / "sft" / "hf"
    steps = [evaluation(START, base)]
    for mode in config.modes:
        pairs, trained = out / f"pairs-{mode}", out / f"dpo-{mode}"
        source = (f"verdicts={root / 'own-verdicts'}", "prompts=null", f"pairs.mode={mode}")
        steps += [
            stage_step(out, seed, pairs.name, "curate", *source, preset="tiny-rollouts"),
            stage_step(out, seed, trained.name, "dpo", f"base={base}", f"pairs={pairs / 'pairs'}"),
            evaluation(mode, trained / "hf"),
        ]
    return steps


def report(config: DPONegativesConfig) -> str:
    """Write the table and the picture; returns the table in markdown.

    Raises:
        UserError: an arm's evaluation is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, Result, read_result
    from phimr_nemo.report.scores import entry, table_markdown, write_table

    arms = (START, *config.modes)
    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
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
            paired(results[first, seed].per_question, results[second, seed].per_question) for seed in seeds
        ]
        for first, second in contrasts
    }
    text = table_markdown(rows) + "\n" + differences_markdown(differences, seeds)
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    plot_differences(differences, seeds, config.output / PLOT_FILE)
    return text


def main(config: DPONegativesConfig) -> None:
    """Near-miss against random negatives in rollout DPO."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(DPONegativesConfig, TINY, main)()
