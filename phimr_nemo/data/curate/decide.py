"""The global decisions of curation over narrow columns sorted by problem: the fate of every rollout in every set.

The decisions are made by one process of an array, which leaves them in a file for the others."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.config import CurateConfig
from phimr_nemo.config.data import Delta, PairSet, PromptSet
from phimr_nemo.data.curate.balance import Kinds, chosen_fates
from phimr_nemo.data.curate.fates import (
    Fates,
    Indices,
    Sides,
    midtrain_fates,
    pair_fates,
    prompts,
    sft_fates,
    sides_by_teacher,
    sides_by_verdict,
)
from phimr_nemo.data.curate.narrow import VERDICTS, Narrow
from phimr_nemo.data.curate.shape import Bytes, length_bins
from phimr_nemo.data.curate.survey import Survey, teacher_codes
from phimr_nemo.data.fate import Fate
from phimr_nemo.store.atomic import atomic_file

_ARRAYS: Final = ("bytes", "difficulty", "bins", "verdict", "first", "chosen", "prompt_counts")


@dataclass
class Candidates:
    """Rollouts that may be paired; every array is [candidates], problem by problem in the order of first rollouts.

    Attributes:
        rows: of the rollouts.
        groups: the first rollout of each one's problem.
        chosen: whether it is of the side that is chosen.
    """

    rows: Indices
    groups: npt.NDArray[np.int32]
    chosen: npt.NDArray[np.bool_]


@dataclass
class ChosenPrompts:
    """Problems that became prompts, in the order of their first rollouts; every array is [prompts]."""

    rows: Indices
    pass_rate: npt.NDArray[np.float64]
    mean_length: npt.NDArray[np.float64]
    length_spread: npt.NDArray[np.float64]


@dataclass
class Decisions:
    """What is to be written. `fates` and the arrays by row take 12 bytes a rollout, and one more a set.

    Attributes:
        fates: of every rollout, for the sets of conversations and for pairs (whose kept ones are candidates).
        bytes, difficulty, bins, verdict: of every rollout.
        first: the first rollout of the problem of every rollout, for pairs; else empty.
        chosen: whether a rollout would be the chosen side of a pair; as `first`.
        prompts: the chosen ones.
        prompt_counts: problems by fate.
        problems: how many there are.
        ungraded: rollouts that say nothing about a prompt.
    """

    fates: dict[str, Fates]
    bytes: npt.NDArray[np.int32]
    difficulty: Bytes
    bins: Bytes
    verdict: Bytes
    first: npt.NDArray[np.int32]
    chosen: npt.NDArray[np.bool_]
    prompts: ChosenPrompts | None = None
    prompt_counts: Indices = field(default_factory=lambda: np.zeros(len(Fate), np.int64))
    problems: int = 0
    ungraded: int = 0


def decide(config: CurateConfig, survey: Survey) -> Decisions:
    """Decide the fate of every rollout in every set that is configured.

    Raises:
        UserError: a teacher whose responses are to be paired has none.
    """
    rows = survey.rows
    named = [name for name in ("midtrain", "sft", "pairs") if getattr(config, name) is not None]
    decisions = Decisions(
        fates={name: np.zeros(rows, np.uint8) for name in named},
        bytes=np.zeros(rows, np.int32),
        difficulty=np.zeros(rows, np.uint8),
        bins=np.zeros(rows, np.uint8),
        verdict=np.zeros(rows, np.uint8),
        first=np.zeros(rows if config.pairs is not None else 0, np.int32),
        chosen=np.zeros(rows if config.pairs is not None else 0, np.bool_),
    )
    delta = None if config.pairs is None else config.pairs.delta
    teachers = None if delta is None else teacher_codes(survey.shards, (delta.strong, delta.weak))
    kept: dict[str, list[tuple[Indices, Kinds]]] = {"midtrain": [], "sft": []}
    chosen: list[ChosenPrompts] = []
    for narrow in survey.buckets():
        place = narrow["row"]
        decisions.bytes[place], decisions.difficulty[place] = narrow["bytes"], narrow["difficulty"]
        decisions.bins[place] = length_bins(narrow["tokens"], narrow["characters"])
        decisions.verdict[place] = np.minimum(narrow["verdict"], len(VERDICTS))
        decisions.problems += len(np.unique(narrow["problem"]))
        for name in ("midtrain", "sft"):
            if name in named:
                fates = _conversation_fates(narrow, config, name)
                decisions.fates[name][place] = fates
                if _is_chosen(config, name):
                    left = narrow[fates == Fate.KEPT]
                    # Copied: a view would keep all columns.
                    kept[name].append((left["row"].copy(), Kinds.of(left)))
        if config.pairs is not None:
            sides = _sides(narrow, delta, None if teachers is None else teachers[place])
            decisions.fates["pairs"][place] = _pair_fates(narrow, sides, config.pairs)
            decisions.first[place], decisions.chosen[place] = _first_of_problem(narrow), sides.chosen
        if config.prompts is not None:
            chosen.append(_prompts(narrow, config.prompts, decisions))
    for name, parts in kept.items():
        if parts:
            _choose(decisions.fates[name], parts, config, name)
    if config.prompts is not None:
        decisions.prompts = _first_come(chosen)
    return decisions


def _conversation_fates(narrow: Narrow, config: CurateConfig, name: str) -> Fates:
    if name == "midtrain":
        assert config.midtrain is not None
        chosen = config.midtrain
        return midtrain_fates(narrow, max_per_problem=chosen.max_per_problem, max_tokens=chosen.max_tokens)
    assert config.sft is not None
    return sft_fates(
        narrow,
        difficulties=config.sft.difficulties,
        max_per_problem=config.sft.max_per_problem,
        max_repetition=config.sft.max_repetition,
        one_boxed_answer=config.sft.one_boxed_answer,
        max_tokens=config.sft.max_tokens,
    )


def _sides(narrow: Narrow, delta: Delta | None, teachers: npt.NDArray[np.uint8] | None) -> Sides:
    if delta is None or teachers is None:
        return sides_by_verdict(narrow)
    return sides_by_teacher(narrow, teachers == 0, teachers == 1, by_verdict=delta.by_verdict)


def _pair_fates(narrow: Narrow, sides: Sides, chosen: PairSet) -> Fates:
    fates = pair_fates(
        narrow,
        sides,
        difficulties=chosen.difficulties,
        max_repetition=chosen.max_repetition,
        max_tokens=chosen.max_tokens,
    )
    if not chosen.voted_golds and (chosen.delta is None or chosen.delta.by_verdict):
        fates[narrow["voted"]] = Fate.VOTED_GOLD
    return fates


def _is_chosen(config: CurateConfig, name: str) -> bool:
    """Whether the rows of a set of conversations are capped or balanced."""
    if name == "midtrain":
        return config.midtrain is not None and bool(config.midtrain.caps)
    return config.sft is not None and (config.sft.size is not None or bool(config.sft.caps))


def _choose(fates: Fates, parts: list[tuple[Indices, Kinds]], config: CurateConfig, name: str) -> None:
    """Cap and balance what a set of conversations has kept so far."""
    rows = np.concatenate([rows for rows, _ in parts])
    kinds = Kinds.joined([kinds for _, kinds in parts])
    if name == "midtrain":
        assert config.midtrain is not None
        fates[rows] = chosen_fates(kinds, caps=config.midtrain.caps, balance=(), size=None)
    else:
        assert config.sft is not None
        fates[rows] = chosen_fates(kinds, caps=config.sft.caps, balance=config.sft.balance, size=config.sft.size)


def _first_of_problem(narrow: Narrow) -> npt.NDArray[np.int32]:
    """The first rollout of each rollout's problem, [rows]."""
    _, problem = np.unique(narrow["problem"], return_inverse=True)
    first = np.full(len(narrow), np.iinfo(np.int32).max, np.int32)
    np.minimum.at(first, problem, narrow["row"].astype(np.int32))
    return np.asarray(first[problem])


def candidates(decisions: Decisions) -> Candidates:
    """The rollouts that may be paired, problem by problem in the order of first rollouts."""
    rows = np.flatnonzero(decisions.fates["pairs"] == Fate.KEPT)
    groups = decisions.first[rows]
    if (groups[1:] < groups[:-1]).any():
        order = np.lexsort((rows, groups))
        rows, groups = rows[order], groups[order]
    return Candidates(rows, groups, decisions.chosen[rows])


def _prompts(narrow: Narrow, chosen: PromptSet, decisions: Decisions) -> ChosenPrompts:
    voted = np.unique(narrow["problem"][narrow["voted"]])
    if len(voted) and not chosen.voted_golds:
        decisions.prompt_counts[Fate.VOTED_GOLD] += len(voted)
        narrow = narrow[~np.isin(narrow["problem"], voted)]
    found = prompts(
        narrow,
        min_pass=chosen.min_pass,
        max_pass=chosen.max_pass,
        min_samples=chosen.min_samples,
        max_length_spread=chosen.max_length_spread,
        max_tokens=chosen.max_tokens,
    )
    decisions.prompt_counts += np.bincount(found.fates, minlength=len(Fate))
    decisions.ungraded += found.ungraded
    kept = found.fates == Fate.KEPT
    return ChosenPrompts(found.row[kept], found.pass_rate[kept], found.mean_length[kept], found.length_spread[kept])


def _first_come(parts: list[ChosenPrompts]) -> ChosenPrompts:
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows)
    rates = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("pass_rate", "mean_length", "length_spread")
    )
    return ChosenPrompts(rows[order], *rates)


def save_decisions(decisions: Decisions, path: Path) -> None:
    """Write the decisions into one file; equal ones give equal bytes."""
    prompts = decisions.prompts or ChosenPrompts(np.zeros(0, np.int64), *(np.zeros(0),) * 3)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(sorted(decisions.fates), "U16"), allow_pickle=False)
        np.save(
            file,
            np.array([decisions.problems, decisions.ungraded, decisions.prompts is not None], np.int64),
            allow_pickle=False,
        )
        arrays = [decisions.fates[name] for name in sorted(decisions.fates)]
        arrays += [getattr(decisions, name) for name in _ARRAYS]
        for array in (*arrays, *(getattr(prompts, item.name) for item in fields(ChosenPrompts))):
            np.save(file, array, allow_pickle=False)


def load_decisions(path: Path) -> Decisions:
    """What :func:`save_decisions` wrote."""
    with path.open("rb") as file:

        def read() -> npt.NDArray[np.generic]:
            array: npt.NDArray[np.generic] = np.load(file, allow_pickle=False)
            return array

        names = read().tolist()
        problems, ungraded, has_prompts = read().tolist()
        fates = {name: read() for name in names}
        arrays = {name: read() for name in _ARRAYS}
        prompts = ChosenPrompts(*(read() for _ in fields(ChosenPrompts)))  # type: ignore[arg-type]
    return Decisions(
        fates=fates,  # type: ignore[arg-type]
        **arrays,  # type: ignore[arg-type]
        prompts=prompts if has_prompts else None,
        problems=problems,
        ungraded=ungraded,
    )
