"""Which parallel layouts can hold a model. Needs no torch, so that a layout is refused before anything starts."""

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
            layers; sequence parallelism without tensor parallelism.
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
    if arch.num_hidden_layers % layout.pipeline:
        raise UserError(
            f"parallel.pipeline={layout.pipeline} with {arch.num_hidden_layers} layers",
            rule="parallel.pipeline divides the number of layers",
            remedy=f"choose parallel.pipeline among the divisors of {arch.num_hidden_layers}",
        )
    if layout.sequence and layout.tensor == 1:
        raise UserError(
            "parallel.sequence=true with parallel.tensor=1",
            rule="sequence parallelism splits over the tensor-parallel group",
            remedy="set parallel.tensor >= 2 or parallel.sequence=false",
        )


def _common_divisors(arch: Architecture) -> list[int]:
    counts = (arch.num_attention_heads, arch.num_key_value_heads, arch.vocab_size, arch.intermediate_size)
    return [n for n in range(1, arch.num_key_value_heads + 1) if all(count % n == 0 for count in counts)]
