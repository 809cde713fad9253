"""Settings of the tiny base model and of the quickstart that runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from phimr_nemo.config.common import RunConfig
from phimr_nemo.config.generation import SyntheticCount
from phimr_nemo.config.rules import AT, RuleBroken, config
from phimr_nemo.config.values import AboveZero, AtLeastZero, IsNumber, Positive, PositiveShare

SMALLEST_VOCABULARY: Final = 261
"""256 bytes and five special tokens."""
LARGEST_VOCABULARY: Final = 521
"""So many entries the synthetic problems fill."""
FamilyName = Literal["phi3", "llama", "mistral", "qwen2", "qwen3", "smollm3"]
"""The model_type of the families in `phimr_nemo.model.families`."""
PLAIN_ROTARY: Final[Mapping[str, float]] = {"partial_rotary_factor": 1.0, "long_factor_growth": 0.0}
"""What a base of another family than Phi's has to say of its rotary embeddings."""
LARGEST_GROWTH: Final = 1e6
LARGEST_HEAD: Final = 20_000
LARGEST_SIZES: Final[Mapping[str, int]] = {
    "vocab_size": 10_000_000,
    "hidden_size": 200_000,
    "intermediate_size": 2_000_000,
    "num_hidden_layers": 2_000,
    "num_attention_heads": 2_000,
    "num_key_value_heads": 2_000,
    "max_position_embeddings": 100_000_000,
    "original_max_position_embeddings": 100_000_000,
    "sliding_window": 1_000_000_000,
}
REAL_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "rope_theta": (1.0, 1e12),
    "rms_norm_eps": (1e-12, 0.1),
    "initializer_range": (0.0, 10.0),
}
SHOWN_CHARS: Final = 60
"""Of a value in a message."""


def size_fault(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which number no model of the family has, and the rule; None where all can be.

    Args:
        values: by Hugging Face's names; those that are not there are not looked at. No sliding window is None.
    """
    for name, most in LARGEST_SIZES.items():
        value = values.get(name, 1)
        if name == "sliding_window" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            return f"{name} = {repr(value)[:SHOWN_CHARS]}", f"a whole number from 1 to {most:,}"
    for name, (least, largest) in REAL_BOUNDS.items():
        value = values.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= largest:
            return f"{name} = {repr(value)[:SHOWN_CHARS]}", f"a number from {least:g} to {largest:g}"
    return None


def shape_fault(
    hidden_size: int, heads: int, key_value_heads: int, rotary_factor: float, head_size: int | None = None
) -> tuple[str, str] | None:
    """Why no model of the family has this shape, and the rule; None where one can.

    Args:
        hidden_size: of the model.
        heads, key_value_heads: of attention.
        rotary_factor: share of a head's dimensions that are rotated.
        head_size: dimensions of a head; None: hidden_size / heads.
    """
    if head_size is not None and not 1 <= head_size <= LARGEST_HEAD:
        return f"head_dim = {repr(head_size)[:SHOWN_CHARS]}", f"a whole number from 1 to {LARGEST_HEAD:,}"
    if head_size is None and hidden_size % heads:
        return f"hidden_size {hidden_size} with {heads} attention heads", "num_attention_heads divides hidden_size"
    if heads % key_value_heads:
        return (
            f"{heads} attention heads with {key_value_heads} key/value heads",
            "num_key_value_heads divides num_attention_heads",
        )
    head_dim = hidden_size // heads if head_size is None else head_size
    rotated = int(head_dim * rotary_factor)
    if not 0.0 < rotary_factor <= 1.0 or rotated % 2 or rotated == 0:
        return (
            f"partial_rotary_factor {rotary_factor} of head_dim {head_dim}",
            "0 < factor <= 1, and int(head_dim * factor) even and positive",
        )
    return None


@config
class BaseConfig:
    """A randomly initialised model with a tokenizer of its own.

    Attributes:
        family: what it is made like: phi3 is Phi-4-mini's architecture; conversations have the family's turn format.
        vocab_size: of the tokenizer that is trained on the synthetic problems.
        system_prompt: what the chat template puts before every conversation.
        original_max_position_embeddings: the length that LongRoPE's short factors hold for; of Phi alone.
        long_factor_growth: LongRoPE's long factors rise linearly from 1 by so much.
    """

    run: RunConfig
    family: FamilyName
    vocab_size: Annotated[int, Field(ge=SMALLEST_VOCABULARY, le=LARGEST_VOCABULARY), IsNumber]
    system_prompt: str
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    partial_rotary_factor: PositiveShare
    rope_theta: AboveZero
    rms_norm_eps: AtLeastZero
    max_position_embeddings: Positive
    original_max_position_embeddings: Annotated[int, Field(ge=2), IsNumber]
    long_factor_growth: Annotated[float, Field(ge=0.0, le=LARGEST_GROWTH), IsNumber]
    initializer_range: PositiveShare

    def __post_init__(self) -> None:
        impossible = size_fault(vars(self))
        if impossible is not None:
            raise RuleBroken(
                f"{AT}{impossible[0]}",
                rule=impossible[1],
                remedy="leave it out: the preset's value is such a number",
            )
        plain = {name: value for name, value in PLAIN_ROTARY.items() if getattr(self, name) != value}
        if self.family != "phi3" and plain:
            raise RuleBroken(
                f"{AT}family={self.family} with {', '.join(f'{AT}{name}={getattr(self, name)}' for name in plain)}",
                rule="partial rotation and LongRoPE are Phi's",
                remedy=f"add {' '.join(f'{AT}{name}={value}' for name, value in plain.items())}",
            )
        fault = shape_fault(
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.partial_rotary_factor
        )
        if fault is not None:
            raise RuleBroken(
                f"{AT}{fault[0]}",
                rule=fault[1],
                remedy=f"for example {AT}hidden_size=128 {AT}num_attention_heads=8 {AT}num_key_value_heads=2 "
                f"{AT}partial_rotary_factor=0.75",
            )


@config
class QuickstartConfig:
    """The whole recipe on a tiny model: one preset per step, and the sizes that are the quickstart's own.

    Attributes:
        family: of the tiny model, see :class:`BaseConfig`.
    """

    run: RunConfig
    family: FamilyName
    train_problems: SyntheticCount
    heldout_problems: SyntheticCount
    rl_problems: SyntheticCount
    evaluation_samples: Positive
