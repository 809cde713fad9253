"""Which parallel layouts and lengths a model can have. Needs no torch: what is impossible is refused at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phimr_nemo.errors import UserError

if TYPE_CHECKING:
    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.model.architecture import Architecture


def check_layout(arch: Architecture, layout: ParallelConfig) -> None:
    """Refuse a layout that cannot hold the model.

    Raises:
        UserError: tensor does not divide heads, key/value heads, vocabulary or FFN; pipeline does not divide
            layers, or pipeline x virtual does not.
    """
    for name, count in (
        ("attention heads", arch.num_attention_heads),
        ("key/value heads", arch.num_key_value_heads),
        ("words of the vocabulary", arch.vocab_size),
        ("FFN dimensions", arch.intermediate_size),
    ):
        if count % layout.tensor:
            raise UserError(
                f"parallel.tensor={layout.tensor} with {count} {name}",
                rule=f"parallel.tensor divides the {count} {name}",
                remedy=f"choose parallel.tensor among the common divisors, e.g. {_common_divisors(arch)}",
            )
    if layout.virtual > 1 and arch.num_hidden_layers % (layout.pipeline * layout.virtual):
        raise UserError(
            f"parallel.virtual={layout.virtual} with parallel.pipeline={layout.pipeline} "
            f"and {arch.num_hidden_layers} layers",
            rule="pipeline x virtual divides the number of layers",
            remedy="choose other parallel.pipeline and parallel.virtual, or parallel.virtual=1",
        )
    if arch.num_hidden_layers % layout.pipeline:
        raise UserError(
            f"parallel.pipeline={layout.pipeline} with {arch.num_hidden_layers} layers",
            rule="parallel.pipeline divides the number of layers",
            remedy=f"choose parallel.pipeline among the divisors of {arch.num_hidden_layers}",
        )


def check_length(arch: Architecture, length: int) -> None:
    """Refuse sequences that the model does not support.

    A sliding window is full attention up to its own length; Phi-3-mini-4k has one of 2,047 tokens, the longer models
    of the family have none that matters.

    Raises:
        UserError: `length` (tokens) is beyond the model's context or its sliding window.
    """
    if not 1 <= length <= arch.max_position_embeddings:
        raise UserError(
            f"sequence_length={length}",
            rule=f"between 1 and the model's context of {arch.max_position_embeddings} tokens",
            remedy="lower sequence_length or use a base with a longer context",
        )
    if arch.sliding_window is not None and length > arch.sliding_window:
        raise UserError(
            f"sequence_length={length} with a sliding window of {arch.sliding_window} tokens",
            rule="attention is full, which equals a sliding window only up to the window's length",
            remedy=f"set sequence_length to at most {arch.sliding_window}, or use a base without such a window",
        )


def _common_divisors(arch: Architecture) -> list[int]:
    counts = (arch.num_attention_heads, arch.num_key_value_heads, arch.vocab_size, arch.intermediate_size)
    return [n for n in range(1, arch.num_key_value_heads + 1) if all(count % n == 0 for count in counts)]


def check_world(parallel: ParallelConfig, world: int) -> None:
    """The processes that were started are those of the layout.

    Raises:
        UserError: they are more or fewer.
    """
    if world == parallel.world_size:
        return
    layout = " x ".join(f"{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "context", "data"))
    raise UserError(
        f"{world} processes were started for parallel.{layout}",
        rule=f"the layout needs tensor x pipeline x context x data = {parallel.world_size} processes",
        remedy=f"start {parallel.world_size} processes, or set parallel.data so that the product is {world}",
    )
