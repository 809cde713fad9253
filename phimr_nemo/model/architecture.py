"""The numbers that define a Phi3-family model, read from and written to Hugging Face's config.json.

Covers Phi-3/3.5-mini (4k, 128k), Phi-4-mini, Phi-4-mini-reasoning and models of the same make. Anything that
the Megatron model would not reproduce exactly (biases, dropout, another activation, an unknown rotary scaling)
is refused here, before a weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import locate
from phimr_nemo.config.tiny import shape_fault
from phimr_nemo.errors import UserError
from phimr_nemo.store.inputs import model_remedy

MODEL_TYPE: Final = "phi3"
HF_CLASS: Final = "Phi3ForCausalLM"
CONFIG_FILE: Final = "config.json"

# "su" is the name that the first Phi-3-128k configs used for what became "longrope".
_LONGROPE_NAMES: Final = frozenset({"longrope", "su"})
_KNOWN_SCALING_KEYS: Final = frozenset(
    {
        "type",
        "rope_type",
        "short_factor",
        "long_factor",
        "factor",
        "attention_factor",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    }
)
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
_ATTENTION_FACTOR_TOLERANCE: Final = 1e-6
_DEFAULT_CONTEXT: Final = 4096


@dataclass(frozen=True)
class Architecture:
    """A Phi3-family decoder; the fields are named as in Hugging Face's ``Phi3Config``.

    Attributes:
        partial_rotary_factor: share of each head's dimensions that is rotated.
        original_max_position_embeddings: length (tokens) up to which the short factors were trained.
        short_factor, long_factor: LongRoPE divisors of the inverse frequencies, one per rotated pair; None
            for plain rotary embeddings.
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
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    initializer_range: float

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "original_max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _impossible(f"{name} = {value!r}", "a positive whole number")
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
                raise _impossible(f"{name} = {factors}", "finite positive numbers")

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
        scale = self.max_position_embeddings / self.original_max_position_embeddings
        if self.long_factor is None or scale <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(scale) / math.log(self.original_max_position_embeddings))

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
        scaling = _rope_scaling(config)
        rotary: dict[str, Any] = {**config, **{k: v for k, v in scaling.items() if v is not None}}
        heads = _required(config, "num_attention_heads")
        context = int(config.get("max_position_embeddings") or _DEFAULT_CONTEXT)
        architecture = cls(
            vocab_size=_required(config, "vocab_size"),
            hidden_size=_required(config, "hidden_size"),
            intermediate_size=_required(config, "intermediate_size"),
            num_hidden_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            partial_rotary_factor=float(rotary.get("partial_rotary_factor") or 1.0),
            rope_theta=float(rotary.get("rope_theta") or 10000.0),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=context,
            # transformers' default for Phi3 when the field is absent.
            original_max_position_embeddings=int(rotary.get("original_max_position_embeddings") or _DEFAULT_CONTEXT),
            short_factor=_factors(scaling, "short_factor"),
            long_factor=_factors(scaling, "long_factor"),
            sliding_window=config.get("sliding_window"),
            bos_token_id=_token_id(config, "bos_token_id", None),
            eos_token_id=_token_id(config, "eos_token_id", None),
            pad_token_id=_token_id(config, "pad_token_id", "eos_token_id"),
            initializer_range=float(config.get("initializer_range", 0.02)),
        )
        _check_attention_factor(architecture, scaling)
        if config.get("head_dim") not in (None, architecture.head_dim):
            raise _unsupported(f"head_dim = {config['head_dim']}", f"hidden_size / heads = {architecture.head_dim}")
        return architecture

    @classmethod
    def from_directory(cls, path: Path) -> Architecture:
        """Read ``config.json`` of a Hugging Face model directory.

        Raises:
            UserError: no such file, no JSON in it, or an architecture that is refused.
        """
        file = Path(path) / CONFIG_FILE
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{path} has no {CONFIG_FILE}",
                rule="a Hugging Face model directory holds config.json, *.safetensors and tokenizer files",
                remedy=model_remedy(Path(path)),
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file} is not JSON: {error}",
                rule="config.json is one JSON object",
                remedy="copy or download the file again",
            ) from error
        if not isinstance(config, dict):
            raise UserError(
                f"{file} holds a {type(config).__name__}",
                rule="config.json is one JSON object",
                remedy="copy or download the file again",
            )
        try:
            return cls.from_hf_config(config)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _unsupported(
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
        optional = {"short_factor", "long_factor", "sliding_window"}
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


def _unsupported(found: str, rule: str) -> UserError:
    return UserError(
        f"model config with {found}",
        rule=rule,
        remedy="use a Phi3-family model: Phi-4-mini, Phi-4-mini-reasoning, Phi-3-mini, Phi-3.5-mini",
    )


def _check_family(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != MODEL_TYPE:
        raise _unsupported(f"model_type = {config.get('model_type')!r}", f"model_type is {MODEL_TYPE!r}")
    classes = config.get("architectures")
    if classes and HF_CLASS not in classes:
        raise _unsupported(f"architectures = {classes}", f"architectures holds {HF_CLASS!r}")
    for name, value in _REQUIRED_VALUES.items():
        if config.get(name, value) not in (value, None):
            raise _unsupported(f"{name} = {config[name]!r}", f"{name} is {value!r}")


def is_phi(directory: Path) -> bool:
    """Whether a directory holds a model of this family; what cannot be read is left to `Architecture` to refuse."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or config.get("model_type") == MODEL_TYPE


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of either transformers generation as one dictionary ({} for plain rotary)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise _unsupported(f"rope_scaling = {scaling!r}", "a dictionary or null")
    unknown = sorted(scaling.keys() - _KNOWN_SCALING_KEYS)
    if unknown:
        raise _unsupported(f"unknown rotary settings {unknown}", f"rope_scaling holds {sorted(_KNOWN_SCALING_KEYS)}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {k: v for k, v in scaling.items() if k not in ("short_factor", "long_factor")}
    if kind not in _LONGROPE_NAMES:
        raise _unsupported(f"rope_scaling type {kind!r}", "type is 'longrope' or absent")
    return dict(scaling)


def _factors(scaling: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    values = scaling.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    ):
        raise _unsupported(f"{name} = {values!r}", f"{name} is a list of numbers")
    return tuple(float(value) for value in values)


def _check_attention_factor(architecture: Architecture, scaling: Mapping[str, Any]) -> None:
    stated = scaling.get("attention_factor")
    if stated is None:
        return
    if abs(float(stated) - architecture.attention_factor) > _ATTENTION_FACTOR_TOLERANCE:
        raise _unsupported(
            f"attention_factor = {stated}",
            f"sqrt(1 + ln(max / original) / ln(original)) = {architecture.attention_factor:.6f}",
        )


def _required(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if value is None:
        raise _unsupported(f"no {name}", f"config.json states {name}")
    return int(value)


def _token_id(config: Mapping[str, Any], name: str, fallback: str | None) -> int:
    value = config.get(name)
    if value is None and fallback is not None:
        value = config.get(fallback)
    # config.json may list several end tokens; the list's full form belongs in generation_config.json.
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise _unsupported(f"{name} = {value!r}", f"{name} is a token id")
    return value
