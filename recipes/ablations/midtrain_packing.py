"""Ablation: does packing change what mid-training learns?

    python -m recipes.ablations.midtrain_packing quickstarts=[runs/quickstart] \
        scaling=runs/ablation-midtrain-scaling output=runs/ablation-midtrain-packing

The packed arms have rows of documents that do not see one another, placed by length (`placement=length`), or with a
random draw of the short ones (`placement=mixed`). The unpacked arm trains on the same documents one by one, padded,
as many an update on average, with the same learning rates and epochs, through the stage `sft`: the same trainer over
conversations. The documents are a set of recipes/ablations/midtrain_scaling.py. Compared are the losses of held-out
documents, one by one, and pass@1.
"""

from __future__ import annotations

from typing import Final

from phimr_nemo.config.ablations import MidtrainPackingConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.shards import read_manifest
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    differences_markdown,
    evaluation_step,
    measures_markdown,
    paired,
    plot_differences,
    require_finished,
    seed_directories,
    stage_step,
)
from recipes.ablations.midtrain_scaling import FINISH, HELDOUT, LOSS, PASS1, STOPPED, UPDATES

TINY: Final = "conf/ablations/midtrain_packing.yaml"
PLOT_FILE: Final = "ablation-midtrain-packing.png"
NEEDED: Final = ("base",)
UNPACKED: Final = "unpacked"
PLACEMENTS: Final = {"length": "packed by length", "mixed": "packed, mixed"}
"""`placement` of the stage pack, which names the arm's steps -> the arm."""
DOCUMENTS_AN_UPDATE: Final = "documents an update"
DIGITS: Final = {UPDATES: 0, DOCUMENTS_AN_UPDATE: 1, LOSS: 4, PASS1: 1, STOPPED: 1}
PERCENT: Final = 100
"""What :func:`paired` multiplies by; losses stay in nats."""
AXIS: Final = (
    "difference of the loss a held-out document (nats a token), paired by document\n"
    "(bars: one standard error; a seed's over documents, the mean's over seeds)"
)


def plan(config: MidtrainPackingConfig) -> list[Step]:
    """Every command of the ablation, in order.

    Raises:
        UserError: a quickstart, or the set, is not finished.
    """
    steps = []
    for seed, root in seed_directories(config.quickstarts, needed=NEEDED).items():
        curated = f"curated-{config.problems}"
        source = require_finished(config.scaling / f"seed-{seed}", (curated, HELDOUT), remedy=FINISH)
        out, documents, base = config.output / f"seed-{seed}", source / curated / "midtrain", root / "base" / "hf"
        data = (f"base={base}", f"data={documents}")
        batch = (f"epochs={config.epochs}", f"micro_batch={config.batch}", f"global_batch={config.batch}")
        optim = ("validation_rows=0", f"optim.lr={config.lr}", f"optim.min_lr={config.min_lr}")
        sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
        length = f"sequence_length={config.sequence_length}"
        packed = (f"base={base}", "validation_rows=0", f"epochs={config.epochs}")
        for placement in PLACEMENTS:
            rows = out / f"rows-{placement}"
            read = (f"conversations={documents}", f"tokenizer={base}", f"placement={placement}")
            steps += [
                stage_step(out, seed, rows.name, "pack", *read),
                stage_step(out, seed, placement, "midtrain", f"data={rows}", *packed),
                evaluation_step(out, seed, placement, out / placement / "hf", **sizes),
            ]
        steps += [
            stage_step(out, seed, UNPACKED, "sft", *data, length, *batch, *optim),
            evaluation_step(out, seed, UNPACKED, out / UNPACKED / "hf", **sizes),
        ]
    return steps


def report(config: MidtrainPackingConfig) -> str:
    """Write the tables (markdown, JSON) and the picture; returns the tables in markdown.

    Raises:
        UserError: an arm is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result
    from phimr_nemo.evaluate.statistics import mean_and_error
    from phimr_nemo.store.runs import RunDirectory
    from phimr_nemo.supervised.document_loss import kept_document_losses

    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    arms = {**PLACEMENTS, UNPACKED: UNPACKED}
    table: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in DIGITS} for arm in arms.values()}
    losses: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms.values()}
    answers: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms.values()}
    for seed in seeds:
        source, out = config.scaling / f"seed-{seed}", config.output / f"seed-{seed}"
        require_finished(
            out, [name for step in arms for name in (step, f"evaluate-{step}")], remedy="run this ablation's steps"
        )
        documents = read_manifest(source / f"curated-{config.problems}" / "midtrain", "conversations").rows
        for step, arm in arms.items():
            trained, result = out / step, read_result(out / f"evaluate-{step}" / RESULTS_FILE)
            file = out / f"loss-{step}.json"
            kept = kept_document_losses(trained / "hf", source / HELDOUT / "midtrain", file)
            steps = RunDirectory(trained).closing_facts()["steps"]
            found = {
                UPDATES: steps,
                DOCUMENTS_AN_UPDATE: config.epochs * documents / steps,
                LOSS: mean_and_error(list(kept.values()))[0],
                PASS1: 100 * result.pass1,
                STOPPED: 100 * result.stopped,
            }
            for measure, value in found.items():
                table[arm][measure].append(value)
            losses[arm].append(kept)
            answers[arm].append(dict(result.per_question))
    nats, points = {}, {}
    for arm in PLACEMENTS.values():
        title = f"{arm} minus {UNPACKED}"
        nats[title] = [_unscaled(paired(a, b)) for a, b in zip(losses[UNPACKED], losses[arm], strict=True)]
        points[title] = [paired(a, b) for a, b in zip(answers[UNPACKED], answers[arm], strict=True)]
    write_json(config.output / "packing.json", {"seeds": seeds, "table": table, "loss": nats, "pass1_points": points})
    text = "\n".join(
        (
            measures_markdown("mid-training", table, DIGITS, seeds),
            differences_markdown(
                nats, seeds, title="difference of the loss, paired by document (nats a token)", digits=4
            ),
            differences_markdown(points, seeds),
        )
    )
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    plot_differences(nats, seeds, config.output / PLOT_FILE, axis=AXIS)
    return text


def _unscaled(percent: tuple[float, float]) -> tuple[float, float]:
    return percent[0] / PERCENT, percent[1] / PERCENT


def main(config: MidtrainPackingConfig) -> None:
    """Packed against unpacked mid-training."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(MidtrainPackingConfig, TINY, main)()
