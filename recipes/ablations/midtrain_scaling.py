"""Ablation: how much does the size of the mid-training set matter to a model of this size?

    python -m recipes.ablations.midtrain_scaling quickstarts=[runs/quickstart] output=runs/ablation-midtrain-scaling

Each seed of the finished quickstarts gives its base model and its whole mid-training set. The smaller sets come from
fewer problems of the same kinds, through the same verification and curation. Two protocols, because each has a
confound that the other has not:

- equal epochs: a smaller set also means fewer updates;
- equal updates: a smaller set is also repeated more often.

Measured are pass@1 on the quickstart's held-out problems, and the loss a document on right responses to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from phimr_nemo.config.ablations import MidtrainScalingConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.shards import read_manifest
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    evaluation_step,
    measures_markdown,
    require_finished,
    seed_directories,
    stage_step,
)

TINY: Final = "conf/ablations/midtrain_scaling.yaml"
PLOT_FILE: Final = "ablation-midtrain-scaling.png"
NEEDED: Final = ("base", "rows", "midtrain", "evaluate-midtrain")
HELDOUT: Final = "heldout"
WHOLE: Final = "full"
ENDLESS: Final = 1000
"""Epochs that the number of updates cuts short."""

DOCUMENTS: Final = "documents"
UPDATES: Final = "updates"
LOSS: Final = "held-out loss a document (nats a token)"
PASS1: Final = "pass@1 (%)"
STOPPED: Final = "ended before the limit (%)"
DIGITS: Final = {DOCUMENTS: 0, UPDATES: 0, LOSS: 4, PASS1: 1, STOPPED: 1}
PLOT_INCHES: Final = (8.5, 3.4)
DPI: Final = 110
FINISH: Final = "run the ablation's own command first, with the same sizes"

Protocol = Literal["epochs", "steps"]


@dataclass(frozen=True)
class Arm:
    """One set size under one protocol.

    Attributes:
        size: problems asked, or `WHOLE`.
        protocol: what is equal over the sizes.
    """

    size: str
    protocol: Protocol

    @property
    def name(self) -> str:
        """Of its directories."""
        return f"{self.size}-{self.protocol}"


def arms(config: MidtrainScalingConfig) -> list[Arm]:
    """Every arm, by protocol, from the smallest set to the whole one."""
    protocols: list[Protocol] = ["epochs"] if config.updates is None else ["epochs", "steps"]
    sizes = [*map(str, sorted(config.problems)), WHOLE]
    return [Arm(size, protocol) for protocol in protocols for size in sizes]


def plan(config: MidtrainScalingConfig) -> list[Step]:
    """Every command of the ablation, in order.

    Raises:
        UserError: see :func:`recipes.ablations.common.seed_directories`.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [step for seed, root in roots.items() for step in _seed_steps(config, seed, root)]


def data_steps(out: Path, seed: int, root: Path, problems: Sequence[int], heldout: int) -> list[Step]:
    """Fresh held-out documents, and packed rows of sets that are smaller than the quickstart's.

    Args:
        out: the ablation's directory of a seed.
        seed: of the problems.
        root: the quickstart's directory of the seed.
        problems: sizes of the sets, as many problems as the teacher is asked.
        heldout: problems whose correct responses measure the loss.
    """
    right = ("problems.split=heldout", "teacher.mistake_rate=0.0", "rollouts_per_problem=1")
    steps = [
        stage_step(out, seed, f"{HELDOUT}-rollouts", "generate", f"problems.count={heldout}", *right),
        stage_step(out, seed, f"{HELDOUT}-verdicts", "verify", f"rollouts={out / f'{HELDOUT}-rollouts'}"),
        stage_step(out, seed, HELDOUT, "curate", f"verdicts={out / f'{HELDOUT}-verdicts'}"),
    ]
    tokenizer = f"tokenizer={root / 'base' / 'hf'}"
    for size in sorted(problems):
        names = [f"{name}-{size}" for name in ("rollouts", "verdicts", "curated", "rows")]
        rollouts, verdicts, curated, rows = names
        steps += [
            stage_step(out, seed, rollouts, "generate", f"problems.count={size}"),
            stage_step(out, seed, verdicts, "verify", f"rollouts={out / rollouts}"),
            stage_step(out, seed, curated, "curate", f"verdicts={out / verdicts}"),
            stage_step(out, seed, rows, "pack", f"conversations={out / curated / 'midtrain'}", tokenizer),
        ]
    return steps


def rows_of(out: Path, root: Path, size: str) -> Path:
    """Where :func:`data_steps` or the quickstart puts the packed rows of a set; `WHOLE` is the quickstart's."""
    return root / "rows" if size == WHOLE else out / f"rows-{size}"


def fixed_updates(updates: int) -> list[str]:
    """Settings of so many updates, whatever the set's size."""
    return [f"epochs={ENDLESS}", f"max_steps={updates}"]


def _seed_steps(config: MidtrainScalingConfig, seed: int, root: Path) -> list[Step]:
    out = config.output / f"seed-{seed}"
    steps = data_steps(out, seed, root, config.problems, config.heldout_documents)
    for arm in arms(config):
        trained, evaluated = directories(out, root, arm)
        if trained.parent != out:
            continue  # the quickstart has it
        length = [f"epochs={config.epochs}"]
        if arm.protocol == "steps":
            assert config.updates is not None
            length = fixed_updates(config.updates)
        data = (f"base={root / 'base' / 'hf'}", f"data={rows_of(out, root, arm.size)}", "validation_rows=0")
        sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
        steps += [
            stage_step(out, seed, trained.name, "midtrain", *data, *length),
            evaluation_step(out, seed, arm.name, trained / "hf", **sizes),
        ]
        assert steps[-1].output == evaluated
    return steps


def directories(out: Path, root: Path, arm: Arm) -> tuple[Path, Path]:
    """Where an arm was trained and where it was evaluated.

    Args:
        out: the ablation's directory of a seed.
        root: the quickstart's.
        arm: whole set and equal epochs are the quickstart's own mid-training.
    """
    if arm == Arm(WHOLE, "epochs"):
        return root / "midtrain", root / "evaluate-midtrain"
    return out / f"midtrain-{arm.name}", out / f"evaluate-{arm.name}"


def report(config: MidtrainScalingConfig) -> str:
    """Write the table (markdown, JSON) and the picture; returns the table in markdown.

    Raises:
        UserError: an arm is not finished.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    table: dict[str, dict[str, list[float]]] = {}
    for arm in arms(config):
        row = table.setdefault(_title(config, arm), {measure: [] for measure in DIGITS})
        for seed, root in roots.items():
            for measure, value in _measures(config.output / f"seed-{seed}", root, arm).items():
                row[measure].append(value)
    write_json(config.output / "scaling.json", {"seeds": list(roots), "table": table})
    text = measures_markdown("mid-training set", table, DIGITS, list(roots))
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    groups = {
        _protocol_title(config, protocol): [
            table[_title(config, arm)] for arm in arms(config) if arm.protocol == protocol
        ]
        for protocol in dict.fromkeys(arm.protocol for arm in arms(config))
    }
    _plot(groups, config.output / PLOT_FILE)
    return text


def _protocol_title(config: MidtrainScalingConfig, protocol: Protocol) -> str:
    return f"{config.epochs} epochs" if protocol == "epochs" else f"{config.updates} updates"


def _title(config: MidtrainScalingConfig, arm: Arm) -> str:
    size = "whole set" if arm.size == WHOLE else f"{int(arm.size):,} problems"
    return f"{size}, {_protocol_title(config, arm.protocol)}"


def _measures(out: Path, root: Path, arm: Arm) -> Mapping[str, float]:
    trained, evaluated = directories(out, root, arm)
    return arm_measures(trained, evaluated, rows_of(out, root, arm.size), out)


def arm_measures(trained: Path, evaluated: Path, rows: Path, out: Path) -> dict[str, float]:
    """What a finished arm has to show, by the names in `DIGITS`.

    Args:
        trained: run directory of its mid-training.
        evaluated: of its evaluation.
        rows: that it was trained on.
        out: the ablation's directory of the seed, with the held-out documents.

    Raises:
        UserError: one of them has not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result
    from phimr_nemo.evaluate.statistics import mean_and_error
    from phimr_nemo.store.runs import RunDirectory
    from phimr_nemo.supervised.document_loss import kept_document_losses

    for directory in (trained, evaluated, out / HELDOUT):
        require_finished(directory.parent, [directory.name], remedy=FINISH)
    result = read_result(evaluated / RESULTS_FILE)
    losses = kept_document_losses(
        trained / "hf", out / HELDOUT / "midtrain", out / f"loss-{evaluated.name.removeprefix('evaluate-')}.json"
    )
    return {
        DOCUMENTS: read_manifest(rows, "rows").counts["documents"],
        UPDATES: RunDirectory(trained).closing_facts()["steps"],
        LOSS: mean_and_error(list(losses.values()))[0],
        PASS1: 100 * result.pass1,
        STOPPED: 100 * result.stopped,
    }


def _plot(groups: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], path: Path) -> None:
    """pass@1 and held-out loss over the documents of the set, a line a protocol, bars: standard error over seeds."""
    from matplotlib.figure import Figure

    from phimr_nemo.evaluate.statistics import mean_and_error

    figure = Figure(figsize=PLOT_INCHES)
    for axes, measure in zip(figure.subplots(1, 2), (PASS1, LOSS), strict=True):
        for number, (title, rows) in enumerate(groups.items()):
            places = [mean_and_error(row[DOCUMENTS])[0] for row in rows]
            points = [mean_and_error(row[measure]) for row in rows]
            axes.errorbar(
                places,
                [mean for mean, _ in points],
                yerr=[error for _, error in points],
                marker="o",
                capsize=4,
                color=f"C{number}",
                label=title,
            )
            for place, row in zip(places, rows, strict=True):
                each = row[measure]
                axes.plot([place] * len(each), each, ".", color=f"C{number}", alpha=0.4, markersize=4)
        axes.set_xscale("log")
        # Pictures hold no mathematics, which the logarithmic axis would label itself with.
        ticks = [mean_and_error(row[DOCUMENTS])[0] for row in next(iter(groups.values()))]
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("documents in the mid-training set", fontsize=8)
        axes.set_ylabel(measure, fontsize=8)
        tidy(axes)
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def main(config: MidtrainScalingConfig) -> None:
    """The size of the mid-training set, at equal epochs and at equal updates."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(MidtrainScalingConfig, TINY, main)()
