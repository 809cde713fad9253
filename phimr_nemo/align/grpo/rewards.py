"""What a sampled response is worth: a weighted sum of numbers, correctness alone by default.

    reward = (correct or wrong) + format_weight * format + length_weight * length
             + sum over the user's functions of weight * function(response) + overlong_penalty

Each part is a pure function of one :class:`Graded` response. The paper rewards correctness alone, with +1 and -1
(arXiv 2504.21233, section 3.4).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from phimr_nemo.config.sampled.grpo import OverlongResponses, RewardConfig, SoftOverlong
from phimr_nemo.errors import UserError
from phimr_nemo.store.records import UNGRADED_VERDICTS
from phimr_nemo.verify.extract import final_answer, visible_text

CORRECT: Final = "correct"


@dataclass(frozen=True)
class Graded:
    """One sampled response and what is known of it.

    Attributes:
        response: its text, thinking included.
        answer: the problem's answer.
        verdict: the grader's.
        tokens: its length, the stop token included.
        max_new_tokens: the longest that it could have been (tokens).
        is_truncated: it ended at that limit.
        reason: the grader's, for a verdict that judges nothing.
    """

    response: str
    answer: str
    verdict: str
    tokens: int
    max_new_tokens: int
    is_truncated: bool
    reason: str = ""


RewardFunction = Callable[[Graded], float]


def is_graded(verdict: str) -> bool:
    """Whether a verdict judges the response; the others are failed measurements and no rewards."""
    return verdict not in UNGRADED_VERDICTS


def correctness(graded: Graded, correct: float, wrong: float) -> float:
    """Return `correct` for the verdict "correct", else `wrong`."""
    return correct if graded.verdict == CORRECT else wrong


def format_score(graded: Graded) -> float:
    """Return 1 for a response that ends by itself, closes its thinking and then states one boxed answer, else 0."""
    if graded.is_truncated or visible_text(graded.response) is None:
        return 0.0
    return float(len(final_answer(graded.response).boxes) == 1)


def length_score(graded: Graded) -> float:
    """Return the share of `max_new_tokens` that the response leaves unused, from 0 to 1."""
    return 1.0 - min(graded.tokens / graded.max_new_tokens, 1.0)


def overlong_penalty(tokens: int, max_new_tokens: int, config: OverlongResponses) -> float:
    """What a response's reward loses for its length: the soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13).

    With b = `buffer` and L = `max_new_tokens`: 0 up to L - b tokens, then linearly down to -`penalty` at L.

    Args:
        tokens: of the response.
        max_new_tokens: the length limit.
        config: only "soft" has a penalty.

    Returns:
        A number of at most 0, to be added to the reward.
    """
    if not isinstance(config, SoftOverlong):
        return 0.0
    excess = tokens - (max_new_tokens - config.buffer)
    return -config.penalty * min(max(excess / config.buffer, 0.0), 1.0)


def import_rewards(config: RewardConfig) -> dict[str, RewardFunction]:
    """The user's functions by their names.

    Raises:
        UserError: no such module or function.
    """
    functions = {}
    for spec in config.functions:
        module, _, name = spec.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"reward.functions names {spec!r}: {error}",
                rule="MODULE:FUNCTION, a function of one phimr_nemo.align.grpo.rewards.Graded that returns a number",
                remedy="correct the name, or put the module's directory into PYTHONPATH",
            ) from error
        functions[spec] = function
    return functions


def reward_parts(
    graded: Graded, config: RewardConfig, functions: Mapping[str, RewardFunction], overlong: OverlongResponses
) -> dict[str, float]:
    """The parts of a response's reward; the reward is their sum.

    Args:
        graded: the response.
        config: values and weights; a part of weight 0 is left out.
        functions: of :func:`import_rewards`.
        overlong: whether long responses lose reward.

    Returns:
        "correctness", "format", "length", "overlong" and the names of the user's functions -> weighted number.

    Raises:
        UserError: a function of the user's raised, or returned no finite number.
    """
    parts = {"correctness": correctness(graded, config.correct, config.wrong)}
    if config.format:
        parts["format"] = config.format * format_score(graded)
    if config.length:
        parts["length"] = config.length * length_score(graded)
    if isinstance(overlong, SoftOverlong):
        parts["overlong"] = overlong_penalty(graded.tokens, graded.max_new_tokens, overlong)
    for name, weight in config.functions.items():
        parts[name] = weight * _asked(name, functions[name], graded)
    return parts


def _asked(name: str, function: RewardFunction, graded: Graded) -> float:
    rule = "a reward function returns one finite number for every response"
    remedy = "correct it; the run continues at its newest checkpoint with the same command"
    try:
        value = float(function(graded))
    except Exception as error:
        raise UserError(
            f"the reward {name} raised {type(error).__name__}: {error}", rule=rule, remedy=remedy
        ) from error
    if not math.isfinite(value):
        raise UserError(f"the reward {name} returned {value}", rule=rule, remedy=remedy)
    return value
