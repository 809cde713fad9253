"""The paper's three stabilization techniques for RL (PAPER: Phi-4-Mini-Reasoning, section 3.4), as pure functions.

1. Prompt optimisation: :func:`uniform_prompts`.
2. Reward rebalancing: :func:`oversampled`, :func:`rebalanced_group`, :func:`refill_size`.
3. Temperature annealing: :func:`annealed_temperature`.

And one that is not the paper's, a curriculum that leaves out what is solved: :func:`unsolved`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from phimr_nemo.config.sampled.grpo import CurriculumConfig, PromptOptimizationConfig, RebalanceConfig
from phimr_nemo.config.sampled.rounds import TemperatureConfig
from phimr_nemo.errors import UserError

GroupFate = Literal["kept", "easy", "impossible"]


def annealed_temperature(step: int, steps: int, config: TemperatureConfig) -> float:
    """Sampling temperature of a round: linear from `start` to `end` over `fraction` of the rounds, then `end`.

    Args:
        step: the round, from 0.
        steps: rounds of the run.
        config: the paper's values are 1.0, 0.6 and one half.
    """
    annealing = config.fraction * steps
    progress = 1.0 if step >= annealing else step / annealing
    return config.start + (config.end - config.start) * progress


def uniform_prompts(length_spreads: Sequence[float], config: PromptOptimizationConfig) -> list[int]:
    """Prompts whose responses are uniform in length.

    Args:
        length_spreads: each prompt's standard deviation over mean of the lengths of its sampled responses.
        config: the largest spread; with `enabled` False every prompt is kept.

    Returns:
        Numbers of the kept prompts, ascending. A spread that is not a number is not kept.
    """
    if not config.enabled:
        return list(range(len(length_spreads)))
    return [i for i, spread in enumerate(length_spreads) if spread <= config.max_length_spread]


def oversampled(hard: Sequence[bool], config: RebalanceConfig) -> list[int]:
    """One epoch of prompts: every prompt once, a hard one `oversample_hard` times.

    Args:
        hard: whether each prompt is hard.
        config: with `enabled` False every prompt appears once.

    Returns:
        Prompt numbers, ascending, hard ones repeated.

    Raises:
        UserError: `oversample_hard` below 1.
    """
    if config.oversample_hard < 1:
        raise UserError(
            f"rebalance.oversample_hard={config.oversample_hard}",
            rule="how often a hard prompt appears in an epoch: at least once",
            remedy="use 1 for no oversampling",
        )
    times = config.oversample_hard if config.enabled else 1
    return [i for i, is_hard in enumerate(hard) for _ in range(times if is_hard else 1)]


def unsolved(epoch: Sequence[int], place: int, pass_rates: Mapping[int, float], config: CurriculumConfig) -> int:
    """The prompt that is sampled at a place of the epoch: the first one from there on that is not solved.

    Args:
        epoch: prompt numbers of one epoch.
        place: in it.
        pass_rates: prompt -> share of correct responses when it was last sampled; none for a prompt that was not.
        config: from where on a prompt counts as solved; None = no prompt does.

    Returns:
        A prompt number; the one at the place when all are solved.
    """
    if config.solved_from is not None:
        for step in range(len(epoch)):
            prompt = epoch[(place + step) % len(epoch)]
            if pass_rates.get(prompt, 0.0) < config.solved_from:
                return prompt
    return epoch[place]


def group_fate(correct: Sequence[bool], config: RebalanceConfig) -> GroupFate:
    """Whether a prompt's group of responses is trained on, and if not, why.

    Args:
        correct: whether each response of the group is correct.
        config: with `enabled` False every group is kept.

    Returns:
        "impossible" without a correct response and "easy" where the share of correct ones is above `drop_above` or
        none is wrong: equal rewards give no gradient.
    """
    right = sum(correct)
    if not config.enabled:
        return "kept"
    if not right:
        return "impossible"
    return "easy" if right == len(correct) or right > config.drop_above * len(correct) else "kept"


def refill_size(wanted: int, found: int, sampled: int, largest: int) -> int:
    """How many further prompts to sample: as many as will bring what is missing, should the yield stay what it was.

    Args:
        wanted: prompts to train on.
        found: prompts so far that are trained on.
        sampled: prompts sampled so far.
        largest: prompts to sample at once at most.

    Returns:
        0 when nothing is missing, else 1 to `largest`.
    """
    missing = max(wanted - found, 0)
    return min(-(-missing * sampled // found), largest) if found else min(missing * largest, largest)


def rebalanced_group(correct: Sequence[bool], config: RebalanceConfig, seed: int) -> list[int]:
    """The responses of one prompt that are trained on: all positives and equally many random negatives.

    Args:
        correct: whether each response of the group is correct.
        config: with `enabled` False the whole group is kept.
        seed: of the choice of negatives.

    Returns:
        Response numbers, ascending; none of a group whose :func:`group_fate` is not "kept". Where negatives are
        fewer, all of them are kept.
    """
    if not config.enabled:
        return list(range(len(correct)))
    if group_fate(correct, config) != "kept":
        return []
    positives = [i for i, is_correct in enumerate(correct) if is_correct]
    negatives = [i for i, is_correct in enumerate(correct) if not is_correct]
    count = min(len(positives), len(negatives))
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = generator.choice(len(negatives), size=count, replace=False)
    return sorted([*positives, *(negatives[i] for i in chosen)])
