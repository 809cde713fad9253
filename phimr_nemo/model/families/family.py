"""What a family of models is: how its config.json reads, and which of its tensors are which of Megatron's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from phimr_nemo.model.fields import unsupported, whole
from phimr_nemo.model.rotary import Rotary

Split = Literal["whole", "rows", "columns", "qkv", "gate_up"]
"""How tensor parallelism divides a tensor: not at all; by rows; by columns; by rows of whole query groups, each
with its key and value head (Megatron interleaves what Hugging Face stacks as queries, keys, values); by rows of
both stacked halves."""


@dataclass(frozen=True)
class TensorRule:
    """One line of the table.

    Attributes:
        hf: the name in a Hugging Face checkpoint; ``{layer}`` counts from 0 over the whole model. Of a tensor that
            the family keeps in parts, the name that the whole would have.
        megatron: the names of the parameter with Megatron's own layers and with Transformer Engine's; ``{layer}``
            counts within the pipeline stage.
        split: how tensor parallelism divides it.
        parts: the names of the tensors whose rows, one below the other, are the whole; () where it is kept whole.
    """

    hf: str
    megatron: tuple[str, ...]
    split: Split
    parts: tuple[str, ...] = ()


INPUT_NORM: Final = TensorRule(
    "model.layers.{layer}.input_layernorm.weight",
    (
        "decoder.layers.{layer}.input_layernorm.weight",
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
    ),
    "whole",
)
QKV: Final = TensorRule(
    "model.layers.{layer}.self_attn.qkv_proj.weight",
    ("decoder.layers.{layer}.self_attention.linear_qkv.weight",),
    "qkv",
)
SEPARATE_QKV: Final = TensorRule(
    QKV.hf,
    QKV.megatron,
    QKV.split,
    (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
)
QKV_BIAS: Final = TensorRule(
    "model.layers.{layer}.self_attn.qkv_proj.bias",
    ("decoder.layers.{layer}.self_attention.linear_qkv.bias",),
    "qkv",
    (
        "model.layers.{layer}.self_attn.q_proj.bias",
        "model.layers.{layer}.self_attn.k_proj.bias",
        "model.layers.{layer}.self_attn.v_proj.bias",
    ),
)
QUERY_NORM: Final = TensorRule(
    "model.layers.{layer}.self_attn.q_norm.weight",
    ("decoder.layers.{layer}.self_attention.q_layernorm.weight",),
    "whole",
)
KEY_NORM: Final = TensorRule(
    "model.layers.{layer}.self_attn.k_norm.weight",
    ("decoder.layers.{layer}.self_attention.k_layernorm.weight",),
    "whole",
)
ATTENTION_OUT: Final = TensorRule(
    "model.layers.{layer}.self_attn.o_proj.weight",
    ("decoder.layers.{layer}.self_attention.linear_proj.weight",),
    "columns",
)
MLP_NORM: Final = TensorRule(
    "model.layers.{layer}.post_attention_layernorm.weight",
    (
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
    ),
    "whole",
)
GATE_UP: Final = TensorRule(
    "model.layers.{layer}.mlp.gate_up_proj.weight",
    ("decoder.layers.{layer}.mlp.linear_fc1.weight",),
    "gate_up",
)
SEPARATE_GATE_UP: Final = TensorRule(
    GATE_UP.hf,
    GATE_UP.megatron,
    GATE_UP.split,
    ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
)
DOWN: Final = TensorRule(
    "model.layers.{layer}.mlp.down_proj.weight",
    ("decoder.layers.{layer}.mlp.linear_fc2.weight",),
    "columns",
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type, hf_class: as config.json names them.
        layer_rules: the tensors of a layer, in the order of the checkpoint.
        has: which of the fields that not every family has (`NOT_EVERYWHERE`) this one has.
        required: what config.json may state and must then have this value, which is the one that is implemented;
            written as it is.
        defaults: transformers' for what config.json does not state.
        read_rotary: config.json and its longest sequence (tokens) -> rotary settings.
        write_rotary: the architecture's values by name -> what config.json says of its scaling.
        read_window: config.json -> attention span in tokens, None for full attention.
    """

    model_type: str
    hf_class: str
    layer_rules: tuple[TensorRule, ...]
    has: frozenset[str]
    required: Mapping[str, Any]
    defaults: Mapping[str, Any]
    read_rotary: Callable[[Mapping[str, Any], int], Rotary]
    write_rotary: Callable[[Mapping[str, Any]], dict[str, Any]]
    read_window: Callable[[Mapping[str, Any]], int | None]

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return QKV_BIAS in self.layer_rules

    @property
    def has_qk_norm(self) -> bool:
        """Whether every head's queries and keys are normalised before they are rotated."""
        return QUERY_NORM in self.layer_rules

    @property
    def matrices(self) -> tuple[str, ...]:
        """The last names of a layer's matrices, in Hugging Face's names."""
        names = (part for rule in self.layer_rules for part in rule.parts or (rule.hf,))
        return tuple(name.split(".")[-2] for name in names if name.endswith("_proj.weight"))


NOT_EVERYWHERE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "head_size": None,
        "partial_rotary_factor": 1.0,
        "short_factor": None,
        "long_factor": None,
        "llama3": None,
        "no_rope_layers": None,
        "sliding_window": None,
    }
)
"""Fields of an architecture that some families do not have -> their value there."""


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """The attention span that a config.json states; None for full attention.

    Raises:
        UserError: another kind of value.
    """
    if config.get("sliding_window") is None:
        return None
    window = whole(config, "sliding_window")
    if window < 1:
        raise unsupported(f"sliding_window = {window}", "a span in tokens, or null", "write null for full attention")
    return window


def full_attention(config: Mapping[str, Any]) -> None:
    """No span: every layer attends to all tokens before.

    Raises:
        UserError: the config says otherwise of some layers.
    """
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise unsupported(f"layer_types = {kinds!r}", "every layer has full attention")


def plain_rotary(_: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings without scaling."""
    return {"rope_scaling": None}
