"""A problem as a source gives it, before it has an identity in our records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phimr_nemo.data.sources.labels import Domain
from phimr_nemo.store.records import Difficulty, FinishReason

Labels = Mapping[str, Any]


@dataclass(frozen=True)
class Trajectory:
    """One recorded response.

    Attributes:
        response: the whole text, thinking included.
        teacher: the model that wrote it.
        finish_reason: whether it ended or was cut.
        labels: the source's own words on it.
    """

    response: str
    teacher: str
    finish_reason: FinishReason = "stop"
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One problem of a source.

    Attributes:
        question, answer: as the source has them; the answer is empty where it tells none.
        solution: a worked solution, if there is one.
        domain, difficulty: the source's own labels on our scales.
        labels: the source's own labels in its words, and what else is short.
        trajectories: recorded responses, correct and wrong.
        voted: the source's answer is itself a vote among responses.
        lost: parts of the row that could not be used, a few words each, to be counted.
    """

    question: str
    answer: str
    solution: str | None = None
    domain: Domain | None = None
    difficulty: Difficulty | None = None
    labels: Labels = field(default_factory=dict)
    trajectories: tuple[Trajectory, ...] = ()
    voted: bool = False
    lost: tuple[str, ...] = ()


class UnusableRow(Exception):
    """A row that is no problem with an answer that can be checked; the reason is counted.

    Args:
        reason: a few words, the same for all rows of this kind.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
