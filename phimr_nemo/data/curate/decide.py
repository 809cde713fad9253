"""The global decisions of curation, bucket by bucket over narrow columns: the fate of every rollout in every set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from phimr_nemo.config import CurateConfig
from phimr_nemo.config.data import PromptSet, SFTSet
from phimr_nemo.data.curate.fates import (
    Fates,
    Indices,
    balance_cells,
    balanced,
    midtrain_fates,
    pair_fates,
    prompts,
    sft_fates,
)
from phimr_nemo.data.curate.narrow import CORRECT, VERDICTS, Narrow
from phimr_nemo.data.curate.shape import Bytes, length_bins
from phimr_nemo.data.curate.survey import Survey
from phimr_nemo.data.fate import Fate


@dataclass
class Candidates:
    """Rollouts that may be paired; every array is [candidates], problem by problem in the order of first rollouts.

    Attributes:
        rows: of the rollouts.
        groups: the first rollout of each one's problem.
        right: whether it is right.
    """

    rows: Indices
    groups: npt.NDArray[np.int32]
    right: npt.NDArray[np.bool_]


@dataclass
class ChosenPrompts:
    """Problems that became prompts, in the order of their first rollouts; every array is [prompts]."""

    rows: Indices
    pass_rate: npt.NDArray[np.float64]
    mean_length: npt.NDArray[np.float64]
    length_spread: npt.NDArray[np.float64]


@dataclass
class Decisions:
    """What is to be written. `fates` and the arrays by row take 11 bytes a rollout, and one more a set.

    Attributes:
        fates: of every rollout, for the sets of conversations and for pairs (whose kept ones are candidates).
        bytes, difficulty, bins, verdict: of every rollout.
        first: the first rollout of the problem of every rollout, for pairs; else empty.
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
    prompts: ChosenPrompts | None = None
    prompt_counts: Indices = field(default_factory=lambda: np.zeros(len(Fate), np.int64))
    problems: int = 0
    ungraded: int = 0


def decide(config: CurateConfig, survey: Survey) -> Decisions:
    """Decide the fate of every rollout in every set that is configured."""
    rows = survey.rows
    named = [name for name in ("midtrain", "sft", "pairs") if getattr(config, name) is not None]
    decisions = Decisions(
        fates={name: np.zeros(rows, np.uint8) for name in named},
        bytes=np.zeros(rows, np.int32),
        difficulty=np.zeros(rows, np.uint8),
        bins=np.zeros(rows, np.uint8),
        verdict=np.zeros(rows, np.uint8),
        first=np.zeros(rows if config.pairs is not None else 0, np.int32),
    )
    clean: list[tuple[Indices, npt.NDArray[np.uint64], Bytes]] = []
    chosen: list[ChosenPrompts] = []
    for narrow in survey.buckets():
        place = narrow["row"]
        decisions.bytes[place], decisions.difficulty[place] = narrow["bytes"], narrow["difficulty"]
        decisions.bins[place] = length_bins(narrow["tokens"], narrow["characters"])
        decisions.verdict[place] = np.minimum(narrow["verdict"], len(VERDICTS))
        decisions.problems += len(np.unique(narrow["problem"]))
        if config.midtrain is not None:
            fates = midtrain_fates(narrow, max_per_problem=config.midtrain.max_per_problem)
            decisions.fates["midtrain"][place] = fates
        if config.sft is not None:
            fates = _sft(narrow, config.sft)
            decisions.fates["sft"][place] = fates
            if config.sft.size is not None:
                kept = narrow[fates == Fate.KEPT]
                clean.append((kept["row"], kept["rollout"], balance_cells(kept)))
        if config.pairs is not None:
            fates = pair_fates(narrow)
            if not config.pairs.voted_golds:
                fates[narrow["voted"]] = Fate.VOTED_GOLD
            decisions.fates["pairs"][place] = fates
            decisions.first[place] = _first_of_problem(narrow)
        if config.prompts is not None:
            chosen.append(_prompts(narrow, config.prompts, decisions))
    if config.sft is not None and config.sft.size is not None:
        kept_rows, order, cells = (np.concatenate(parts) for parts in zip(*clean, strict=True))
        left = balanced(cells, order, config.sft.size)
        decisions.fates["sft"][kept_rows[~left]] = Fate.BALANCE
    if config.prompts is not None:
        decisions.prompts = _first_come(chosen)
    return decisions


def _sft(narrow: Narrow, chosen: SFTSet) -> Fates:
    return sft_fates(
        narrow,
        difficulties=chosen.difficulties,
        max_per_problem=chosen.max_per_problem,
        max_repetition=chosen.max_repetition,
        one_boxed_answer=chosen.one_boxed_answer,
    )


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
    return Candidates(rows, groups, decisions.verdict[rows] == CORRECT)


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
