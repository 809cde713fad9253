"""The stage `curate`: verdicts -> training sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

from phimr_nemo.config import CurateConfig
from phimr_nemo.data.curate.decide import Decisions, decide
from phimr_nemo.data.curate.narrow import VERDICTS
from phimr_nemo.data.curate.sets import (
    DROPPED,
    INPUT,
    begin_set,
    counts_of,
    kind_of,
    write_conversations,
    write_pairs,
    write_prompts,
)
from phimr_nemo.data.curate.shape import SHAPE_FILE, shape_where
from phimr_nemo.data.curate.survey import Shard, shards_of, survey
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.shards import (
    finish,
    is_complete,
    read_manifest,
)

SETS: Final = ("midtrain", "sft", "pairs", "prompts")
SURVEY: Final = "survey"


def run_curate(config: CurateConfig) -> dict[str, int]:
    """Write each training set that the configuration names to its own directory of the output.

    Decisions are made on narrow columns, text is read shard by shard: memory does not grow with the text. A set
    that is there already, made from these verdicts, is left as it is.

    Returns:
        Rows of each set.

    Raises:
        UserError: the verdicts are not finished, or a set would be empty (its drops are shown).
    """
    named = [name for name in SETS if getattr(config, name) is not None]
    output, inputs = config.run.output, config.verdict_directories
    shards = shards_of(inputs)
    missing = [name for name in named if not _is_made(config, name)]
    if missing:
        surveyed = survey(shards, output / SURVEY, quality=config.sft is not None, workers=config.workers)
        decisions = decide(config, surveyed)
        by_verdict = {
            name: shape_where(decisions.verdict, code, decisions.difficulty, decisions.bins).tolist()
            for code, name in enumerate(VERDICTS)
        }
        write_json(output / SHAPE_FILE, by_verdict)
        for name in missing:
            _make_set(config, name, shards, decisions)
    return {name: read_manifest(output / name, kind_of(name)).rows for name in named}


def _made_of(config: CurateConfig, name: str) -> MadeFrom:
    """What decides the content of a set."""
    verdicts = [read_manifest(path, "verdicts").content for path in config.verdict_directories]
    inputs = {f"verdicts.{number}": content for number, content in enumerate(verdicts)}
    return MadeFrom(inputs, {"set": asdict(getattr(config, name)), "seed": config.run.seed})


def _is_made(config: CurateConfig, name: str) -> bool:
    directory, kind = config.run.output / name, kind_of(name)
    if not is_complete(directory, kind):
        return False
    return read_manifest(directory, kind).made_from == _made_of(config, name)


def _make_set(config: CurateConfig, name: str, shards: Sequence[Shard], decisions: Decisions) -> None:
    directory = config.run.output / name
    counts = counts_of(name, decisions)
    _refuse_empty(config, name, counts)
    made_from = _made_of(config, name)
    begin_set(directory, made_from)
    if name == "pairs" and config.pairs is not None:
        unpaired = write_pairs(
            directory, shards, decisions, config.pairs, config.run.seed, workers=config.workers, made_from=made_from
        )
        counts = dict(Counter(counts) + Counter(unpaired))
        _refuse_empty(config, name, counts)
    elif name == "prompts" and config.prompts is not None:
        write_prompts(directory, shards, decisions, config.prompts.hard_below, config.workers, made_from)
    else:
        write_conversations(directory, shards, name, decisions, config.workers, made_from)
    finish(directory, kind=kind_of(name), **made_from.to_json(), counts=counts)


def _refuse_empty(config: CurateConfig, name: str, counts: Mapping[str, int]) -> None:
    drops = {key.removeprefix(DROPPED): count for key, count in counts.items() if key.startswith(DROPPED)}
    if sum(drops.values()) == counts[INPUT[name]]:
        paths = [str(path) for path in config.verdict_directories]
        raise UserError(
            f"the {name} set of {paths} would be empty; dropped: {drops}",
            rule="a training set has at least one row",
            remedy=f"loosen {name}.*, or bring more or better rollouts",
        )
