"""The numbers that define a model, read from and written to Hugging Face's config.json.

Covers the families of `phimr_nemo.model.families`. Anything that the Megatron model would not reproduce exactly
(other biases, dropout, another activation, an unknown rotary scaling) is refused here, before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import locate
from phimr_nemo.config.tiny import shape_fault, size_fault
from phimr_nemo.errors import UserError
from phimr_nemo.model.families import FAMILIES, REFUSED
from phimr_nemo.model.families.family import NOT_EVERYWHERE, Family
from phimr_nemo.model.families.phi3 import PHI3
from phimr_nemo.model.fields import at_least_zero, is_number, shown, truth, unsupported, whole
from phimr_nemo.model.rotary import attention_factor
from phimr_nemo.store.inputs import download_remedy, model_remedy
from phimr_nemo.store.unpacking import read_json

CONFIG_FILE: Final = "config.json"
OPTIONAL: Final = frozenset({*(name for name, value in NOT_EVERYWHERE.items() if value is None), "bos_token_id"})
"""Fields that may be None."""


@dataclass(frozen=True)
class Architecture:
    """A decoder; the fields are named as in Hugging Face's ``Phi3Config``.

    Attributes:
        partial_rotary_factor: share of each head's dimensions that is rotated.
        original_max_position_embeddings: length (tokens) up to which the short factors were trained.
        short_factor, long_factor: LongRoPE divisors of the inverse frequencies, one per rotated pair; None
            for plain rotary embeddings.
        bos_token_id: None for a model whose texts begin with no token of their own.
        sliding_window: attention span in tokens; None or anything from the run's length on is full attention.
        family: the model_type of its config.json, a key of `phimr_nemo.model.families.FAMILIES`.
        head_size: dimensions of a head where they are not hidden_size / num_attention_heads.
        llama3: rotary scaling of Llama 3.1 and later, the values of `phimr_nemo.model.rotary.LLAMA3_KEYS`.
        no_rope_layers: SmolLM3's, one entry per layer: 1 where it is rotated, 0 where not; None: all are.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    original_max_position_embeddings: int
    short_factor: tuple[float, ...] | None
    long_factor: tuple[float, ...] | None
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    initializer_range: float
    family: str = PHI3.model_type
    head_size: int | None = None
    llama3: tuple[float, float, float, int] | None = None
    no_rope_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_family()
        fault = size_fault(vars(self))
        if fault is not None:
            raise _impossible(*fault)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise _impossible(f"{name} = {shown(value)}", f"a token id below vocab_size = {self.vocab_size}")
        fault = shape_fault(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.partial_rotary_factor,
            self.head_size,
        )
        if fault is not None:
            raise _impossible(*fault)
        self._check_factors()

    def _check_family(self) -> None:
        if self.family not in FAMILIES:
            raise _impossible(f"family = {shown(self.family)}", f"one of {', '.join(sorted(FAMILIES))}")
        has = self.traits.has
        for name, neutral in NOT_EVERYWHERE.items():
            if name not in has and getattr(self, name) != neutral:
                raise _impossible(
                    f"{name} = {shown(getattr(self, name))} in a model of the family {self.family}",
                    f"{name} is {neutral!r} there",
                )
        if "no_rope_layers" in has and not self._is_per_layer(self.no_rope_layers):
            raise _impossible(
                f"no_rope_layers = {shown(self.no_rope_layers)} with num_hidden_layers = {self.num_hidden_layers}",
                "an entry per layer: 1 where it is rotated, 0 where not",
            )

    def _is_per_layer(self, entries: object) -> bool:
        return isinstance(entries, tuple) and set(entries) <= {0, 1} and len(entries) == self.num_hidden_layers

    def _check_factors(self) -> None:
        if (self.short_factor is None) != (self.long_factor is None):
            raise _impossible("only one of short_factor and long_factor", "both or neither")
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if factors is None:
                continue
            if len(factors) != self.rotary_dim // 2:
                raise _impossible(
                    f"{name} with {len(factors)} numbers",
                    f"one per rotated pair: rotary_dim / 2 = {self.rotary_dim // 2}",
                )
            if not all(math.isfinite(factor) and factor > 0 for factor in factors):
                raise _impossible(f"{name} = {shown(factors)}", "finite positive numbers")
        if self.llama3 is None:
            return
        if not all(is_number(value) and value > 0 for value in self.llama3) or not self.llama3[1] < self.llama3[2]:
            raise _impossible(f"llama3 = {shown(self.llama3)}", "numbers above 0, low_freq_factor < high_freq_factor")

    @property
    def traits(self) -> Family:
        """What its family is made of."""
        return FAMILIES[self.family]

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_size is None else self.head_size

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated: int(head_dim * partial_rotary_factor)."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def rotated_layers(self) -> tuple[bool, ...]:
        """Of each layer whether its queries and keys are rotated."""
        if self.no_rope_layers is None:
            return (True,) * self.num_hidden_layers
        return tuple(entry == 1 for entry in self.no_rope_layers)

    @property
    def attention_factor(self) -> float:
        """LongRoPE's factor on cos and sin, in both regimes (arXiv 2402.13753; 1 without LongRoPE).

        sqrt(1 + ln(max / original) / ln(original)), 1.190238 for Phi-4-mini.
        """
        if self.long_factor is None:
            return 1.0
        return attention_factor(self.max_position_embeddings, self.original_max_position_embeddings)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers; a tied embedding counts once. 3,836,021,760 for Phi-4-mini."""
        queries, stacked = self.num_attention_heads * self.head_dim, self.stacked_heads * self.head_dim
        attention = self.hidden_size * (stacked + queries)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + self.layer_vectors(stacked)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    @property
    def stacked_heads(self) -> int:
        """Heads of queries, keys and values together."""
        return self.num_attention_heads + 2 * self.num_key_value_heads

    def layer_vectors(self, stacked: int) -> int:
        """Numbers of a layer's norms and biases.

        Args:
            stacked: dimensions of queries, keys and values together, of which a rank may have a part.
        """
        biases = stacked if self.traits.has_qkv_bias else 0
        return 2 * self.hidden_size + biases + (2 * self.head_dim if self.traits.has_qk_norm else 0)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read the dictionary of a config.json (transformers 4.x or 5.x).

        Raises:
            UserError: another model family, or a feature that this model does not have.
        """
        family = _family(config)
        defaults = family.defaults
        context = whole(config, "max_position_embeddings", defaults["max_position_embeddings"])
        heads = whole(config, "num_attention_heads")
        is_unsaid = config.get("num_key_value_heads", defaults.get("num_key_value_heads")) is None
        vocabulary = whole(config, "vocab_size")
        end = _token_id(config, "eos_token_id", vocabulary, defaults)
        if end is None:
            raise unsupported(
                f"eos_token_id = {config.get('eos_token_id')!r}",
                "eos_token_id says which token ends a text",
                "write the id of the tokenizer's end-of-text token there (199999 for Phi-4-mini)",
            )
        pad = _token_id(config, "pad_token_id", vocabulary, defaults)
        hidden = whole(config, "hidden_size")
        return cls(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=whole(config, "intermediate_size"),
            num_hidden_layers=whole(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads
            if is_unsaid
            else whole(config, "num_key_value_heads", defaults.get("num_key_value_heads")),
            rms_norm_eps=at_least_zero(config, "rms_norm_eps", defaults["rms_norm_eps"]),
            tie_word_embeddings=truth(config, "tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
            max_position_embeddings=context,
            sliding_window=family.read_window(config),
            bos_token_id=_token_id(config, "bos_token_id", vocabulary, defaults),
            eos_token_id=end,
            pad_token_id=end if pad is None else pad,
            initializer_range=at_least_zero(config, "initializer_range", 0.02),
            family=family.model_type,
            head_size=_head_size(config, family, hidden, heads),
            **vars(family.read_rotary(config, context)),
        )

    @classmethod
    def from_directory(cls, path: Path) -> Architecture:
        """Read ``config.json`` of a Hugging Face model directory.

        Raises:
            UserError: no such file, no JSON in it, or an architecture that is refused.
        """
        file = Path(path) / CONFIG_FILE
        try:
            config = read_json(file)
        except FileNotFoundError as error:
            raise UserError(
                f"{path} has no {CONFIG_FILE}",
                rule="a Hugging Face model directory holds config.json, *.safetensors and tokenizer files",
                remedy=model_remedy(Path(path)),
            ) from error
        except (ValueError, IsADirectoryError) as error:
            raise UserError(
                f"{file} is not JSON: {error}",
                rule="config.json is one JSON object",
                remedy=download_remedy(file),
            ) from error
        if not isinstance(config, dict):
            raise UserError(
                f"{file} holds a {type(config).__name__}",
                rule="config.json is one JSON object",
                remedy=download_remedy(file),
            )
        try:
            return cls.from_hf_config(config)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise unsupported(
                f"{file} holds a value of the wrong kind: {error}", "numbers stand for numbers"
            ) from error

    @classmethod
    def from_preset(cls, values: Mapping[str, Any], **filled: Any) -> Architecture:
        """Make an architecture from a ``conf/model/*.yaml`` mapping whose null values ``filled`` replaces.

        Args:
            values: every field of this class; null where the value comes from elsewhere (a tokenizer).
            filled: field values that take precedence, for example ``vocab_size`` and token ids.

        Raises:
            UserError: an unknown or a missing field.
        """
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        merged = {**values, **filled}
        unknown, missing = sorted(merged.keys() - names), sorted(needed - merged.keys())
        empty = sorted(name for name in names - OPTIONAL if name in merged and merged[name] is None)
        if unknown or missing or empty:
            raise UserError(
                f"model preset with unknown fields {unknown}, missing {missing}, unfilled {empty}",
                rule=f"the fields {sorted(needed)} and, where a family has them, {sorted(names - needed)}",
                remedy=f"see {locate('conf/model/phi4mini.yaml')}; a null there comes from the tokenizer",
            )
        for name in ("short_factor", "long_factor"):
            merged[name] = None if merged[name] is None else tuple(float(x) for x in merged[name])
        for name in ("llama3", "no_rope_layers"):
            if merged.get(name) is not None:
                merged[name] = tuple(merged[name])
        return cls(**merged)

    def to_hf_config(self) -> dict[str, Any]:
        """The config.json that transformers 4.51 and 5.x, vLLM and TensorRT-LLM read.

        ``rope_scaling`` has exactly the keys that transformers 4's validation demands; transformers 5 turns it into
        its ``rope_parameters`` when loading.
        """
        family, values = self.traits, vars(self)
        elsewhere = {"family", "head_size", "short_factor", "long_factor", "llama3", "no_rope_layers"}
        elsewhere |= NOT_EVERYWHERE.keys() - family.has
        if "long_factor" not in family.has:
            elsewhere.add("original_max_position_embeddings")
        return {
            "architectures": [family.hf_class],
            "model_type": family.model_type,
            **{name: value for name, value in values.items() if name not in elsewhere},
            **({"head_dim": self.head_dim} if "head_size" in family.has else {}),
            **family.required,
            **family.write_rotary(values),
            "use_cache": True,
        }


def _impossible(found: str, rule: str) -> UserError:
    return UserError(f"impossible architecture: {found}", rule=rule, remedy="correct the model's config or preset")


def _family(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names, whose values are those that are implemented."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reason = f": {REFUSED[model_type]}" if isinstance(model_type, str) and model_type in REFUSED else ""
        raise unsupported(
            f"model_type = {model_type!r}{reason}", f"model_type is one of {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    classes = config.get("architectures")
    if classes and family.hf_class not in classes:
        raise unsupported(f"architectures = {classes}", f"architectures holds {family.hf_class!r}")
    for name, value in family.required.items():
        if config.get(name, value) not in (value, None):
            raise unsupported(f"{name} = {config[name]!r}", f"{name} is {value!r}")
    return family


def _head_size(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int | None:
    """Dimensions of a head where they do not follow from the others."""
    default = family.defaults.get("head_dim")
    stated = config.get("head_dim", default)
    if stated is None and default is None:
        return None
    size = whole(config, "head_dim", default)
    if heads > 0 and size * heads == hidden:
        return None
    if "head_size" not in family.has:
        raise unsupported(f"head_dim = {size}", f"hidden_size / heads = {hidden} / {heads}")
    return size


def is_phi(directory: Path) -> bool:
    """Whether a directory holds a model of this family; what cannot be read is left to `Architecture` to refuse."""
    try:
        config = read_json(directory / CONFIG_FILE)
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or config.get("model_type") == PHI3.model_type


def is_readable(directory: Path) -> bool:
    """Whether a directory holds a model that stages read, Phi's or another family's; others only vLLM opens."""
    if is_phi(directory):
        return True
    config = read_json(directory / CONFIG_FILE)
    try:
        Architecture.from_hf_config(config)
    except (UserError, TypeError, ValueError, ArithmeticError):
        return False
    return "quantization_config" not in config


def _token_id(config: Mapping[str, Any], name: str, vocabulary: int, defaults: Mapping[str, Any]) -> int | None:
    """A token's id; None where the config says that there is none, or where transformers' default is beyond it."""
    if name not in config:
        default: int | None = defaults.get(name)
        return default if default is not None and default < vocabulary else None
    value = config[name]
    # config.json may list several end tokens; the list's full form belongs in generation_config.json.
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise unsupported(f"{name} = {value!r}", f"{name} is a token id", f"write {name} as a whole number")
    return ids[0] if ids else None
