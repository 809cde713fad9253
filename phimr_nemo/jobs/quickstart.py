"""The quickstart: every step of the recipe on a tiny model, each the command that a user would type.

A step that has finished and is what its command would make now is not run again, so an interrupted quickstart
continues where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from phimr_nemo.config import QuickstartConfig, load_config
from phimr_nemo.config.tiny import PLAIN_ROTARY
from phimr_nemo.jobs.closing import answers, to_type
from phimr_nemo.jobs.steps.schedule import run_steps, side_by_side
from phimr_nemo.jobs.steps.step import Step, refuse_changed
from phimr_nemo.store.progress import duration
from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import METRICS_FILE, RESULTS_FILE, RunDirectory, read_metrics
from phimr_nemo.store.shards import is_complete, read_manifest
from phimr_nemo.text.printable import say

# The step whose model a row of the paper's table of stages evaluates, and the row's name, in the paper's order.
ROWS: Final = (
    ("base", "base"),
    ("midtrain", "mid-training"),
    ("sft", "SFT"),
    ("dpo", "DPO"),
    ("grpo", "GRPO"),
    ("sft-without-midtrain", "SFT without mid-training"),
)
PRESET_FAMILY: Final = "phi3"
"""What conf/base/tiny.yaml is made like."""
TRAINED: Final = ("midtrain", "sft", "dpo", "grpo")
FUNNEL: Final[tuple[tuple[str, str, Kind], ...]] = (
    ("teacher rollouts", "rollouts", "rollouts"),
    ("verified, for mid-training", "curated/midtrain", "conversations"),
    ("harder subset, for SFT", "curated/sft", "conversations"),
    ("own rollouts", "own-rollouts", "rollouts"),
    ("preference pairs, for DPO", "preferences/pairs", "pairs"),
    ("prompts, for RL", "preferences/prompts", "prompts"),
)
# The model's own rollouts are asked other problems than the teacher was.
OWN_PROBLEMS_SEED_OFFSET: Final = 1_000_000
AT_ONCE: Final = 2
"""Processes: both for the two stages that everything waits for; later one for the next stage of training, and beside
it one for what nothing waits for."""
SECONDS: Final[Mapping[str, float]] = {
    "base": 1,
    "rollouts": 1,
    "verdicts": 1,
    "curated": 2,
    "rows": 1,
    "midtrain": 188,
    "sft": 90,
    "own-rollouts": 26,
    "own-verdicts": 2,
    "preferences": 1,
    "dpo": 36,
    "grpo": 131,
    "sft-without-midtrain": 70,
    **{f"evaluate-{name}": 6 for name, _ in ROWS},
    "evaluate-base": 12,  # it never ends a response
    "release": 1,
}
"""Core seconds of a step on two idle cores: a first guess of the time to go, which the machine's pace corrects."""


def plan_quickstart(path: Path, seeds: Sequence[int], out: Path, overrides: Sequence[str]) -> list[Step]:
    """Every command of the quickstart, in order.

    Args:
        path: conf/quickstart/*.yaml.
        seeds: one run of the whole recipe each.
        out: the output directory; each seed has its own under it.
        overrides: of the quickstart's config.

    Raises:
        UserError: a bad config.
    """
    config, ranks = load_config(QuickstartConfig, path, overrides), side_by_side(AT_ONCE)
    return [step for seed in seeds for step in seed_steps(config, seed, out / f"seed-{seed}", ranks)]


def seed_steps(config: QuickstartConfig, seed: int, root: Path, ranks: int = 1) -> list[Step]:
    """The commands of one seed.

    Args:
        config: conf/quickstart/*.yaml.
        seed: of all that is random in it.
        root: its directory.
        ranks: that share the batches of the steps which all others wait for; what is learned is the same but for
            rounding.
    """

    def step(
        name: str, stage: str, *overrides: str, preset: str = "tiny", run_seed: int = seed, processes: int = 1
    ) -> Step:
        output = root / name
        fixed = (f"run.output={output}", f"run.seed={run_seed}")
        layout = (f"parallel.data={processes}",) if processes > 1 else ()
        words = (stage, "--config", f"conf/{stage}/{preset}.yaml", *fixed, *overrides, *layout)
        return Step(name, words, output, processes=processes)

    def model(name: str) -> str:
        return str(root / name / "hf")

    steps = [
        step("base", "base", *_base_shape(config)),
        step("rollouts", "generate", f"problems.count={config.train_problems}"),
        step("verdicts", "verify", f"rollouts={root / 'rollouts'}"),
        step("curated", "curate", f"verdicts={root / 'verdicts'}", f"tokenizer={model('base')}"),
        step("rows", "pack", f"conversations={root / 'curated' / 'midtrain'}", f"tokenizer={model('base')}"),
        step("midtrain", "midtrain", f"base={model('base')}", f"data={root / 'rows'}", processes=ranks),
        step("sft", "sft", f"base={model('midtrain')}", f"data={root / 'curated' / 'sft'}", processes=ranks),
        step(
            "own-rollouts",
            "generate",
            f"problems.count={config.rl_problems}",
            f"teacher.path={model('sft')}",
            preset="tiny-rollouts",
            run_seed=seed + OWN_PROBLEMS_SEED_OFFSET,
        ),
        step("own-verdicts", "verify", f"rollouts={root / 'own-rollouts'}"),
        step(
            *("preferences", "curate", f"verdicts={root / 'own-verdicts'}", f"tokenizer={model('base')}"),
            preset="tiny-rollouts",
        ),
        step("dpo", "dpo", f"base={model('sft')}", f"pairs={root / 'preferences' / 'pairs'}"),
        step("grpo", "grpo", f"base={model('dpo')}", f"prompts={root / 'preferences' / 'prompts'}"),
        step("sft-without-midtrain", "sft", f"base={model('base')}", f"data={root / 'curated' / 'sft'}"),
    ]
    for name, row in ROWS:
        steps.append(
            step(
                f"evaluate-{name}",
                "evaluate",
                f"model={model(name)}",
                f"problems.count={config.heldout_problems}",
                f"samples={config.evaluation_samples}",
                f"row={row}",
            )
        )
    stages = (f"stages.{name}={root / name}" for name in TRAINED)
    evaluations = (f"evaluations.{row}={root / f'evaluate-{name}'}" for name, row in ROWS[: len(TRAINED) + 1])
    return [*steps, step("release", "export", f"model={model('grpo')}", *stages, *evaluations)]


def _base_shape(config: QuickstartConfig) -> list[str]:
    """What a base of another family than the preset's own is told."""
    if config.family == PRESET_FAMILY:
        return []
    return [f"family={config.family}", *(f"{name}={value}" for name, value in PLAIN_ROTARY.items())]


def run_quickstart(path: Path, seeds: Sequence[int], out: Path, overrides: Sequence[str], *, redo: bool) -> None:
    """Run every step that has not finished yet, then write table and plots.

    Args:
        path, seeds, out, overrides: see :func:`plan_quickstart`.
        redo: make steps again whose command, settings or inputs have changed, and what follows from them.

    Raises:
        UserError: a step refused its input, or has changed and is not to be made again, or another process is at work
            on one that is.
        Preempted: the run was interrupted; the same command continues it.
        RuntimeError: a step failed; its own message stands above.
    """
    steps = plan_quickstart(path, seeds, out, overrides)
    if not redo:
        refuse_changed(steps)
    started = time.monotonic()
    run_steps(steps, redo=redo, at_once=side_by_side(AT_ONCE), seconds=SECONDS)
    write_report([out], out)
    root = out / f"seed-{seeds[0]}"
    say(f"Held-out questions, and how the model of seed {seeds[0]} answers after GRPO:")
    for line in answers(root / f"evaluate-{TRAINED[-1]}"):
        say(line)
    say(f"finished in {duration(time.monotonic() - started)}; table, pictures and models are in {out}")
    say(f"next: {to_type('chat', str(root / 'release' / 'hf'))}")


def write_report(runs: Sequence[Path], out: Path) -> None:
    """A page (HTML, markdown) of finished evaluations and the runs beside them; of quickstarts the table as well.

    Args:
        runs: output directories of quickstarts or evaluations, or directories above them.
        out: where report.html, report.md, and of quickstarts table.md, table.json and plots (PNG) go.

    Raises:
        UserError: there is no finished evaluation, one is damaged, or a model was evaluated twice with one seed.
    """
    from phimr_nemo.evaluate.evaluate import read_result
    from phimr_nemo.report.plots import plot_accuracy
    from phimr_nemo.report.run import write_run_report
    from phimr_nemo.report.scores import entry, table_markdown, write_table

    page = write_run_report(runs, out)

    # The plots of an earlier report lie beside the seeds' directories.
    roots = [root for run in runs for root in sorted(filter(Path.is_dir, run.glob("seed-*")), key=_seed_of)]
    entries = [
        entry(row, _seed_of(root), read_result(root / f"evaluate-{name}" / RESULTS_FILE), _seconds(root / name))
        for name, row in ROWS
        for root in roots
        if (root / f"evaluate-{name}" / RESULTS_FILE).is_file()
    ]
    if entries:
        rows = write_table(out, entries)
        plot_accuracy(rows, out / "accuracy.png")
        for root in roots:
            _plot_run(root, out)
        say(table_markdown(rows))
    say(page)


def _seconds(training: Path) -> float | None:
    """What a training stage took; None where it has none, or it is not there."""
    run = RunDirectory(training)
    seconds = run.closing_facts().get("seconds") if run.is_done else None
    return None if seconds is None else float(seconds)


def _seed_of(root: Path) -> int:
    return int(root.name.removeprefix("seed-"))


def _plot_run(root: Path, out: Path) -> None:
    """Loss, reward and data-funnel plots of one seed, of the steps that have run."""
    from phimr_nemo.report.plots import plot_funnel, plot_losses, plot_reward_and_length, read_curve

    # Reinforcement learning logs no loss when no group ever had both right and wrong responses.
    losses = {
        name: read_curve(root / name, "loss")
        for name in TRAINED
        if any("loss" in row for row in read_metrics(root / name))
    }
    if losses:
        plot_losses(losses, out / f"{root.name}-loss.png")
    if (root / "grpo" / METRICS_FILE).is_file():
        reward, length = read_curve(root / "grpo", "reward"), read_curve(root / "grpo", "response_length")
        plot_reward_and_length(reward, length, out / f"{root.name}-reward.png")
    counts = {name: _rows(root / path, kind) for name, path, kind in FUNNEL if is_complete(root / path, kind)}
    if counts:
        plot_funnel(counts, out / f"{root.name}-data.png")


def _rows(directory: Path, kind: Kind) -> int:
    return read_manifest(directory, kind).rows
