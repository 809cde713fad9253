"""Preference pairs of one question: a correct response beside a wrong one that is near to it, or any.

Or, whatever the verdicts, a strong model's response beside a weak one's: then their delta is what is learned (The
Delta Learning Hypothesis, arXiv 2507.06187; OLMo 3, 2512.13961).

A near miss is a wrong response to the same question that is as much like the right one as can be had: DPO then
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

PairMode = Literal["near_miss", "random", "delta"]
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
    chosen: Sequence[Response],
    rejected: Sequence[Response],
    *,
    mode: PairMode,
    nearness: Nearness,
    max_per_problem: int,
    max_length_ratio: float | None,
    seed: int,
) -> tuple[list[Pair], dict[str, Fate]]:
    """Pairs of responses to one question, one of each side; no response is used twice.

    Args:
        chosen: different correct responses, or a strong model's.
        rejected: different wrong responses, or a weak model's.
        mode: "near_miss" takes the nearest pair first, then the nearest of what is left; the others draw them.
        nearness: the measure of a near miss; the other modes ignore it.
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
    responses = (*chosen, *rejected)
    # Two models may give the same text, of which nothing can be learned.
    pairs = [(one, other) for one in chosen for other in rejected if one.text != other.text]
    fitting = [pair for pair in pairs if max_length_ratio is None or length_ratio(*pair) <= max_length_ratio]
    if mode == "near_miss":
        distance = _distance_in_steps(responses) if nearness == "common_steps" else _distance_from_beginning
        ordered = sorted(fitting, key=lambda pair: (distance(*pair), pair[0].id, pair[1].id))
    else:
        ordered = random.Random(seed).sample(fitting, len(fitting))
    fates = dict.fromkeys((response.id for response in responses), Fate.UNLIKE_LENGTHS)
    same = {one.text for one in chosen} & {other.text for other in rejected}
    fates.update(dict.fromkeys((response.id for response in responses if response.text in same), Fate.NO_PARTNER))
    fates.update(dict.fromkeys((response.id for pair in fitting for response in pair), Fate.NO_PARTNER))
    kept: list[Pair] = []
    used: set[str] = set()
    for one, other in ordered:
        if one.id in used or other.id in used:
            continue
        used.update((one.id, other.id))
        fate = Fate.KEPT if len(kept) < max_per_problem else Fate.OVER_LIMIT
        fates[one.id] = fates[other.id] = fate
        if fate == Fate.KEPT:
            kept.append((one, other))
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
