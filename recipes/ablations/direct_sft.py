"""Ablation: direct SFT on a small set of hard, verified conversations, with and without mid-training before it.

    python -m recipes.ablations.direct_sft quickstarts=[runs/quickstart] \
        scaling=runs/ablation-midtrain-scaling output=runs/ablation-direct-sft

The paper finds that SFT of Phi-4-Mini on LIMO's or S1K's thousand examples alone makes it worse than it was. The tiny
base model is random and cannot get worse, so the same small set is trained on from two starts: the random base, and
the quickstart's mid-trained model, which here is the only one that can do something and could lose it. Each is
compared with its own start, question by question; the quickstart's SFT on the whole subset stands beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from phimr_nemo.config.ablations import DirectSFTConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.shards import read_manifest
from recipes.ablations.common import (
    ablation_command,
    evaluation_step,
    paired,
    publish,
    require_finished,
    seed_directories,
    stage_step,
)
from recipes.ablations.midtrain_scaling import FINISH, PASS1, STOPPED

TINY: Final = "conf/ablations/direct_sft.yaml"
PLOT_FILE: Final = "ablation-direct-sft.png"
STARTS: Final = {"base": "random base", "midtrain": "mid-training"}
WHOLE: Final = {"base": "sft-without-midtrain", "midtrain": "sft"}
"""The quickstart's SFT on the whole subset, by its start."""
NEEDED: Final = (*STARTS, *(f"evaluate-{name}" for name in (*STARTS, *WHOLE.values())))
LENGTH: Final = "tokens an answer"
EXAMPLES: Final = "examples"
DIGITS: Final = {EXAMPLES: 0, PASS1: 1, STOPPED: 1, LENGTH: 1}


def small_set(config: DirectSFTConfig, seed: int) -> Path:
    """The conversations of a seed.

    Raises:
        UserError: the ablation of the set's size has not made them.
    """
    curated = f"curated-{config.small}"
    return require_finished(config.scaling / f"seed-{seed}", [curated], remedy=FINISH) / curated / "sft"


def plan(config: DirectSFTConfig) -> list[Step]:
    """Every command of the ablation, in order.

    Raises:
        UserError: a quickstart, or what the ablation of the set's size makes, is not finished.
    """
    steps = []
    for seed, root in seed_directories(config.quickstarts, needed=NEEDED).items():
        out = config.output / f"seed-{seed}"
        data = (f"data={small_set(config, seed)}", f"epochs={config.epochs}", "validation_rows=0")
        for name in STARTS:
            arm = f"sft-{name}"
            sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
            steps += [
                stage_step(out, seed, arm, "sft", f"base={root / name / 'hf'}", *data),
                evaluation_step(out, seed, arm, out / arm / "hf", **sizes),
            ]
    return steps


def report(config: DirectSFTConfig) -> str:
    """Write the tables (markdown, JSON) and the picture; returns the tables in markdown.

    Raises:
        UserError: an arm is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result

    roots = seed_directories(config.quickstarts, needed=NEEDED)
    table: dict[str, dict[str, list[float]]] = {}
    differences: dict[str, list[tuple[float, float]]] = {}
    for seed, root in roots.items():
        out = config.output / f"seed-{seed}"
        examples = read_manifest(small_set(config, seed), "conversations").rows
        whole = read_manifest(root / "curated" / "sft", "conversations").rows
        for name, title in STARTS.items():
            arm = f"evaluate-sft-{name}"
            require_finished(out, [arm], remedy="run this ablation's steps")
            before = read_result(root / f"evaluate-{name}" / RESULTS_FILE)
            after = read_result(out / arm / RESULTS_FILE)
            reference = read_result(root / f"evaluate-{WHOLE[name]}" / RESULTS_FILE)
            found_rows = (
                (title, before, 0),
                (f"{title} + small set", after, examples),
                (f"{title} + whole SFT set", reference, whole),
            )
            for row, result, count in found_rows:
                found = {
                    EXAMPLES: count,
                    PASS1: 100 * result.pass1,
                    STOPPED: 100 * result.stopped,
                    LENGTH: result.mean_tokens,
                }
                for measure, value in found.items():
                    table.setdefault(row, {}).setdefault(measure, []).append(value)
            contrast = f"{title} + small set minus {title}"
            differences.setdefault(contrast, []).append(paired(before.per_question, after.per_question))
    seeds = list(roots)
    return publish(
        config.output, "model", table, DIGITS, differences, seeds, json_file="direct-sft.json", picture=PLOT_FILE
    )


def main(config: DirectSFTConfig) -> None:
    """Direct SFT on a small set, from three starts."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(DirectSFTConfig, TINY, main)()
