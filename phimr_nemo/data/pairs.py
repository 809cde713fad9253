"""Preference pairs of one question: a correct response beside a wrong one that is near to it, or any.

A near miss is a wrong response to the same question that is as much like the correct one as can be had: DPO then
learns what made it wrong, and not its style or length. How near two responses are is one of two measures:

- `common_steps`: the Jaccard index of their sets of steps, a step being a line or sentence without regard to case and
  spaces; of equally near pairs the one of more similar length is nearer. For sampled chains of thought, which part
  early, come back to the same steps, and go wrong somewhere.
- `common_beginning`: the share of the longer response that both begin with. For short, uniform solutions, where it
  says how late the mistake was made.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from phimr_nemo.data.fate import Fate

__all__ = [
    "STEP_END",
    "Distance",
    "Nearness",
    "Pair",
    "PairMode",
    "Response",
    "common_beginning",
    "common_steps",
    "length_ratio",
    "pair_up",
    "steps",
]

PairMode = Literal["near_miss", "random"]
Nearness = Literal["common_steps", "common_beginning"]

STEP_END: Final = re.compile(r"\n+|(?<=[.!?;])\s+")


@dataclass(frozen=True)
class Response:
    """A response that may be paired."""

    id: str
    text: str


Pair = tuple[Response, Response]
Distance = Callable[[Response, Response], tuple[float, ...]]


def steps(text: str) -> frozenset[str]:
    """The different lines and sentences of a response, without regard to case and spaces.

    >>> sorted(steps("So x = 2.  so X = 2. Then y = 4."))
    ['so x = 2.', 'then y = 4.']
    """
    return frozenset(" ".join(step.split()).casefold() for step in STEP_END.split(text) if step.strip())


def common_steps(one: frozenset[str], other: frozenset[str]) -> float:
    """The Jaccard index of two sets of steps: shared over all, 0 to 1; 1 for two empty ones.

    >>> common_steps(steps("a. b."), steps("a. c."))
    0.3333333333333333
    """
    union = len(one | other)
    return len(one & other) / union if union else 1.0


def common_beginning(one: str, other: str) -> float:
    """How late two texts part: the share of the longer one that is their common beginning, 0 to 1.

    >>> common_beginning("2+2=4", "2+2=50")
    0.6666666666666666
    """
    longest = max(len(one), len(other), 1)
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position / longest
    return min(len(one), len(other)) / longest


def pair_up(
    right: Sequence[Response],
    wrong: Sequence[Response],
    *,
    mode: PairMode,
    nearness: Nearness,
    max_per_problem: int,
    max_length_ratio: float | None,
    seed: int,
) -> tuple[list[Pair], dict[str, Fate]]:
    """Pairs of correct (chosen) and wrong (rejected) responses to one question; no response is used twice.

    Args:
        right: different correct responses.
        wrong: different wrong responses.
        mode: "near_miss" takes the nearest pair first, then the nearest of what is left; "random" draws them.
        nearness: the measure of a near miss; the random mode ignores it.
        max_per_problem: pairs at most.
        max_length_ratio: no pair of which one is more than this many times as long (characters) as the other;
            None = any.
        seed: of the draws; the near-miss mode ignores it.

    Returns:
        The pairs, best first, and the fate of every response by id.

    >>> correct = [Response("a", "Add. 2+2=4. So 4.")]
    >>> wrong = [Response("b", "No idea."), Response("c", "Add. 2+2=5. So 5.")]
    >>> pairs, fates = pair_up(correct, wrong, mode="near_miss", nearness="common_steps", max_per_problem=1,
    ...                        max_length_ratio=None, seed=0)
    >>> [(chosen.id, rejected.id) for chosen, rejected in pairs], fates["b"].name
    ([('a', 'c')], 'NO_PARTNER')
    """
    pairs = [(chosen, rejected) for chosen in right for rejected in wrong]
    fitting = [pair for pair in pairs if max_length_ratio is None or length_ratio(*pair) <= max_length_ratio]
    if mode == "near_miss":
        distance = _distance_in_steps([*right, *wrong]) if nearness == "common_steps" else _distance_from_beginning
        ordered = sorted(fitting, key=lambda pair: (distance(*pair), pair[0].id, pair[1].id))
    else:
        ordered = random.Random(seed).sample(fitting, len(fitting))
    fates = dict.fromkeys((response.id for response in (*right, *wrong)), Fate.UNLIKE_LENGTHS)
    fates.update(dict.fromkeys((response.id for pair in fitting for response in pair), Fate.NO_PARTNER))
    kept: list[Pair] = []
    used: set[str] = set()
    for chosen, rejected in ordered:
        if chosen.id in used or rejected.id in used:
            continue
        used.update((chosen.id, rejected.id))
        fate = Fate.KEPT if len(kept) < max_per_problem else Fate.OVER_LIMIT
        fates[chosen.id] = fates[rejected.id] = fate
        if fate == Fate.KEPT:
            kept.append((chosen, rejected))
    return kept, fates


def length_ratio(one: Response, other: Response) -> float:
    """How many times as long (characters) the longer text is; at least 1."""
    shorter, longer = sorted((len(one.text), len(other.text)))
    return longer / max(shorter, 1)


def _distance_in_steps(responses: Sequence[Response]) -> Distance:
    sets = {response.id: steps(response.text) for response in responses}

    def distance(one: Response, other: Response) -> tuple[float, ...]:
        return (-common_steps(sets[one.id], sets[other.id]), length_ratio(one, other))

    return distance


def _distance_from_beginning(one: Response, other: Response) -> tuple[float, ...]:
    return (-common_beginning(one.text, other.text),)
