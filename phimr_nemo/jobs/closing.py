"""What a stage says when it is done: what was made and where, the figures that matter, the time, the next command."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config.load import find_config, flat, read_preset
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import VERDICTS, read_result
from phimr_nemo.store.progress import duration
from phimr_nemo.store.runs import RESULTS_FILE, RunDirectory, newest_mean, read_metrics
from phimr_nemo.store.shards import read_table
from phimr_nemo.text.printable import printable

PART_OF: Final = "PHIMR_PART_OF"
"""Environment variable of commands that another one runs in their order: the next command is not the user's."""
MODEL: Final = "hf"
MODEL_STAGES: Final = frozenset(("base", "midtrain", "sft", "dpo", "grpo", "distill", "export"))
FIGURES: Final = 3
SECOND_PASS: Final = "-rollouts"
"""End of the names of presets for the model's own rollouts."""
PRESETS: Final = Path("conf")
A_SERVER: Final = "http://localhost:8000/v1"


@dataclass(frozen=True)
class Following:
    """A stage that follows another.

    Attributes:
        stage: its name.
        key: what takes what the other made.
        made: where in the other's output that stands.
    """

    stage: str
    key: str
    made: str = ""


NEXT: Final[Mapping[str, Following]] = {
    "generate": Following("verify", "rollouts"),
    "verify": Following("curate", "verdicts"),
    "curate": Following("pack", "conversations", "midtrain"),
    "pack": Following("midtrain", "data"),
    "midtrain": Following("sft", "base", MODEL),
    "sft": Following("dpo", "base", MODEL),
    "dpo": Following("grpo", "base", MODEL),
    "grpo": Following("evaluate", "model", MODEL),
    "distill": Following("evaluate", "model", MODEL),
}
PAIRS: Final = Following("dpo", "pairs", "pairs")
OWN_ROLLOUTS: Final = Following("generate", "teacher.path", MODEL)
NOT_GRADED: Final = ("gold_unreadable", "timeout", "error")
TRAJECTORIES: Final = Following("verify", "rollouts", "rollouts")


def closing_lines(stage: str, config: Any, preset: Path, seconds: float, *, is_part: bool) -> Iterator[str]:
    """What a person reads after a stage.

    Args:
        stage: that has run, or had run before.
        config: its configuration.
        preset: the YAML file that it was started with.
        seconds: that this command took.
        is_part: whether another command runs this one.
    """
    run = RunDirectory(config.run.output)
    if not run.is_done:
        yield f"{stage}: this process's share is done in {duration(seconds)}; shards of others are still to come"
        return
    facts = run.closing_facts()
    yield f"{stage}: {', '.join(figures(stage, run.path, facts))}; {duration(seconds)}"
    yield f"  made: {run.path / MODEL if stage in MODEL_STAGES else run.path}"
    if not is_part:
        yield f"  next: {next_command(stage, run.path, preset, facts)}"


def figures(stage: str, output: Path, facts: Mapping[str, Any]) -> list[str]:
    """The three figures that matter, in words; fewer where a stage has fewer."""
    return FIGURES_OF.get(stage, _counts)(output, facts)


def _counts(_: Path, facts: Mapping[str, Any]) -> list[str]:
    """The rows, and the largest of the other counts."""
    counts = {name: value for name, value in facts.items() if isinstance(value, int) and not isinstance(value, bool)}
    order = sorted(counts, key=lambda name: (name != "rows", -counts[name]))
    return [f"{name} {counts[name]:,}" for name in order[:FIGURES]]


def _verified(_: Path, facts: Mapping[str, Any]) -> list[str]:
    rows = int(facts["rows"])
    # What could not be graded is told where there is any: a grader that fails must not look like a weak model.
    names = ["correct", "wrong", *(name for name in NOT_GRADED if facts.get(name, 0))]
    return [f"answers {rows:,}", *(f"{name} {facts.get(name, 0) / max(rows, 1):.1%}" for name in names)]


def _prepared(_: Path, facts: Mapping[str, Any]) -> list[str]:
    return [f"{name} {facts[name]:,}" for name in ("read", "problems", "rollouts") if name in facts]


def _packed(_: Path, facts: Mapping[str, Any]) -> list[str]:
    return [f"rows {facts['rows']:,}", f"tokens {facts['tokens']:,}", f"empty {facts['empty share']:.2%}"]


def _model(_: Path, facts: Mapping[str, Any]) -> list[str]:
    return [f"parameters {facts['parameters']:,}"]


def _trained(*names: str) -> Callable[[Path, Mapping[str, Any]], list[str]]:
    def told(output: Path, facts: Mapping[str, Any]) -> list[str]:
        lines = list(read_metrics(output))
        found = ((name, newest_mean(lines, name)) for name in names)
        return [f"steps {facts['steps']:,}", *(f"{n} {v:.4g}" for n, v in found if v is not None)]

    return told


def _evaluated(output: Path, facts: Mapping[str, Any]) -> list[str]:
    result = read_result(output / RESULTS_FILE)
    error = "" if math.isnan(result.stderr) else f" ± {100 * result.stderr:.1f}"
    return [
        f"pass@1 {100 * result.pass1:.1f}{error} %",
        f"questions {facts['questions']:,}",
        f"samples {facts['samples']}",
    ]


FIGURES_OF: Final[Mapping[str, Callable[[Path, Mapping[str, Any]], list[str]]]] = {
    "base": _model,
    "prepare": _prepared,
    "verify": _verified,
    "pack": _packed,
    "midtrain": _trained("loss", "val_loss"),
    "sft": _trained("loss", "val_loss"),
    "dpo": _trained("loss", "accuracy"),
    "grpo": _trained("reward", "pass_rate"),
    "distill": _trained("reverse_kl", "pass_rate"),
    "evaluate": _evaluated,
    "export": _model,
}


def next_command(stage: str, output: Path, preset: Path, facts: Mapping[str, Any]) -> str:
    """The command that follows in the recipe, in full.

    Args:
        stage: that is done.
        output: its run directory.
        preset: the YAML file that it was started with; of the next stage the preset of the same name is taken.
        facts: its closing facts.
    """
    name = preset.stem.removesuffix(SECOND_PASS)
    if stage == "base":
        return _phimr("generate", "--config", str(_preset("generate", name)))
    if stage == "prepare" and "rollouts" not in facts:
        asked = f"problems.path={output / 'problems'}"
        return _phimr("generate", "problems.kind=records", asked, f"teacher.engine.endpoint.base_urls=[{A_SERVER}]")
    if stage == "evaluate":
        return _phimr("report", str(output))
    if stage == "export":
        return _phimr("chat", str(output / MODEL))
    following = _following(stage, output, name, facts)
    file = _preset(following.stage, name, following.key, output.name)
    return _phimr(following.stage, "--config", str(file), *_overrides(file, following, output))


def _phimr(*words: str) -> str:
    return shlex.join(("phimr", *words))


def _following(stage: str, output: Path, name: str, facts: Mapping[str, Any]) -> Following:
    if stage == "prepare":
        return TRAJECTORIES
    if stage == "curate" and "pairs" in facts:
        return PAIRS
    if stage == "sft" and _preset("generate", name, OWN_ROLLOUTS.key, output.name).stem.endswith(SECOND_PASS):
        return OWN_ROLLOUTS
    return NEXT[stage]


def _preset(stage: str, name: str, key: str = "", made_by: str = "") -> Path:
    """The preset of a stage, of a name; that of the second pass where it reads what a run of that name made."""
    first, second = (PRESETS / stage / f"{stem}.yaml" for stem in (name, f"{name}{SECOND_PASS}"))
    if _exists(second) and made_by and made_by in Path(_paths(second).get(key, "")).parts:
        return second
    return first if _exists(first) else PRESETS / stage / "paper.yaml"


def _exists(preset: Path) -> bool:
    try:
        find_config(preset)
    except UserError:
        return False
    return True


def _paths(preset: Path) -> dict[str, str]:
    """The texts of a preset by their dotted keys."""
    return {key: value for key, value in flat(read_preset(preset)).items() if isinstance(value, str)}


def _overrides(preset: Path, following: Following, output: Path) -> list[str]:
    """What a preset does not say by itself: paths beside its own output lie beside this one's here."""
    usual = _paths(preset)
    root = Path(usual["run.output"]).parent
    places = dict(usual)
    if following.stage == "curate":
        # Lengths are counted with the tokenizer that rows are packed with.
        packed = _paths(_preset("pack", preset.stem.removesuffix(SECOND_PASS)))
        places = {"tokenizer": packed["tokenizer"], **places}
    wanted = {
        key: str(output.parent / Path(value).relative_to(root))
        for key, value in places.items()
        if Path(value).is_relative_to(root)
    }
    # "own-rollouts" are not graded into the directory that "rollouts" were.
    usual_name = Path(usual.get(following.key, "")).name
    if usual_name and not following.made and output.name.endswith(usual_name):
        target = Path(wanted["run.output"])
        prefix = output.name.removesuffix(usual_name)
        wanted["run.output"] = str(target.with_name(prefix + target.name.removeprefix(prefix)))
    wanted[following.key] = str(output / following.made)
    return [f"{key}={value}" for key, value in wanted.items() if usual.get(key) != value]


SHOWN_QUESTIONS: Final = 3
SHOWN_CHARS: Final = 200


def answers(evaluation: Path) -> Iterator[str]:
    """The first questions of an evaluation: how the first response to each ends, and its verdict.

    Args:
        evaluation: its run directory.

    Raises:
        UserError: it is absent, unfinished or damaged.
    """
    columns = ["question", "answer", "response", "verdict"]
    seen: set[str] = set()
    for row in read_table(evaluation / VERDICTS, "verdicts", columns).to_pylist():
        if row["question"] in seen:
            continue
        seen.add(row["question"])
        ending = row["response"].strip().rpartition("\n")[2][-SHOWN_CHARS:]
        yield f"  {printable(row['question'])}"
        yield f"    {printable(ending) or '(nothing)'}  [{row['verdict']}; the answer is {printable(row['answer'])}]"
        if len(seen) == SHOWN_QUESTIONS:
            return


def to_type(*words: str) -> str:
    """A `phimr` command as it is typed in this shell: the environment first, where it is not active."""
    command = shlex.join(("phimr", *words))
    if shutil.which("phimr") is not None:
        return command
    activate = os.path.relpath(Path(sys.prefix) / "bin" / "activate")
    return f". {shlex.quote(activate)} && {command}"
