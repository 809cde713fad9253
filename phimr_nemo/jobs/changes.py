"""What a run was made from, and what of it has changed since: asked before a run is continued, reused or reported."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import (
    CurateConfig,
    GenerateConfig,
    ModelTeacher,
    PackConfig,
    PrepareConfig,
    SourceConfig,
    SupervisedConfig,
    VerifyConfig,
    to_dict,
)
from phimr_nemo.config.load import flat, read_preset
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.continuing import ORIGIN_FILE
from phimr_nemo.jobs.preflight import grader_of
from phimr_nemo.store.content import content_id
from phimr_nemo.store.provenance import MADE_FROM, FileHashes, MadeFrom, content_of, read_made_from, tokenizer_content
from phimr_nemo.store.runs import CONFIG_FILE, HASHES_FILE, RUN_FILE, RunDirectory, code_versions
from phimr_nemo.verify.plug import plugged_name

# Another server with the same model gives the same responses.
_ENDPOINT: Final = (
    *("base_urls", "api_key_env", "concurrency", "idle_seconds", "total_seconds", "attempts", "backoff_seconds"),
    "prices",
)
_ENGINE: Final = (
    *("base_urls", "api_key_env", "in_flight", "request_seconds", "attempts", "probe_seconds", "recovery_seconds"),
    *(
        "bucket_mb",
        "directory",
        "transfer",
        "transfer_seconds",
        "max_batch",
        "cache_gib",
        "tensor",
        "memory_share",
        "eager",
        "max_missing",
    ),
    *(f"endpoint.{name}" for name in _ENDPOINT),
)
FREE_TO_CHANGE: Final = (
    "run.log_every",
    "parallel.",
    "checkpoint.",
    "micro_batch",
    "overlap.",
    "guard.",
    "evaluation.",
    "tracking.",
    "data_workers",
    "packed",
    "shard.",
    "workers",
    "verify_workers",
    "monitor.",
    *(f"{place}engine.{name}" for place in ("", "teacher.", "judge.ask.", "annotation.ask.") for name in _ENGINE),
    *(f"teacher.endpoint.{name}" for name in _ENDPOINT),
    *(
        f"{place}.ask.max_{name}"
        for place in ("judge", "annotation")
        for name in ("requests", "total_tokens", "cost")
    ),
)
"""Settings that a continued run may change: they do not change what is computed."""
OUTPUT: Final = "run.output"
CHECKPOINTS: Final = "step=*"
NOT_RECORDED: Final = "an earlier version did not record what it was made from"


def made_from(config: Any, hashes: FileHashes | None = None) -> MadeFrom:
    """What decides what a stage makes.

    Args:
        config: of the stage.
        hashes: of files that are known already.

    Raises:
        UserError: a grader of the user's own cannot be found.
    """
    hashes = hashes or FileHashes()
    inputs = {key: content_of(value, hashes) for key, value in _deciding(config) if isinstance(value, Path)}
    if isinstance(config, PackConfig | CurateConfig) and config.tokenizer is not None:
        inputs["tokenizer"] = tokenizer_content(config.tokenizer, hashes)
    grader = grader_of(config)
    if grader is not None and not isinstance(config, SupervisedConfig):
        inputs["grader"] = content_id("grader", plugged_name(grader))
    return MadeFrom(inputs, deciding_settings(config))


def deciding_settings(config: Any) -> dict[str, Any]:
    """The settings that decide what a stage makes; paths are none, what they hold is an input."""
    return {key: value for key, value in _deciding(config) if not isinstance(value, Path)}


def _deciding(config: Any) -> Iterator[tuple[str, Any]]:
    for key, value in _leaves(config, ""):
        if key != OUTPUT and not key.startswith(FREE_TO_CHANGE):
            yield key, value


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of a configuration under its dotted key; paths stay paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if isinstance(value, SourceConfig) and not value.hub:
            # A name on the hub otherwise.
            fields["path"] = Path(value.path)
        value = fields
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, tuple | list) and any(map(_is_more_than_a_value, value)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}.{number}")
    else:
        yield key, value


def _is_more_than_a_value(item: Any) -> bool:
    return isinstance(item, Path) or dataclasses.is_dataclass(item)


# A run and what it was begun from --------------------------------------------------------------------------


def begun_from(run: RunDirectory) -> MadeFrom | None:
    """What a run was begun from; None for one that was not begun, or by a version that did not record it.

    Raises:
        UserError: the description of a run that has made something is damaged.
    """
    described = run.description()
    return None if described is None else read_made_from(described.get(MADE_FROM))


def changes(run: RunDirectory, config: Any) -> list[str]:
    """What is different from what a run was begun from, in words; nothing for a run that was not begun.

    Raises:
        UserError: as :func:`begun_from`.
    """
    before = begun_from(run)
    if before is None and run.is_done and run.description() is not None:
        return [NOT_RECORDED]
    return [] if before is None else before.changes(made_from(config, FileHashes(run.path / HASHES_FILE)))


def changed_settings(run: RunDirectory, config: Any) -> list[str]:
    """The settings among :func:`changes`, without a look at the inputs.

    Raises:
        UserError: as :func:`begun_from`.
    """
    before = begun_from(run)
    return [] if before is None else before.changed_settings(MadeFrom({}, deciding_settings(config)))


def check_same_settings(run: RunDirectory, config: Any) -> None:
    """An output directory belongs to one configuration.

    Raises:
        UserError: it was begun with other settings; they are named.
    """
    changed = changed_settings(run, config)
    if changed:
        raise UserError(
            f"{run.path} holds a run with other settings ({'; '.join(changed)})",
            rule="an output directory belongs to one configuration",
            remedy=_choice(run),
        )


def _continued(run: RunDirectory) -> MadeFrom | None:
    """What the run was made from whose checkpoint `phimr continue` has put here; None where it put none."""
    try:
        origin = json.loads((run.path / ORIGIN_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return read_made_from(origin.get(MADE_FROM)) if isinstance(origin, dict) else None


def is_remade(config: Any) -> bool:
    """Whether a stage looks at each shard that it finds, and makes again what was made from something else.

    What a model was sampled for is too dear for that.
    """
    if isinstance(config, GenerateConfig):
        return not isinstance(config.teacher, ModelTeacher)
    return isinstance(config, PrepareConfig | VerifyConfig | CurateConfig | PackConfig)


def check_same_run(stage: str, run: RunDirectory, config: Any) -> MadeFrom:
    """An output directory belongs to one configuration and to the inputs that it was begun with.

    Args:
        stage: its name.
        run: the output.
        config: of the stage.

    Returns:
        What the run is made from now.

    Raises:
        UserError: the directory was made with other settings or from other inputs; they are named.
    """
    check_same_settings(run, config)
    before, hashes = begun_from(run), FileHashes(run.path / HASHES_FILE)
    now = made_from(config, hashes)
    if run.path.is_dir() and not run.is_done:
        hashes.keep()
    began = _continued(run) if before is None else before
    changed = [] if began is None else began.changed_inputs(now)
    if before is None and not run.is_done and run.description() is not None:
        print(f"{stage}: the run in {run.path}: {NOT_RECORDED}, so it is not compared", flush=True)
    if changed and (run.is_done or not is_remade(config)):
        ended = f"has finished ({run.finished_at()})" if run.is_done else "was begun"
        raise UserError(
            f"the run in {run.path} {ended} with other inputs ({'; '.join(changed)})",
            rule="what is continued, reused or reported was made from what its inputs hold now",
            remedy=f"restore them; or {_choice(run)}",
        )
    is_continued = (run.path / ORIGIN_FILE).is_file()
    if before is None and not is_continued and run.description() is None and any(run.checkpoints.glob(CHECKPOINTS)):
        raise UserError(
            f"{run.path} has checkpoints and no {RUN_FILE}, which says what they were made from",
            rule="what is continued was made from what its inputs hold now",
            remedy=f"restore {RUN_FILE}; or {_choice(run)}",
        )
    for change in changed:
        print(f"{stage}: {change}; what was made from it is made again", flush=True)
    return now


def check_inputs_stayed(stage: str, run: RunDirectory, config: Any, began: MadeFrom) -> None:
    """What a data stage has read is what it was begun with. (A model is read once, when its stage begins.)

    Args:
        stage: its name.
        run: the output.
        config: of the stage.
        began: what it was made from when it began.

    Raises:
        UserError: an input was replaced meanwhile; it is named.
    """
    if not is_remade(config):
        return
    now, below = made_from(config, FileHashes(run.path / HASHES_FILE)), run.path.resolve().parents
    # A directory of somebody's files that holds the output too is another one now, and its rows are the same.
    holding = {key for key, value in _deciding(config) if isinstance(value, Path) and value.resolve() in below}
    compared = {name: content for name, content in now.inputs.items() if name not in holding}
    replaced = MadeFrom({name: began.inputs[name] for name in compared}, {}).changed_inputs(MadeFrom(compared, {}))
    if replaced:
        raise UserError(
            f"{stage}: an input was replaced while it was read ({'; '.join(replaced)})",
            rule="what is made comes from one content of each input, which its manifest names",
            remedy="run the same command again: what was made from the old content is made again",
        )


def _choice(run: RunDirectory) -> str:
    return (
        f"choose another run.output, or remove the directory to make it again: rm -r {shlex.quote(str(run.path))}; "
        "`phimr continue` goes on from a training run's checkpoint with other settings"
    )


def finished_line(stage: str, run: RunDirectory, config: Any) -> str:
    """What is said of a finished run that is asked for again: when it ended, and what has changed since."""
    told = f"{stage}: has finished already ({run.finished_at()}), nothing is made again"
    if begun_from(run) is None:
        return f"{told}; {NOT_RECORDED}, so it is not compared"
    notes = [*_free_changes(run, config), *_other_code(run)]
    changed = f"; changed since, without changing what it holds: {'; '.join(notes)}" if notes else ""
    return f"{told}; its inputs and settings are as they were{changed}"


def _free_changes(run: RunDirectory, config: Any) -> Iterator[str]:
    """Settings that may change and did; the places of inputs and output among them."""
    before = flat(read_preset(run.path / CONFIG_FILE))
    now = flat(to_dict(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"


def _other_code(run: RunDirectory) -> Iterator[str]:
    described = run.description() or {}
    before, now = described.get("versions"), code_versions()
    if isinstance(before, Mapping):
        for name in sorted(now):
            if before.get(name) != now[name]:
                yield f"{name}: {before.get(name)} there, {now[name]} now"
