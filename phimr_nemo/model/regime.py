"""Which of LongRoPE's two sets of factors a run computes with, and whether a model was trained with the other one.

Needs no torch: `phimr_nemo.model.longrope` has the factors themselves, docs/longrope.md the reasons.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from phimr_nemo.config import LongRopePolicy
from phimr_nemo.errors import UserError
from phimr_nemo.model.origin import Origin, read_origin

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture

_LOGGER: Final = logging.getLogger(__name__)
NAMES: Final = {True: "long", False: "short"}
LONG_WITH_ITS_LENGTH: Final[LongRopePolicy] = "long_when_max_length_exceeds_original"
"""The policy of the engines, which the configurations default to."""


@dataclass(frozen=True)
class Opening:
    """How a sampler opens a model so that it computes as in training.

    Attributes:
        max_length: longest sequence, prompt and response (tokens).
        policy: that gives the factors of training at this length.
        notes: what the user should know about it, a sentence each.
    """

    max_length: int
    policy: LongRopePolicy
    notes: tuple[str, ...] = ()


def uses_long_factors(
    arch: Architecture, max_length: int, policy: LongRopePolicy, sequence_length: int | None = None
) -> bool:
    """Whether the long factors apply.

    Args:
        arch: the model.
        max_length: the longest sequence of the run, prompt and response (tokens).
        policy: see `phimr_nemo.model.longrope`.
        sequence_length: the sequence at hand (tokens); needed by ``per_sequence`` alone.

    Raises:
        UserError: an unknown policy, or ``per_sequence`` without a sequence length.
    """
    if policy == "always_short":
        return False
    if policy == "long_when_max_length_exceeds_original":
        return max_length > arch.original_max_position_embeddings
    if policy == "per_sequence":
        if sequence_length is None:
            raise UserError(
                "LongRoPE policy 'per_sequence' without the length of the sequence",
                rule="per_sequence chooses the factors by each sequence's own length",
                remedy="pass sequence_length, or use 'long_when_max_length_exceeds_original'",
            )
        return sequence_length > arch.original_max_position_embeddings
    raise UserError(
        f"LongRoPE policy {policy!r}",
        rule=f"one of {', '.join(get_args(LongRopePolicy))}",
        remedy="set model.longrope_policy to one of them",
    )


def regime_name(arch: Architecture, max_length: int, policy: LongRopePolicy) -> str:
    """The factors of a run's sequences, for people: "long: 16,384 tokens are more than 4,096"."""
    original = arch.original_max_position_embeddings
    if arch.long_factor is None:
        return "none: plain rotary embeddings"
    if policy == "per_sequence" and max_length > original:
        return f"short up to {original:,} tokens, long beyond, sequence by sequence"
    if uses_long_factors(arch, max_length, policy, max_length):
        return f"long: {max_length:,} tokens are more than {original:,}"
    if max_length > original:
        return f"short: the policy is {policy}"
    return f"short: {max_length:,} tokens are not more than {original:,}"


def was_trained_long(arch: Architecture, origin: Origin) -> bool | None:
    """Whether a model's last training run computed its longest sequences with the long factors.

    None when that is not known, or when the model has one set of factors only.
    """
    if origin.sequence_length is None or origin.longrope is None or arch.short_factor == arch.long_factor:
        return None
    # A sequence as long as the run's longest stands for the others: policies that look at each sequence agree there.
    return uses_long_factors(arch, origin.sequence_length, origin.longrope, origin.sequence_length)


def other_regime(arch: Architecture, model: Path, max_length: int, policy: LongRopePolicy) -> str | None:
    """What is wrong when a model was trained with one set of factors and is to be used with the other.

    Args:
        arch: of the model.
        model: its directory.
        max_length: the longest sequence that it is to be used for (tokens).
        policy: that it is to be used with.

    Returns:
        One sentence with the remedy; None when both agree, or when it is not known how the model was trained.
    """
    origin = read_origin(model)
    was_long = was_trained_long(arch, origin)
    is_long = uses_long_factors(arch, max_length, policy, max_length)
    if was_long is None or was_long == is_long:
        return None
    original = arch.original_max_position_embeddings
    return (
        f"{model} was trained with LongRoPE's {NAMES[was_long]} factors (longest sequence {origin.sequence_length}, "
        f"{origin.longrope}) and is used with the {NAMES[is_long]} ones (longest sequence {max_length}, {policy}), "
        f"which costs accuracy; keep both longest sequences on one side of {original} tokens"
    )


def warn_of_other_regime(arch: Architecture, model: Path, max_length: int, policy: LongRopePolicy) -> None:
    """Log :func:`other_regime` as a warning, if there is anything to say."""
    problem = other_regime(arch, model, max_length, policy)
    if problem is not None:
        _LOGGER.warning("%s", problem)


def opening_as_trained(arch: Architecture, origin: Origin, max_length: int | None) -> Opening:
    """How to open a model with the factors that it was trained with.

    Args:
        arch: of the model.
        origin: how it was trained.
        max_length: the longest sequence that is asked for (tokens); None: the longest that its training covers.

    Returns:
        The opening. Of a model whose training is not known, or without LongRoPE: the length that is asked for, else
        the model's context, with the engines' policy.
    """
    original, context = arch.original_max_position_embeddings, arch.max_position_embeddings
    was_long = was_trained_long(arch, origin)
    if was_long is None:
        return Opening(max_length or context, LONG_WITH_ITS_LENGTH)
    if not was_long:
        covered = min(context, max(original, origin.sequence_length or 0))
        beyond = f"the model was trained on sequences of up to {origin.sequence_length:,} tokens, with short factors"
        notes = (beyond,) if max_length is not None and max_length > covered else ()
        return Opening(max_length or covered, "always_short", notes)
    if max_length is not None and max_length <= original:
        # The engines choose by the length alone.
        note = f"opened for {original + 1:,} tokens: the model was trained with LongRoPE's long factors"
        return Opening(original + 1, LONG_WITH_ITS_LENGTH, (note,))
    return Opening(max_length or context, LONG_WITH_ITS_LENGTH)
