"""What is shown: items with their responses, and the narrow numbers that they are filtered by.

An item is a question with the responses of every stage, a rollout's question with its samples, a group of GRPO, a
preference pair, or a row that was dropped: a question, a gold answer, and responses side by side in panes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from phimr_nemo.store.records import VerdictName
from phimr_nemo.text.turn import visible_text

VERDICTS: Final[tuple[VerdictName, ...]] = get_args(VerdictName)
CORRECT: Final = VERDICTS.index("correct")
NO_VERDICT: Final = len(VERDICTS)
MOST_REASONS: Final = 30
"""Each is one of the 32 bits that JavaScript's operators know; the last one stands for all others."""
OTHER_REASONS: Final = "another reason"
UNKNOWN_TOKENS: Final = -1
MOST: Final = np.iinfo(np.uint16).max

ViewKind = Literal["questions", "rollouts", "samples", "pairs", "drops"]
Change = Literal["gained", "lost"]
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Response:
    """A response as it is shown.

    Attributes:
        thinking: up to the end of its thinking, tags and all; empty without any.
        answer: the rest.
        verdict: the grader's; empty where it was not graded.
        reason: why.
        extracted: the answer that the grader read.
        tokens: None where nobody counted.
        reward: None outside GRPO.
        notes: what else became of it: cut off, trained on, dropped from a set and why.
    """

    thinking: str
    answer: str
    verdict: str = ""
    reason: str = ""
    extracted: str = ""
    tokens: int | None = None
    reward: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it."""
        return self.thinking + self.answer


@dataclass(frozen=True)
class Item:
    """A question with its responses.

    Attributes:
        id: of the problem, or of the pair.
        question: as it was asked.
        answer: the gold answer; empty where the records have none.
        facts: what else is known of the question.
        panes: the responses of each pane of the view.
    """

    id: str
    question: str
    answer: str
    facts: tuple[str, ...]
    panes: tuple[tuple[Response, ...], ...]


@dataclass(frozen=True)
class Index:
    """What items are filtered and sorted by, a few bytes each.

    Attributes:
        right, total: correct responses, and all, [items, panes].
        verdicts: which verdicts occur: bit n for `VERDICTS[n]`, [items, panes].
        reasons: which reasons occur: bit n for `names[n]`, [items].
        names: the reasons, most frequent first.
        tokens: of the longest response; 0 where unknown, [items].
        steps: GRPO's; 0 elsewhere, [items].
    """

    right: npt.NDArray[np.uint16]
    total: npt.NDArray[np.uint16]
    verdicts: npt.NDArray[np.uint8]
    reasons: npt.NDArray[np.uint32]
    names: tuple[str, ...]
    tokens: npt.NDArray[np.uint32]
    steps: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Cells:
    """One response a row, whatever its view; every array is [responses].

    Attributes:
        item, pane: where it is shown.
        verdict: place in `VERDICTS`, `NO_VERDICT` without one.
        reasons: columns of reasons; null or empty is none.
        tokens: below 0 where unknown.
    """

    item: Numbers
    pane: Numbers
    verdict: Numbers
    reasons: Sequence[Sequence[str | None]]
    tokens: Numbers


@dataclass(frozen=True)
class View:
    """Items of one kind from one place.

    Attributes:
        name: unique among the views; its path, where it has one.
        kind: what an item is.
        panes: names of the responses' columns.
        index: of its items.
        fetch: items by number, read when asked for.
        search: which items hold a text somewhere, whatever its case, [items].
        note: what one must know to read it; empty for none.
    """

    name: str
    kind: ViewKind
    panes: tuple[str, ...]
    index: Index
    fetch: Callable[[Sequence[int]], list[Item]]
    search: Callable[[str], Mask]
    note: str = ""

    @cached_property
    def responses(self) -> int:
        """How many there are in all."""
        return int(self.index.total.sum(dtype=np.int64))


@dataclass(frozen=True)
class Wanted:
    """Which items are asked for; what is None or empty does not matter.

    Attributes:
        text: somewhere in the problem's id, its question and answer, or a response, whatever its case.
        verdict: of one of the responses.
        pane: the pane whose verdict is meant, instead of any.
        reason: a part of one of the reasons.
        change: the share of correct responses rose ("gained") or fell ("lost") from the first pane to the last; with
            `pane`, to that one.
        step: GRPO's.
    """

    text: str = ""
    verdict: str | None = None
    pane: int | None = None
    reason: str = ""
    change: Change | None = None
    step: int | None = None


def select(view: View, wanted: Wanted) -> Numbers:
    """The numbers of the items that are asked for, ascending."""
    index = view.index
    mask = np.ones(len(index), np.bool_)
    last = len(view.panes) - 1 if wanted.pane is None else wanted.pane
    if wanted.verdict is not None:
        bits = index.verdicts if wanted.pane is None else index.verdicts[:, [wanted.pane]]
        mask &= ((bits >> VERDICTS.index(wanted.verdict)) & 1).any(axis=1)
    if wanted.reason:
        meant = sum(1 << bit for bit, name in enumerate(index.names) if wanted.reason.lower() in name.lower())
        mask &= (index.reasons & np.uint32(meant)) != 0
    if wanted.change is not None:
        share = index.right / np.maximum(index.total, 1)
        both = (index.total[:, 0] > 0) & (index.total[:, last] > 0)
        change = share[:, last] - share[:, 0]
        mask &= both & (change > 0 if wanted.change == "gained" else change < 0)
    if wanted.step is not None:
        mask &= index.steps == wanted.step
    if wanted.text:
        mask &= view.search(wanted.text)
    return np.flatnonzero(mask)


def index_of(items: int, panes: int, cells: Cells, steps: Numbers | None = None) -> Index:
    """The index of a view.

    Args:
        items, panes: how many there are.
        cells: its responses.
        steps: of every item, [items].
    """
    place = cells.item * panes + cells.pane
    shape = (items, panes)
    right = np.bincount(place[cells.verdict == CORRECT], minlength=items * panes)
    total = np.bincount(place, minlength=items * panes)
    verdicts = np.zeros(items * panes, np.uint8)
    graded = cells.verdict < NO_VERDICT
    np.bitwise_or.at(verdicts, place[graded], np.left_shift(1, cells.verdict[graded]).astype(np.uint8))
    reasons, names = _reasons(items, cells)
    tokens = np.zeros(items, np.uint32)
    np.maximum.at(tokens, cells.item, np.maximum(cells.tokens, 0).astype(np.uint32))
    return Index(
        right=np.minimum(right, MOST).astype(np.uint16).reshape(shape),
        total=np.minimum(total, MOST).astype(np.uint16).reshape(shape),
        verdicts=verdicts.reshape(shape),
        reasons=reasons,
        names=names,
        tokens=tokens,
        steps=np.zeros(items, np.uint32) if steps is None else steps.astype(np.uint32),
    )


def _reasons(items: int, cells: Cells) -> tuple[npt.NDArray[np.uint32], tuple[str, ...]]:
    counts: Counter[str] = Counter()
    for column in cells.reasons:
        counts.update(reason for reason in column if reason)
    names = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if len(names) > MOST_REASONS:
        names = [*names[:MOST_REASONS], OTHER_REASONS]
    bits = {name: 1 << bit for bit, name in enumerate(names)}
    other = bits.get(OTHER_REASONS, 0)
    found = np.zeros(items, np.uint32)
    for column in cells.reasons:
        mask = np.array([bits.get(reason, other) if reason else 0 for reason in column], np.uint32)
        np.bitwise_or.at(found, cells.item, mask)
    return found, tuple(names)


def response_of(text: str, **facts: Any) -> Response:
    """A response, its thinking told from its answer."""
    visible = visible_text(text)
    if visible is None:
        return Response(text, "", **facts)
    # What follows the turn's end is no part of the answer; it is shown all the same.
    place = text.rfind(visible)
    return Response(text[:place], text[place:], **facts)
