"""The numbers that define a Phi3-family model, read from and written to Hugging Face's config.json.

Covers Phi-3/3.5-mini (4k, 128k), Phi-4-mini, Phi-4-mini-reasoning and models of the same make. Anything that
the Megatron model would not reproduce exactly (biases, dropout, another activation, an unknown rotary scaling)
is refused here, before a weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import locate
from phimr_nemo.config.tiny import shape_fault, size_fault
from phimr_nemo.errors import UserError
from phimr_nemo.model.fields import at_least_zero, shown, truth, unsupported, whole
from phimr_nemo.model.rotary import DEFAULT_CONTEXT, attention_factor, read_rotary
from phimr_nemo.store.inputs import download_remedy, model_remedy
from phimr_nemo.store.unpacking import read_json

MODEL_TYPE: Final = "phi3"
HF_CLASS: Final = "Phi3ForCausalLM"
CONFIG_FILE: Final = "config.json"

# Present in the config, these must have the value that the Megatron model implements.
_REQUIRED_VALUES: Final[Mapping[str, Any]] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
# Ten times what the largest published models have, and more where that is cheap: a file that says more is not meant.
# transformers' for what a config does not state. A stated null is another matter: no such token.
_DEFAULT_IDS: Final[Mapping[str, int]] = {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}


@dataclass(frozen=True)
class Architecture:
    """A Phi3-family decoder; the fields are named as in Hugging Face's ``Phi3Config``.

    Attributes:
        partial_rotary_factor: share of each head's dimensions that is rotated.
        original_max_position_embeddings: length (tokens) up to which the short factors were trained.
        short_factor, long_factor: LongRoPE divisors of the inverse frequencies, one per rotated pair; None
            for plain rotary embeddings.
        bos_token_id: None for a model whose texts begin with no token of their own.
        sliding_window: attention span in tokens; None or anything from the run's length on is full attention.
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

    def __post_init__(self) -> None:
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
            self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.partial_rotary_factor
        )
        if fault is not None:
            raise _impossible(*fault)
        self._check_factors()

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

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated: int(head_dim * partial_rotary_factor)."""
        return int(self.head_dim * self.partial_rotary_factor)

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
        key_value_size = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (self.hidden_size + 2 * key_value_size) + self.hidden_size**2
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read the dictionary of a config.json (transformers 4.x or 5.x).

        Raises:
            UserError: another model family, or a feature that this model does not have.
        """
        _check_family(config)
        context = whole(config, "max_position_embeddings", DEFAULT_CONTEXT)
        heads, groups = whole(config, "num_attention_heads"), config.get("num_key_value_heads")
        vocabulary = whole(config, "vocab_size")
        end = _token_id(config, "eos_token_id", vocabulary)
        if end is None:
            raise unsupported(
                f"eos_token_id = {config.get('eos_token_id')!r}",
                "eos_token_id says which token ends a text",
                "write the id of the tokenizer's end-of-text token there (199999 for Phi-4-mini)",
            )
        pad = _token_id(config, "pad_token_id", vocabulary)
        rotary = read_rotary(config, context)
        architecture = cls(
            vocab_size=vocabulary,
            hidden_size=whole(config, "hidden_size"),
            intermediate_size=whole(config, "intermediate_size"),
            num_hidden_layers=whole(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if groups is None else whole(config, "num_key_value_heads"),
            rms_norm_eps=at_least_zero(config, "rms_norm_eps", 1e-5),
            tie_word_embeddings=truth(config, "tie_word_embeddings", False),
            max_position_embeddings=context,
            sliding_window=_window(config),
            bos_token_id=_token_id(config, "bos_token_id", vocabulary),
            eos_token_id=end,
            pad_token_id=end if pad is None else pad,
            initializer_range=at_least_zero(config, "initializer_range", 0.02),
            **vars(rotary),
        )
        if config.get("head_dim") not in (None, architecture.head_dim):
            raise unsupported(f"head_dim = {config['head_dim']}", f"hidden_size / heads = {architecture.head_dim}")
        return architecture

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
        except ValueError as error:
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
        merged = {**values, **filled}
        unknown, missing = sorted(merged.keys() - names), sorted(names - merged.keys())
        optional = {"short_factor", "long_factor", "sliding_window", "bos_token_id"}
        empty = sorted(name for name in names - optional if name in merged and merged[name] is None)
        if unknown or missing or empty:
            raise UserError(
                f"model preset with unknown fields {unknown}, missing {missing}, unfilled {empty}",
                rule=f"exactly the fields {sorted(names)}",
                remedy=f"see {locate('conf/model/phi4mini.yaml')}; a null there comes from the tokenizer",
            )
        for name in ("short_factor", "long_factor"):
            merged[name] = None if merged[name] is None else tuple(float(x) for x in merged[name])
        return cls(**merged)

    def to_hf_config(self) -> dict[str, Any]:
        """The config.json that transformers 4.51 and 5.x, vLLM and TensorRT-LLM read.

        ``rope_scaling`` has exactly the three keys that transformers 4's validation demands; transformers 5
        turns it into its ``rope_parameters`` when loading.
        """
        scaling = None
        if self.short_factor is not None and self.long_factor is not None:
            scaling = {
                "type": "longrope",
                "short_factor": list(self.short_factor),
                "long_factor": list(self.long_factor),
            }
        own = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("short_factor", "long_factor")
        }
        return {
            "architectures": [HF_CLASS],
            "model_type": MODEL_TYPE,
            **own,
            **_REQUIRED_VALUES,
            "rope_scaling": scaling,
            "use_cache": True,
        }


def _impossible(found: str, rule: str) -> UserError:
    return UserError(f"impossible architecture: {found}", rule=rule, remedy="correct the model's config or preset")


def _check_family(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != MODEL_TYPE:
        raise unsupported(f"model_type = {config.get('model_type')!r}", f"model_type is {MODEL_TYPE!r}")
    classes = config.get("architectures")
    if classes and HF_CLASS not in classes:
        raise unsupported(f"architectures = {classes}", f"architectures holds {HF_CLASS!r}")
    for name, value in _REQUIRED_VALUES.items():
        if config.get(name, value) not in (value, None):
            raise unsupported(f"{name} = {config[name]!r}", f"{name} is {value!r}")


def is_phi(directory: Path) -> bool:
    """Whether a directory holds a model of this family; what cannot be read is left to `Architecture` to refuse."""
    try:
        config = read_json(directory / CONFIG_FILE)
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or config.get("model_type") == MODEL_TYPE


def _token_id(config: Mapping[str, Any], name: str, vocabulary: int) -> int | None:
    """A token's id; None where the config says that there is none, or where transformers' default is beyond it."""
    if name not in config:
        default = _DEFAULT_IDS[name]
        return default if default < vocabulary else None
    value = config[name]
    # config.json may list several end tokens; the list's full form belongs in generation_config.json.
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise unsupported(f"{name} = {value!r}", f"{name} is a token id", f"write {name} as a whole number")
    return ids[0] if ids else None


def _window(config: Mapping[str, Any]) -> int | None:
    if config.get("sliding_window") is None:
        return None
    window = whole(config, "sliding_window")
    if window < 1:
        raise unsupported(f"sliding_window = {window}", "a span in tokens, or null", "write null for full attention")
    return window
