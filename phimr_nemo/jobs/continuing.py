"""What a run has on the disk to go on from, and a new run that goes on from a checkpoint of another one: with more
steps, another learning rate, another weight.

The new run begins with what the old one had at that step: its checkpoint, its metrics up to there, DPO's reference,
GRPO's rounds ahead. The old run is only read. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from phimr_nemo.config import STAGES, load_config, to_dict
from phimr_nemo.config.load import flat
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.preflight import planned_steps
from phimr_nemo.store.atomic import atomic_write_text, explain_os_errors, write_json
from phimr_nemo.store.provenance import MADE_FROM, content_of, read_made_from
from phimr_nemo.store.responses import DIRECTORY as RESPONSES
from phimr_nemo.store.runs import CONFIG_FILE, METRICS_FILE, RUN_FILE, RunDirectory, read_metrics
from phimr_nemo.training.seal import (
    SEAL_FILE,
    checkpoint_name,
    checkpoint_step,
    checkpoints,
    damaged_files,
    is_sealed,
    remove_checkpoint,
    usable_checkpoints,
)

ORIGIN_FILE: Final = "continues.json"
"""Which run and step a directory goes on from; written when everything is there."""
TRAINED: Final = ("midtrain", "sft", "dpo", "grpo", "distill")
FIXED: Final = (
    *("base", "data", "pairs", "prompts", "teacher.path", "sequence_length", "overlong", "run.seed", "loss_on"),
    *("global_batch", "prompts_per_step", "validation_rows", "validation_pairs"),
)
"""What the steps so far were made of: a checkpoint's place in its data means nothing in other data."""
STAYS_EXACT: Final = ("reference.safetensors",)
BY_STEP: Final = (RESPONSES, "evaluation", "pending", "guard")
"""Directories of files whose names end in the step."""
_LOGGER: Final = logging.getLogger(__name__)


def kept(path: Path) -> str:
    """What of a run directory will not be done again, in words: the newest whole checkpoint, or finished shards."""
    usable, _ = usable_checkpoints(RunDirectory(path).checkpoints)
    if usable:
        return str(usable[0])
    shards = sum(1 for _ in path.rglob("part-*.json"))
    return f"{shards} finished shards in {path}" if shards else f"nothing yet in {path}"


@dataclass(frozen=True)
class Continuation:
    """A run that is to go on from another one's checkpoint.

    Attributes:
        run: the old run's directory.
        target: the new one's.
        stage: of both.
        settings: overrides of the old run's settings, `run.output` among them.
        checkpoint: where it goes on; None where `target` has what it needs already.
    """

    run: Path
    target: Path
    stage: str
    settings: list[str]
    checkpoint: Path | None

    @property
    def config(self) -> Path:
        """The old run's settings."""
        return self.run / CONFIG_FILE

    def begin(self) -> None:
        """Put into `target` what `run` had at the checkpoint's step, unless that was done before.

        Raises:
            UserError: the disk is full or the place cannot be written.
        """
        if self.checkpoint is not None:
            with explain_os_errors(self.target):
                _copy(self.run, self.target, self.checkpoint)


def continuation(run: Path, target: Path, step: int | None, overrides: list[str]) -> Continuation:
    """What `phimr continue` is asked for, checked; nothing is written.

    Args:
        run: the old run's directory.
        target: the new one's.
        step: whose checkpoint; None = the newest that is whole.
        overrides: settings that differ from the old run's.

    Raises:
        UserError: no training run or checkpoint there, a damaged one, a setting that cannot change, no step left to
            make, or `target` holds something else.
    """
    own = [item for item in overrides if item.partition("=")[0] == "run.output"]
    if own:
        raise UserError(
            f"{own[0]} with phimr continue",
            rule="the new run's directory is the second argument",
            remedy="leave run.output out",
        )
    stage, settings = _stage(run), [*overrides, f"run.output={target}"]
    config: Any = load_config(STAGES[stage], run / CONFIG_FILE, settings)
    _check_fixed(run, to_dict(config))
    if (target / ORIGIN_FILE).is_file():
        _check_origin(run, target, step)
        return Continuation(run, target, stage, settings, None)
    if (target / CONFIG_FILE).is_file():
        raise UserError(
            f"{target} holds a run already",
            rule="a continued run has a directory of its own",
            remedy="name another directory",
        )
    chosen = _chosen(run, step)
    _check_steps(stage, config, run, chosen)
    return Continuation(run, target, stage, settings, chosen)


def _stage(run: Path) -> str:
    try:
        stage = str(json.loads((run / RUN_FILE).read_text("utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        stage = ""
    if stage not in TRAINED or not (run / CONFIG_FILE).is_file():
        raise UserError(
            f"{run} holds no training run" + (f", but one of {stage}" if stage else ""),
            rule=f"a run of {', '.join(TRAINED)} can be continued: its directory has {CONFIG_FILE} and {RUN_FILE}",
            remedy="give its run.output (`phimr status` lists the runs)",
        )
    return stage


def _check_fixed(run: Path, now: Mapping[str, Any]) -> None:
    before, after = flat(yaml.safe_load((run / CONFIG_FILE).read_text("utf-8"))), flat(now)
    made_from = read_made_from((RunDirectory(run).description() or {}).get(MADE_FROM))
    inputs = {} if made_from is None else made_from.inputs
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    # An input that was moved is the same.
    fixed = [
        key
        for key in changed
        if key in FIXED and not (key in inputs and content_of(Path(str(after.get(key)))) == inputs[key])
    ]
    if fixed:
        raise UserError(
            "; ".join(f"{key}: {before.get(key)!r} in {run}, {after.get(key)!r} now" for key in fixed),
            rule="a run goes on in the data that it began with, at the place where its checkpoint stands",
            remedy=f"leave {', '.join(fixed)} out, or start a new run with base={run / 'hf'}",
        )


def _chosen(run: Path, step: int | None) -> Path:
    """The checkpoint to go on from, whole by its checksums."""
    directory = RunDirectory(run).checkpoints
    usable, notes = usable_checkpoints(directory)
    for path in usable if step is None else [path for path in usable if checkpoint_step(path) == step]:
        if not (names := damaged_files(path)):
            return path
        notes.append(f"{path} is damaged ({', '.join(names)}: wrong checksum)")
        _LOGGER.warning("%s", notes[-1])
    there = ", ".join(str(checkpoint_step(path)) for path in reversed(usable) if not damaged_files(path)) or "none"
    wanted = "a whole checkpoint" if step is None else f"a whole checkpoint of step {step}"
    raise UserError(
        f"{run} has no {wanted.removeprefix('a ')}" + (f": {'; '.join(notes)}" if notes else ""),
        rule=f"whole checkpoints are there of the steps: {there} (checkpoint.keep says how many are kept)",
        remedy="give --step one of them" if there != "none" else "run its own command to its next checkpoint",
    )


def _check_steps(stage: str, config: Any, run: Path, chosen: Path) -> None:
    steps, done = planned_steps(stage, config), checkpoint_step(chosen)
    if steps is not None and steps <= done:
        key = "steps" if stage in ("grpo", "distill") else "max_steps or epochs"
        raise UserError(
            f"{run} stands at step {done}, and the settings end at step {steps}",
            rule="a continued run makes at least one step",
            remedy=f"raise {key}, or give an earlier --step",
        )


def _check_origin(run: Path, target: Path, step: int | None) -> None:
    path = target / ORIGIN_FILE
    try:
        origin = json.loads(path.read_text("utf-8"))
        continued, began = str(origin["run"]), int(origin["step"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {error!r:.200}",
            rule="it is a JSON object that says which run and step a directory goes on from",
            remedy="name another directory, or remove this one",
        ) from error
    if continued != str(run.resolve()) or step not in (None, began):
        raise UserError(
            f"{target} continues {continued} from step {began}",
            rule="a directory goes on from one checkpoint",
            remedy="name another directory",
        )


def _copy(run: Path, target: Path, chosen: Path) -> None:
    step = checkpoint_step(chosen)
    for path in checkpoints(RunDirectory(run).checkpoints):
        # Earlier ones may be the best by what was measured; a damaged one is not taken along.
        if checkpoint_step(path) == step or (checkpoint_step(path) < step and _is_whole(path)):
            _link_checkpoint(path, RunDirectory(target).checkpoints / checkpoint_name(checkpoint_step(path)))
    for name in STAYS_EXACT:
        if (run / name).is_file():
            _link(run / name, target / name)
    for folder in BY_STEP:
        for file in sorted((run / folder).glob("*")) if (run / folder).is_dir() else ():
            digits = file.stem.rpartition("-")[2]
            if file.is_file() and digits.isdigit() and int(digits) <= step:
                _link(file, target / folder / file.name)
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    atomic_write_text(target / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    described = RunDirectory(run).description() or {}
    # What the checkpoint was trained on, for the new run to compare.
    write_json(target / ORIGIN_FILE, {"run": str(run.resolve()), "step": step, MADE_FROM: described.get(MADE_FROM)})


def _is_whole(path: Path) -> bool:
    return is_sealed(path) and not damaged_files(path)


def _link_checkpoint(source: Path, target: Path) -> None:
    """The seal comes last, so what a kill leaves is an unfinished checkpoint."""
    if target.exists():
        remove_checkpoint(target)
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path.name != SEAL_FILE]
    for file in [*files, source / SEAL_FILE]:
        _link(file, target / file.relative_to(source))


def _link(source: Path, target: Path) -> None:
    """A second name of a file, which no run changes in place; a copy where the file system has no such names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
