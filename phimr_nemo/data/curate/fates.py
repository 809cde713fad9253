"""The rules of curation: pure functions from narrow columns to the fate of every rollout.

Mid-training takes every verified response, SFT a harder, cleaner and balanced part of them, DPO pairs a right with
a wrong response to one question (or a strong model's with a weak one's), reinforcement learning takes prompts that
are neither too easy nor too hard and answered at uniform length (arXiv 2504.21233, sections 3 and 4). A fate is
:attr:`Fate.KEPT` or the one reason why not, so what is kept and what is dropped always sum to what came in. Ties are
broken by content, so no fate depends on the order of the shards.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.lengths import CHARACTERS_PER_TOKEN
from phimr_nemo.data.curate.narrow import CORRECT, UNKNOWN_DIFFICULTY, VERDICTS, WRONG, Narrow
from phimr_nemo.data.fate import MAX_CANDIDATES, Fate
from phimr_nemo.data.outofcore import first_of_runs
from phimr_nemo.store.records import DIFFICULTIES, UNGRADED_VERDICTS, Difficulty

Fates = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


OF_VERDICT: Final = np.array(
    [Fate.KEPT, Fate.WRONG, Fate.UNPARSABLE, Fate.TIMEOUT, Fate.ERROR, Fate.GOLD_UNREADABLE], np.uint8
)
"""The fate that each verdict alone decides, in the order of :data:`phimr_nemo.data.curate.narrow.VERDICTS`."""
UNGRADED: Final = [VERDICTS.index(name) for name in UNGRADED_VERDICTS]
LENGTH_EDGES: Final = (1024, 2048, 4096, 8192, 16384)
"""Tokens at which the length classes of the SFT balance part: powers of two up to the paper's 16 K."""


def midtrain_fates(narrow: Narrow, *, max_per_problem: int, max_tokens: int | None = None) -> Fates:
    """The full verified set: right, finished responses, each text once a problem.

    Args:
        narrow: all rollouts of some problems.
        max_per_problem: keep at most this many responses to one problem, those sampled first.
        max_tokens: drop conversations that are longer; None = any fits.

    Returns:
        [rows].
    """
    fates = _verified(narrow)
    _fit(narrow, fates, max_tokens)
    _limit(narrow, fates, [narrow["sample"]], max_per_problem)
    return fates


def sft_fates(
    narrow: Narrow,
    *,
    difficulties: Collection[Difficulty],
    max_per_problem: int,
    max_repetition: float,
    one_boxed_answer: bool,
    max_tokens: int | None = None,
) -> Fates:
    """A harder, cleaner part of the verified set: of each problem the most worked-out responses that fit.

    A problem of unknown difficulty is kept: nothing says that it is easy.

    Args:
        narrow: all rollouts of some problems.
        difficulties: the tiers to keep.
        max_per_problem: keep at most this many responses to one problem, the longest ones.
        max_repetition: drop responses that repeat a larger share of themselves.
        one_boxed_answer: drop responses that do not box exactly one answer after their thinking.
        max_tokens: drop conversations that are longer; None = any fits.

    Returns:
        [rows].
    """
    fates = _verified(narrow)
    _of_difficulty(narrow, fates, difficulties)
    _fit(narrow, fates, max_tokens)
    _drop(fates, narrow["repetition"] > max_repetition, Fate.REPETITIVE)
    if one_boxed_answer:
        _drop(fates, narrow["boxes"] != 1, Fate.NOT_ONE_BOX)
    _limit(narrow, fates, [-narrow["characters"], narrow["sample"]], max_per_problem)
    return fates


def length_classes(narrow: Narrow) -> npt.NDArray[np.uint8]:
    """The length class of each response (see :data:`LENGTH_EDGES`)."""
    known = narrow["tokens"] >= 0
    tokens = np.where(known, narrow["tokens"], narrow["characters"] / CHARACTERS_PER_TOKEN)
    return np.searchsorted(LENGTH_EDGES, tokens, side="left").astype(np.uint8)


def balanced(cells: npt.NDArray[np.integer[Any]], order: npt.NDArray[np.uint64], size: int) -> Mask:
    """Which rollouts to keep so that `size` are left and no cell is larger than it must be.

    The rule is max-min fairness: every cell keeps min(its rollouts, level), with the highest level at which the sum
    does not exceed `size`; what is then missing goes, one each, to the fullest cells. So rare cells (graduate
    problems, very long solutions) are kept whole, and the common ones share the rest equally. Within a cell those
    with the smallest `order` stay.

    Args:
        cells: of each candidate, [candidates].
        order: distinct numbers that do not depend on the shards, such as hashes, [candidates].
        size: how many to keep; all when there are no more.

    Returns:
        [candidates], with min(size, candidates) true.
    """
    counts = np.bincount(cells)
    quota = _level(counts, size)
    by_cell = np.lexsort((order, cells))
    ranks = np.empty(len(cells), np.int64)
    ranks[by_cell] = _ranks(cells[by_cell])
    return np.asarray(ranks < quota[cells])


def _level(counts: Indices, size: int) -> Indices:
    """What each cell keeps."""
    left, quota = min(size, int(counts.sum())), np.zeros_like(counts)
    open_cells = np.argsort(counts, kind="stable")
    for place, cell in enumerate(open_cells):
        share, rest = divmod(left, len(open_cells) - place)
        if counts[cell] > share:
            quota[open_cells[place:]] = share
            quota[open_cells[len(open_cells) - rest :]] += 1
            break
        quota[cell] = counts[cell]
        left -= int(counts[cell])
    return quota


@dataclass(frozen=True)
class Sides:
    """Which rollouts may be chosen and which rejected; every array is [rows].

    Attributes:
        fates: KEPT of those that are of either side.
        chosen: whether they are of the preferred one.
        lacking: the fate of a problem's rollouts when it has none to choose, and none to reject.
    """

    fates: Fates
    chosen: Mask
    lacking: tuple[Fate, Fate]


def sides_by_verdict(narrow: Narrow) -> Sides:
    """Right responses are chosen, "wrong" and "unparsable" ones rejected; a grader that gave up says nothing."""
    fates = np.zeros(len(narrow), np.uint8)
    _drop(fates, np.isin(narrow["verdict"], UNGRADED), Fate.UNGRADED)
    return Sides(fates, narrow["verdict"] == CORRECT, (Fate.NO_RIGHT, Fate.NO_WRONG))


def sides_by_teacher(narrow: Narrow, strong: Mask, weak: Mask, *, by_verdict: bool) -> Sides:
    """A strong model's responses are chosen, a weak one's rejected (delta pairs, arXiv 2507.06187).

    Args:
        narrow: all rollouts of some problems.
        strong, weak: whose they are, [rows].
        by_verdict: the strong one's are right and the weak one's wrong; otherwise no verdict counts.
    """
    fates = np.where(strong | weak, Fate.KEPT, Fate.OTHER_TEACHER).astype(np.uint8)
    if by_verdict:
        _drop(fates, np.isin(narrow["verdict"], UNGRADED), Fate.UNGRADED)
        right = narrow["verdict"] == CORRECT
        _drop(fates, strong & (narrow["verdict"] == WRONG), Fate.WRONG)
        _drop(fates, strong & ~right, Fate.UNPARSABLE)
        _drop(fates, weak & right, Fate.RIGHT)
    return Sides(fates, strong, (Fate.NO_STRONG, Fate.NO_WEAK))


def pair_fates(
    narrow: Narrow,
    sides: Sides,
    *,
    difficulties: Collection[Difficulty] | None = None,
    max_repetition: float = 1.0,
    max_tokens: int | None = None,
) -> Fates:
    """Which rollouts may be paired: complete responses to a problem that has both sides.

    A response that was cut off is no side of a pair: nobody knows how it would have ended, and an end that it never
    had must not be learned.

    Args:
        narrow: all rollouts of some problems.
        sides: which may be chosen and which rejected.
        difficulties: the tiers to keep, and problems of unknown difficulty; None = any.
        max_repetition: drop responses that repeat a larger share of themselves.
        max_tokens: drop conversations that are longer; None = any fits.

    Returns:
        [rows]; KEPT are candidates, at most :data:`MAX_CANDIDATES` of a problem on either side.
    """
    fates = sides.fates.copy()
    _drop(fates, ~narrow["stopped"], Fate.CUT_OFF)
    _drop(fates, narrow["blank"], Fate.BLANK)
    _drop(fates, narrow["forged_question"] | narrow["forged_response"], Fate.SPECIAL_TOKEN)
    if difficulties is not None:
        _of_difficulty(narrow, fates, difficulties)
    _fit(narrow, fates, max_tokens)
    _drop(fates, narrow["repetition"] > max_repetition, Fate.REPETITIVE)
    for side in (sides.chosen, ~sides.chosen):
        others = np.where(side, fates, Fate.UNGRADED).astype(np.uint8)
        _limit(narrow, others, [narrow["sample"]], MAX_CANDIDATES, over=Fate.TOO_MANY)
        fates[side] = others[side]
    kept = fates == Fate.KEPT
    for side, fate in zip((sides.chosen, ~sides.chosen), sides.lacking, strict=True):
        _drop(fates, ~np.isin(narrow["problem"], narrow["problem"][kept & side]), fate)
    return fates


@dataclass(frozen=True)
class Prompts:
    """Problems as candidates for reinforcement learning; every array is [problems].

    Attributes:
        row: the first rollout of the problem.
        fates: of the problem.
        pass_rate: right over graded responses; NaN without any.
        mean_length: of the graded responses, in tokens, or in characters where not all tokens are known.
        length_spread: their coefficient of variation: population standard deviation over mean.
        ungraded: rollouts that count for nothing.
    """

    row: Indices
    fates: Fates
    pass_rate: npt.NDArray[np.float64]
    mean_length: npt.NDArray[np.float64]
    length_spread: npt.NDArray[np.float64]
    ungraded: int


def prompts(
    narrow: Narrow,
    *,
    min_pass: float,
    max_pass: float,
    min_samples: int,
    max_length_spread: float | None,
    max_tokens: int | None = None,
) -> Prompts:
    """Problems worth reinforcement learning, from several rollouts of each by the model that is to learn.

    Args:
        narrow: all rollouts of some problems, over all sampling rounds.
        min_pass: keep problems whose share of correct responses is above this (exclusive).
        max_pass: ... and below this (exclusive).
        min_samples: keep problems with at least this many graded responses.
        max_length_spread: keep problems with at most this spread; None = any (prompt optimisation off).
        max_tokens: drop prompts that are longer; None = any fits.
    """
    _, first, problem = np.unique(narrow["problem"], return_index=True, return_inverse=True)
    graded = ~np.isin(narrow["verdict"], UNGRADED)

    def total(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        return np.bincount(problem[graded], values[graded].astype(np.float64), len(first)).astype(np.float64)

    samples = total(np.ones(len(narrow)))
    unknown = np.bincount(problem[graded], (narrow["tokens"] < 0)[graded], len(first)) > 0
    lengths = np.where(unknown[problem], narrow["characters"], narrow["tokens"])
    with np.errstate(invalid="ignore", divide="ignore"):
        pass_rate, mean = total(narrow["verdict"] == CORRECT) / samples, total(lengths) / samples
        variance = total((lengths - mean[problem]) ** 2) / samples
        spread = np.where(mean > 0, np.sqrt(variance) / mean, 0.0)
    fates = np.zeros(len(first), np.uint8)
    forged = np.zeros(len(first), np.bool_)
    forged[problem[narrow["forged_question"]]] = True
    _drop(fates, forged, Fate.SPECIAL_TOKEN)
    if max_tokens is not None:
        _drop(fates, narrow["prompt"][first] > max_tokens, Fate.TOO_LONG)
    _drop(fates, samples < min_samples, Fate.FEW_SAMPLES)
    _drop(fates, pass_rate <= min_pass, Fate.TOO_HARD)
    _drop(fates, pass_rate >= max_pass, Fate.TOO_EASY)
    if max_length_spread is not None:
        _drop(fates, spread > max_length_spread, Fate.UNEVEN)
    rows = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(rows, problem, narrow["row"])
    return Prompts(rows, fates, pass_rate, mean, spread, int((~graded).sum()))


def _verified(narrow: Narrow) -> Fates:
    """Right and finished responses that can be rendered."""
    known = np.append(OF_VERDICT, Fate.ERROR)
    fates = known[np.minimum(narrow["verdict"], len(VERDICTS))].astype(np.uint8)
    _drop(fates, ~narrow["stopped"], Fate.CUT_OFF)
    _drop(fates, narrow["forged_question"] | narrow["forged_response"], Fate.SPECIAL_TOKEN)
    return fates


def _fit(narrow: Narrow, fates: Fates, max_tokens: int | None) -> None:
    if max_tokens is not None:
        _drop(fates, narrow["length"] > max_tokens, Fate.TOO_LONG)


def _of_difficulty(narrow: Narrow, fates: Fates, difficulties: Collection[Difficulty]) -> None:
    wanted = [UNKNOWN_DIFFICULTY, *(DIFFICULTIES.index(name) for name in difficulties)]
    _drop(fates, ~np.isin(narrow["difficulty"], wanted), Fate.OTHER_DIFFICULTY)


def _drop(fates: Fates, mask: Mask, fate: Fate) -> None:
    """Give a fate to those of `mask` that had none."""
    fates[mask & (fates == Fate.KEPT)] = fate


def _limit(
    narrow: Narrow, fates: Fates, keys: Sequence[npt.NDArray[np.generic]], most: int, over: Fate = Fate.OVER_LIMIT
) -> None:
    """Keep each text once a problem and at most `most` of a problem, in ascending order of `keys`."""
    for fate, groups, limit in (
        (Fate.DUPLICATE, [narrow["problem"], narrow["response"]], 1),
        (over, [narrow["problem"]], most),
    ):
        open_rows = np.flatnonzero(fates == Fate.KEPT)
        ordered = [narrow["rollout"], *reversed(keys), *reversed(groups)]
        order = open_rows[np.lexsort([key[open_rows] for key in ordered])]
        ranks = _ranks(*(group[order] for group in groups))
        fates[order[ranks >= limit]] = fate


def _ranks(*sorted_groups: npt.NDArray[np.generic]) -> Indices:
    """The place of each row in its group, counted from 0; rows of one group follow each other."""
    return np.asarray(np.arange(len(sorted_groups[0])) - first_of_runs(*sorted_groups), np.int64)
