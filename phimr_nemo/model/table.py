"""Which Hugging Face tensor is which Megatron parameter, and where each tensor-parallel rank's part of it lies.

One table serves both directions. A rank's parameter is the concatenation of *pieces*, ranges of the full tensor
along one axis; reading the pieces loads the parameter, writing them back exports it. So the inverse needs no
code of its own, and a rank reads only what it keeps. Where a family keeps in several tensors what Megatron has in one
(queries, keys and values; gate and up), the full tensor is their rows one below the other, its *parts*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.families.family import Split, TensorRule

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
ADAPTER: Final = ".adapter."
"""In the names of the parameters of an adapter that stands beside a matrix; they are no tensors of a checkpoint."""


EMBEDDING_RULE: Final = TensorRule(EMBEDDING, ("embedding.word_embeddings.weight",), "rows")
NORM_RULE: Final = TensorRule("model.norm.weight", ("decoder.final_layernorm.weight",), "whole")
HEAD_RULE: Final = TensorRule(HEAD, ("output_layer.weight",), "rows")
# On the last pipeline stage of a tied model the output layer is a second copy of the embedding.
TIED_HEAD_RULE: Final = TensorRule(EMBEDDING, HEAD_RULE.megatron, "rows")

_DERIVED: Final = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_LAYER_NUMBER: Final = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Pieces:
    """Ranges of a full tensor along one axis whose concatenation is a rank's part.

    Attributes:
        axis: 0 (rows) or 1 (columns).
        ranges: (start, stop) in the order of the part.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Rows or columns in the part."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Part:
    """A tensor of a Hugging Face checkpoint as rows of a full tensor.

    Attributes:
        name: in the checkpoint.
        start, stop: its rows in the full tensor.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """A full tensor of the checkpoint and how it is divided.

    Attributes:
        name: in the Hugging Face checkpoint, or what it would have there if it were not kept in parts.
        shape: of the full tensor.
        split: how tensor parallelism divides it.
        parts: the tensors of the checkpoint that it is made of, in the order of its rows; () where it is one.
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a Megatron distributed checkpoint, where every layer's tensors of a kind form one.

    Attributes:
        placement: the tensor and how it is divided. Query, key and value rows lie in Megatron's order.
        key: the name in the checkpoint.
        layer: the place along the checkpoint tensor's first axis; None for tensors outside the layers.
    """

    placement: Placement
    key: str
    layer: int | None


def full_tensors(arch: Architecture) -> Iterator[Placement]:
    """Every full tensor of this model, in the order of the layers; a checkpoint keeps each whole or in parts."""
    yield _placement(EMBEDDING_RULE, arch, 0)
    for layer in range(arch.num_hidden_layers):
        for rule in arch.traits.layer_rules:
            yield _placement(rule, arch, layer)
    yield _placement(NORM_RULE, arch, 0)
    if not arch.tie_word_embeddings:
        yield _placement(HEAD_RULE, arch, 0)


def is_derived(name: str) -> bool:
    """Whether a checkpoint's tensor follows from config.json: early releases of transformers saved rotary angles."""
    return _DERIVED.fullmatch(name) is not None


def saved_tensors(arch: Architecture) -> Iterator[SavedTensor]:
    """Every tensor of a Megatron distributed checkpoint of this model, in the order of the layers."""
    yield SavedTensor(_placement(EMBEDDING_RULE, arch, 0), EMBEDDING_RULE.megatron[0], None)
    for layer in range(arch.num_hidden_layers):
        for rule in arch.traits.layer_rules:
            # Megatron's own layers save under the names of Transformer Engine's, so that either reads the other.
            key = rule.megatron[-1].replace(".{layer}.", ".")
            yield SavedTensor(_placement(rule, arch, layer), key, layer)
    yield SavedTensor(_placement(NORM_RULE, arch, 0), NORM_RULE.megatron[0], None)
    if not arch.tie_word_embeddings:
        yield SavedTensor(_placement(HEAD_RULE, arch, 0), HEAD_RULE.megatron[0], None)


def tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Hugging Face checkpoint, in the order of the layers."""
    return {
        part.name: (part.stop - part.start, *full.shape[1:]) for full in full_tensors(arch) for part in parts_of(full)
    }


def parts_of(full: Placement) -> tuple[Part, ...]:
    """The tensors of the checkpoint that a full tensor is made of; itself, where it is kept whole."""
    return full.parts or (Part(full.name, 0, full.shape[0]),)


def parts_in(full: Placement, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """Where ranges of a full tensor's rows lie in the checkpoint.

    Yields:
        (name of the tensor, first row, row after the last), in the order of the ranges.
    """
    for start, stop in ranges:
        for part in parts_of(full):
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                yield part.name, low - part.start, high - part.start


def placement_of(parameter: str, layers: list[int], arch: Architecture) -> Placement | None:
    """The checkpoint tensor of a Megatron parameter.

    Args:
        parameter: its name within a ``PhiGPTModel``.
        layers: the stage's layers, as numbered (from 0) in the whole model.
        arch: the model.

    Returns:
        None for a name that the table does not hold.
    """
    local = _LAYER_NUMBER.search(parameter)
    if local is not None:
        template = _LAYER_NUMBER.sub("{layer}", parameter)
        for rule in arch.traits.layer_rules:
            if template in rule.megatron:
                return _placement(rule, arch, layers[int(local.group())])
        return None
    head = TIED_HEAD_RULE if arch.tie_word_embeddings else HEAD_RULE
    for rule in (EMBEDDING_RULE, NORM_RULE, head):
        if parameter in rule.megatron:
            return _placement(rule, arch, 0)
    return None


def pieces(placement: Placement, arch: Architecture, rank: int, size: int) -> Pieces:
    """Where the part of tensor-parallel rank `rank` of `size` lies in the full tensor.

    `size` divides the counts that are split (see ``phimr_nemo.model.layout.check_layout``).
    """
    rows = placement.shape[0]
    if placement.split == "whole":
        return Pieces(0, ((0, rows),))
    if placement.split == "rows":
        return Pieces(0, (_share(0, rows, rank, size),))
    if placement.split == "columns":
        return Pieces(1, (_share(0, placement.shape[1], rank, size),))
    if placement.split == "gate_up":
        half = rows // 2
        return Pieces(0, (_share(0, half, rank, size), _share(half, half, rank, size)))
    return Pieces(0, _query_group_pieces(arch, rank, size))


def _query_group_pieces(arch: Architecture, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    head = arch.head_dim
    queries = arch.num_attention_heads // arch.num_key_value_heads * head
    keys_at = arch.num_attention_heads * head
    values_at = keys_at + arch.num_key_value_heads * head
    ranges: list[tuple[int, int]] = []
    first, last = _share(0, arch.num_key_value_heads, rank, size)
    for group in range(first, last):
        ranges.append((group * queries, (group + 1) * queries))
        ranges.append((keys_at + group * head, keys_at + (group + 1) * head))
        ranges.append((values_at + group * head, values_at + (group + 1) * head))
    return tuple(ranges)


def _share(start: int, count: int, rank: int, size: int) -> tuple[int, int]:
    each = count // size
    return start + rank * each, start + (rank + 1) * each


def _placement(rule: TensorRule, arch: Architecture, layer: int) -> Placement:
    shape = _shape(rule.hf, arch)
    parts: list[Part] = []
    at = 0
    for name in rule.parts:
        rows = _part_rows(name, arch)
        parts.append(Part(name.format(layer=layer), at, at + rows))
        at += rows
    return Placement(rule.hf.format(layer=layer), shape, rule.split, tuple(parts))


def _shape(template: str, arch: Architecture) -> tuple[int, ...]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    stacked = arch.stacked_heads * arch.head_dim
    last, kind = template.split(".")[-2:]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "qkv_proj": (stacked, hidden),
        "o_proj": (hidden, arch.num_attention_heads * arch.head_dim),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
        "q_norm": (arch.head_dim,),
        "k_norm": (arch.head_dim,),
    }
    shape = shapes.get(last, (hidden,))
    return shape[:1] if kind == "bias" else shape


def _part_rows(template: str, arch: Architecture) -> int:
    keys = arch.num_key_value_heads * arch.head_dim
    rows = {
        "q_proj": arch.num_attention_heads * arch.head_dim,
        "k_proj": keys,
        "v_proj": keys,
        "gate_proj": arch.intermediate_size,
        "up_proj": arch.intermediate_size,
    }
    return rows[template.split(".")[-2]]
