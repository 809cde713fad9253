"""The stage `curate`: verdicts -> training sets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

from phimr_nemo.config import CurateConfig
from phimr_nemo.data.curate.decide import Decisions, decide, load_decisions, save_decisions
from phimr_nemo.data.curate.lengths import token_counter
from phimr_nemo.data.curate.narrow import VERDICTS
from phimr_nemo.data.curate.pairing import write_pairs
from phimr_nemo.data.curate.sets import (
    DROPPED,
    INPUT,
    Making,
    begin_set,
    counts_of,
    kind_of,
    write_conversations,
    write_prompts,
)
from phimr_nemo.data.curate.shape import SHAPE_FILE, shape_where
from phimr_nemo.data.curate.survey import Survey, shards_of, survey
from phimr_nemo.data.parallel import Team, team_of
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.lease import FreeUnits
from phimr_nemo.store.provenance import MadeFrom, tokenizer_content
from phimr_nemo.store.shards import (
    finish,
    is_complete,
    read_manifest,
)

_LOGGER = logging.getLogger(__name__)

SETS: Final = ("midtrain", "sft", "pairs", "prompts")
SURVEY: Final = "survey"
TOKENIZER_FILE: Final = "tokenizer.json"
DECISIONS_FILE: Final = "decisions.npy"


def run_curate(config: CurateConfig) -> dict[str, int]:
    """Write each training set that the configuration names to its own directory of the output.

    Decisions are made on narrow columns, text is read shard by shard: memory does not grow with the text. A set
    that is there already, made from these verdicts, is left as it is. The processes of an array share the shards of
    verdicts and those of the sets; one of them decides, and all end when everything is there.

    Returns:
        Rows of each set.

    Raises:
        UserError: the verdicts are not finished, the tokenizer is unfit, or a set would be empty (its drops shown).
    """
    named = [name for name in SETS if getattr(config, name) is not None]
    output = config.run.output
    shards = shards_of(config.verdict_directories)
    missing = [name for name in named if not _is_made(config, name)]
    if missing:
        counter = token_counter(
            config.tokenizer,
            output / SURVEY / TOKENIZER_FILE,
            limit=_smallest_limit(config),
            prompt_limit=None if config.prompts is None else config.prompts.max_tokens,
        )
        _warn_of_estimates(config)
        with team_of(config.shard, output) as team:
            surveyed = survey(shards, output / SURVEY, counter=counter, workers=config.workers, team=team)
            making = Making(surveyed, _decisions(config, missing, surveyed, team), config.workers, team)
            for name in missing:
                _make_set(config, name, making)
    return {name: read_manifest(output / name, kind_of(name)).rows for name in named}


def _smallest_limit(config: CurateConfig) -> int | None:
    """The least number of tokens that a set compares conversations with."""
    sets = (config.midtrain, config.sft, config.pairs)
    return min((one.max_tokens for one in sets if one is not None and one.max_tokens is not None), default=None)


def _warn_of_estimates(config: CurateConfig) -> None:
    if config.tokenizer is None and _smallest_limit(config) is not None:
        _LOGGER.warning(
            "max_tokens is compared with recorded or estimated lengths, and a stage may refuse a set; "
            "tokenizer=DIR, the directory of the model that is trained, counts them"
        )


def _decisions(config: CurateConfig, missing: Sequence[str], surveyed: Survey, team: Team) -> Decisions:
    """The decisions, and the directories of the missing sets begun; in an array, by the process that comes first."""
    path = config.run.output / SURVEY / DECISIONS_FILE
    if team.leases is None:
        return _decide(config, missing, surveyed)
    made_of = {name: _made_of(config, name).to_json() for name in SETS if getattr(config, name) is not None}
    facts = path.with_suffix(".json")

    def is_made(_: int) -> bool:
        return path.is_file() and facts.is_file() and json.loads(facts.read_text("utf-8")) == made_of

    for _ in FreeUnits([0], team.leases, name="decisions", is_done=is_made, wait=True).one_by_one():
        save_decisions(_decide(config, missing, surveyed), path)
        write_json(facts, made_of)
    return load_decisions(path)


def _decide(config: CurateConfig, missing: Sequence[str], surveyed: Survey) -> Decisions:
    decisions = decide(config, surveyed)
    _write_shape(config, decisions)
    for name in missing:
        _refuse_empty(config, name, counts_of(name, decisions))
        begin_set(config.run.output / name, _made_of(config, name))
    return decisions


def _write_shape(config: CurateConfig, decisions: Decisions) -> None:
    by_verdict = {
        name: shape_where(decisions.verdict, code, decisions.difficulty, decisions.bins).tolist()
        for code, name in enumerate(VERDICTS)
    }
    write_json(config.run.output / SHAPE_FILE, by_verdict)


def _made_of(config: CurateConfig, name: str) -> MadeFrom:
    """What decides the content of a set."""
    verdicts = [read_manifest(path, "verdicts").content for path in config.verdict_directories]
    inputs = {f"verdicts.{number}": content for number, content in enumerate(verdicts)}
    if config.tokenizer is not None:
        inputs["tokenizer"] = tokenizer_content(config.tokenizer)
    settings = asdict(getattr(config, name))
    # Sets of earlier releases do not name it, and stay as they are.
    if settings.get("delta", settings) is None:
        del settings["delta"]
    return MadeFrom(inputs, {"set": settings, "seed": config.run.seed})


def _is_made(config: CurateConfig, name: str) -> bool:
    directory, kind = config.run.output / name, kind_of(name)
    if not is_complete(directory, kind):
        return False
    return read_manifest(directory, kind).made_from == _made_of(config, name)


def _make_set(config: CurateConfig, name: str, making: Making) -> None:
    directory = config.run.output / name
    counts, made_from = counts_of(name, making.decisions), _made_of(config, name)
    if name == "pairs" and config.pairs is not None:
        dropped = write_pairs(directory, config.pairs, config.run.seed, making, made_from)
        counts = dict(Counter(counts) + Counter(dropped))
        _refuse_empty(config, name, counts)
    elif name == "prompts" and config.prompts is not None:
        write_prompts(directory, config.prompts.hard_below, making, made_from)
    else:
        write_conversations(directory, name, making, made_from)
    finish(directory, kind=kind_of(name), **made_from.to_json(), counts=counts)


def _refuse_empty(config: CurateConfig, name: str, counts: Mapping[str, int]) -> None:
    drops = {key.removeprefix(DROPPED): count for key, count in counts.items() if key.startswith(DROPPED)}
    if sum(drops.values()) == counts[INPUT[name]]:
        paths = [str(path) for path in config.verdict_directories]
        raise UserError(
            f"the {name} set of {paths} would be empty; dropped: {drops}",
            rule="a training set has at least one row",
            remedy=f"loosen {name}.* (with another run.output), or bring more or better rollouts",
        )
