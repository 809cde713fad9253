"""Ablation: does packing change what mid-training learns?

    python -m recipes.ablations.midtrain_packing quickstarts=[runs/quickstart] \
        scaling=runs/ablation-midtrain-scaling output=runs/ablation-midtrain-packing

The packed arm is one of the arms of recipes/ablations/midtrain_scaling.py: rows of documents that do not see one
another, placed by length. The mixed arm has the same documents in rows with a random draw of the short ones
(`placement=mixed`). The unpacked arm trains on the same documents one by one, padded, as many an update on average,
with the same learning rates and epochs, through the stage `sft`, which is the same trainer over conversations.
Compared are the losses of held-out documents, one by one, and pass@1.
"""

from __future__ import annotations

from typing import Final

from phimr_nemo.atomic import atomic_write_text
from phimr_nemo.config.ablations import MidtrainPackingConfig
from phimr_nemo.pipeline import Step
from phimr_nemo.store import read_manifest, write_json
from recipes.ablations.common import (
    ablation_command,
    differences_markdown,
    evaluation_step,
    measures_markdown,
    paired,
    plot_differences,
    require_finished,
    run_steps,
    seed_directories,
    stage_step,
)
from recipes.ablations.midtrain_scaling import FINISH, HELDOUT, LOSS, PASS1, STOPPED, UPDATES, Arm, directories

TINY: Final = "conf/ablations/midtrain_packing.yaml"
PLOT_FILE: Final = "ablation-midtrain-packing.png"
NEEDED: Final = ("base",)
UNPACKED: Final = "unpacked"
PACKED: Final = "packed by length"
MIXED: Final = "packed, mixed"
MIXED_STEP: Final = "mixed"
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
        UserError: a quickstart, or the packed arm, is not finished.
    """
    steps = []
    for seed, root in seed_directories(config.quickstarts, needed=NEEDED).items():
        arm = Arm(str(config.problems), "epochs")
        needed = (f"curated-{config.problems}", f"midtrain-{arm.name}", f"evaluate-{arm.name}", HELDOUT)
        source = require_finished(config.scaling / f"seed-{seed}", needed, remedy=FINISH)
        out = config.output / f"seed-{seed}"
        data = (f"base={root / 'base' / 'hf'}", f"data={source / f'curated-{config.problems}' / 'midtrain'}")
        batch = (f"epochs={config.epochs}", f"micro_batch={config.batch}", f"global_batch={config.batch}")
        optim = ("validation_rows=0", f"optim.lr={config.lr}", f"optim.min_lr={config.min_lr}")
        sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
        length = f"sequence_length={config.sequence_length}"
        conversations = f"conversations={source / f'curated-{config.problems}' / 'midtrain'}"
        tokenizer = f"tokenizer={root / 'base' / 'hf'}"
        rows = out / f"rows-{MIXED_STEP}"
        packed = (f"base={root / 'base' / 'hf'}", f"data={rows}", "validation_rows=0", f"epochs={config.epochs}")
        steps += [
            stage_step(out, seed, rows.name, "pack", conversations, tokenizer, "placement=mixed"),
            stage_step(out, seed, MIXED_STEP, "midtrain", *packed),
            evaluation_step(out, seed, MIXED_STEP, out / MIXED_STEP / "hf", **sizes),
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
    from phimr_nemo.runs import RunDirectory
    from phimr_nemo.train.document_loss import kept_document_losses

    roots = seed_directories(config.quickstarts, needed=NEEDED)
    arms = (PACKED, MIXED, UNPACKED)
    table: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in DIGITS} for arm in arms}
    losses: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    answers: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed, root in roots.items():
        source, out = config.scaling / f"seed-{seed}", config.output / f"seed-{seed}"
        places = {
            PACKED: directories(source, root, Arm(str(config.problems), "epochs")),
            MIXED: (out / MIXED_STEP, out / f"evaluate-{MIXED_STEP}"),
            UNPACKED: (out / UNPACKED, out / f"evaluate-{UNPACKED}"),
        }
        documents = read_manifest(source / f"rows-{config.problems}", "rows").counts["documents"]
        for arm, (trained, evaluated) in places.items():
            for directory in (trained, evaluated):
                require_finished(directory.parent, [directory.name], remedy="run this ablation's steps")
            result = read_result(evaluated / RESULTS_FILE)
            file = out / f"loss-{trained.name}.json"
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
    for arm in (PACKED, MIXED):
        title = f"{arm} minus {UNPACKED}"
        nats[title] = [_unscaled(paired(a, b)) for a, b in zip(losses[UNPACKED], losses[arm], strict=True)]
        points[title] = [paired(a, b) for a, b in zip(answers[UNPACKED], answers[arm], strict=True)]
    write_json(
        config.output / "packing.json", {"seeds": list(roots), "table": table, "loss": nats, "pass1_points": points}
    )
    seeds = list(roots)
    text = "\n".join(
        (
            measures_markdown("mid-training", table, DIGITS, seeds),
            differences_markdown(
                nats, seeds, title="difference of the loss, paired by document (nats a token)", digits=4
            ),
            differences_markdown(points, seeds),
        )
    )
    atomic_write_text(config.output / "table.md", text)
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
