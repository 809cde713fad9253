"""Which of LongRoPE's two sets of factors a run computes with, and whether a model was trained with the other one.

Needs no torch: `phimr_nemo.model.longrope` has the factors themselves, docs/longrope.md the reasons.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from phimr_nemo.config import LongRopePolicy
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import CONFIG_FILE

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture

_LOGGER: Final = logging.getLogger(__name__)


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


def training_of(model: Path) -> tuple[int, LongRopePolicy] | None:
    """Maximum length and policy of the run whose directory a model stands in; None for models from elsewhere."""
    import yaml

    file = Path(model).resolve().parent / CONFIG_FILE
    try:
        config: Any = yaml.safe_load(file.read_text("utf-8"))
        length, policy = config["sequence_length"], config["model"]["longrope"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None
    return (length, policy) if isinstance(length, int) and policy in get_args(LongRopePolicy) else None


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
    trained = training_of(model)
    if trained is None or arch.short_factor == arch.long_factor:
        return None
    length, trained_policy = trained
    # A sequence as long as the run's longest stands for the others: policies that look at each sequence agree there.
    was_long = uses_long_factors(arch, length, trained_policy, length)
    is_long = uses_long_factors(arch, max_length, policy, max_length)
    if was_long == is_long:
        return None
    names = {True: "long", False: "short"}
    original = arch.original_max_position_embeddings
    return (
        f"{model} was trained with LongRoPE's {names[was_long]} factors (longest sequence {length}, "
        f"{trained_policy}) and is used with the {names[is_long]} ones (longest sequence {max_length}, {policy}), "
        f"which costs accuracy; keep both longest sequences on one side of {original} tokens"
    )


def warn_of_other_regime(arch: Architecture, model: Path, max_length: int, policy: LongRopePolicy) -> None:
    """Log :func:`other_regime` as a warning, if there is anything to say."""
    problem = other_regime(arch, model, max_length, policy)
    if problem is not None:
        _LOGGER.warning("%s", problem)
