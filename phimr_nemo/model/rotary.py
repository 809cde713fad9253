"""The rotary settings of a config.json, which transformers 4 spreads over it and 5 keeps in `rope_parameters`.

What contradicts itself is refused, because libraries differ in which of two statements they take; everything else is
read as transformers 5 reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from phimr_nemo.model.fields import is_number, positive, unsupported, whole

DEFAULT_CONTEXT: Final = 4096
"""transformers' default of both lengths."""
DEFAULT_THETA: Final = 10000.0
LLAMA3_KEYS: Final = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What the scaling of Llama 3.1 and later is made of, in the order of the architecture's `llama3`."""
# "su" and "yarn" are what the first Phi-3-128k configs called what became "longrope"; transformers reads them so.
_LONGROPE_NAMES: Final = frozenset({"longrope", "su", "yarn"})
_FACTOR_LISTS: Final = ("short_factor", "long_factor")
_FACTORS: Final = ("factor", "attention_factor")
_TYPES: Final = ("rope_type", "type")
_EITHER_PLACE: Final = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_KNOWN: Final = frozenset((*_TYPES, *_FACTOR_LISTS, *_FACTORS, *_EITHER_PLACE))
_WHOLE_HEADS: Final = ("rope_theta", "partial_rotary_factor")
_PLACES: Final = ("rope_scaling", "rope_parameters")
_TOLERANCE: Final = 1e-6
_SHORTEST: Final = 2
"""The logarithm of the original length divides."""


@dataclass(frozen=True)
class Rotary:
    """Rotary settings, named as in :class:`phimr_nemo.model.architecture.Architecture`."""

    rope_theta: float
    partial_rotary_factor: float
    original_max_position_embeddings: int
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    llama3: tuple[float, float, float, int] | None = None
    no_rope_layers: tuple[int, ...] | None = None


def attention_factor(context: int, original: int) -> float:
    """LongRoPE's factor on cos and sin (arXiv 2402.13753): sqrt(1 + ln(context / original) / ln(original)).

    Args:
        context: the longest sequence (tokens).
        original: the length up to which the short factors hold (tokens).
    """
    if context <= original:
        return 1.0
    return math.sqrt(1.0 + math.log(context / original) / math.log(original))


def read_longrope(config: Mapping[str, Any], context: int) -> Rotary:
    """The rotary settings of a Phi model, with LongRoPE or without scaling.

    Args:
        config: the dictionary of a config.json.
        context: its longest sequence (tokens).

    Raises:
        UserError: settings that contradict themselves, or a rotary embedding that this model does not have.
    """
    return _read_places(config, lambda place, settings: _read(config, place, settings, context))


def read_llama3(config: Mapping[str, Any], context: int, *, theta: float = DEFAULT_THETA) -> Rotary:
    """The rotary settings of a Llama, with the scaling of Llama 3.1 and later or without any.

    Args:
        config, context: as of :func:`read_longrope`.
        theta: the base of the frequencies where the config does not state it.

    Raises:
        UserError: as there.
    """
    return _read_places(config, lambda place, settings: _read_whole_heads(config, place, settings, context, theta))


def read_plain(config: Mapping[str, Any], context: int, *, theta: float = DEFAULT_THETA) -> Rotary:
    """The rotary settings of a model without scaling.

    Args, raises: as :func:`read_llama3`.
    """
    rotary = read_llama3(config, context, theta=theta)
    if rotary.llama3 is not None:
        raise unsupported("rotary scaling of type llama3", "type is 'default' or absent")
    return rotary


def _read_places(config: Mapping[str, Any], read: Callable[[str, Mapping[str, Any]], Rotary]) -> Rotary:
    """The settings of either generation of transformers."""
    stated = {place: config[place] for place in _PLACES if config.get(place)}
    for place, settings in stated.items():
        if not isinstance(settings, Mapping):
            raise unsupported(f"{place} = {settings!r}", "a dictionary or null")
    found = {place: read(place, settings) for place, settings in stated.items()}
    if not found:
        return read(_PLACES[0], {})
    first, *others = found.values()
    if any(other != first for other in others):
        raise unsupported(
            "rope_scaling and rope_parameters that differ",
            "both say the same where both are stated: transformers 4 reads the one, other engines the other",
            "keep the one that the model was trained with",
        )
    return first


def _read(config: Mapping[str, Any], place: str, settings: Mapping[str, Any], context: int) -> Rotary:
    """Settings in one dictionary, completed by what stands beside it."""
    unknown = sorted(map(str, settings.keys() - _KNOWN))
    if unknown:
        raise unsupported(f"unknown rotary settings {unknown}", f"{place} holds {sorted(_KNOWN)}")
    settings = {name: value for name, value in settings.items() if value is not None}
    rotary = _merged(config, place, settings, _EITHER_PLACE)
    original = whole(rotary, "original_max_position_embeddings", DEFAULT_CONTEXT)
    if config.get("original_max_position_embeddings") is None and original != DEFAULT_CONTEXT:
        raise unsupported(
            f"{place}.original_max_position_embeddings = {original} and none beside {place}",
            f"transformers computes with {DEFAULT_CONTEXT} unless it stands at the top of config.json too",
            f'add "original_max_position_embeddings": {original} there',
        )
    if original < _SHORTEST:
        raise unsupported(
            f"original_max_position_embeddings = {original}",
            f"a length of at least {_SHORTEST} tokens",
            "write the length that the model was first trained with",
        )
    is_long = _is_longrope(place, settings)
    if is_long:
        _check_factors(place, settings, context, original)
    return Rotary(
        rope_theta=positive(rotary, "rope_theta", DEFAULT_THETA),
        partial_rotary_factor=positive(rotary, "partial_rotary_factor", 1.0),
        original_max_position_embeddings=original,
        short_factor=_numbers(settings, "short_factor") if is_long else None,
        long_factor=_numbers(settings, "long_factor") if is_long else None,
    )


def _merged(
    config: Mapping[str, Any], place: str, settings: Mapping[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """Settings, and those of `names` that stand beside their place."""
    beside = {name: config[name] for name in names if name in config}
    for name in names:
        if name in settings and beside.get(name) is not None and settings[name] != beside[name]:
            raise unsupported(
                f"{name} = {beside[name]!r} and {place}.{name} = {settings[name]!r}",
                "a setting in two places has one value",
                "keep the one that the model was trained with in both",
            )
    return {**beside, **settings}


def _read_whole_heads(
    config: Mapping[str, Any], place: str, settings: Mapping[str, Any], context: int, theta: float
) -> Rotary:
    """Settings of a model that rotates whole heads."""
    known = (*_TYPES, *_WHOLE_HEADS, *LLAMA3_KEYS)
    unknown = sorted(map(str, settings.keys() - set(known)))
    settings = {name: value for name, value in settings.items() if value is not None}
    kinds = {str(settings[name]) for name in _TYPES if name in settings}
    is_scaled = kinds == {"llama3"}
    if kinds - {"default", "llama3"} or len(kinds) > 1:
        raise unsupported(f"{place} of type {' and '.join(sorted(kinds))}", "type is 'llama3', 'default' or absent")
    scales = [name for name in LLAMA3_KEYS if name in settings]
    if unknown or (scales and not is_scaled):
        raise unsupported(
            f"rotary settings {[*unknown, *scales]} in {place} of type {' '.join(kinds) or 'default'}",
            f"{place} holds {sorted(known)}, and factors belong to the type 'llama3'",
        )
    rotary = _merged(config, place, settings, _WHOLE_HEADS)
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported(f"partial_rotary_factor = {rotary['partial_rotary_factor']!r}", "whole heads are rotated")
    return Rotary(
        rope_theta=positive(rotary, "rope_theta", theta),
        partial_rotary_factor=1.0,
        original_max_position_embeddings=context,
        llama3=_llama3(place, settings) if is_scaled else None,
    )


def _llama3(place: str, settings: Mapping[str, Any]) -> tuple[float, float, float, int]:
    missing = [name for name in LLAMA3_KEYS if name not in settings]
    if missing:
        raise unsupported(
            f"{place} of type llama3 without {' and '.join(missing)}",
            f"the type llama3 has {', '.join(LLAMA3_KEYS)}",
            "take the config.json that the model was published with",
        )
    factor, low, high = (positive(settings, name, 1.0) for name in LLAMA3_KEYS[:3])
    return factor, low, high, whole(settings, LLAMA3_KEYS[3])


def _is_longrope(place: str, settings: Mapping[str, Any]) -> bool:
    """Whether the settings are LongRoPE's; otherwise they are those of plain rotary embeddings."""
    kinds = {str(settings[name]) for name in _TYPES if name in settings}
    meant = {"longrope" if kind in _LONGROPE_NAMES else kind for kind in kinds} or {"default"}
    scales = [name for name in (*_FACTOR_LISTS, *_FACTORS) if name in settings]
    if meant == {"longrope"}:
        missing = [name for name in _FACTOR_LISTS if name not in settings]
        if missing:
            raise unsupported(
                f"{place} of type {' and '.join(sorted(kinds))} without {' and '.join(missing)}",
                "LongRoPE has a list of factors for short and one for long sequences",
                "take the config.json that the model was published with",
            )
        return True
    if meant != {"default"}:
        raise unsupported(f"{place} of type {' and '.join(sorted(kinds))}", "type is 'longrope', 'default' or absent")
    if scales:
        named = "without a type" if not kinds else "of type 'default'"
        raise unsupported(
            f"{place} {named} that states {' and '.join(scales)}",
            "factors belong to a type: transformers would ignore them",
            'add "type": "longrope", or remove them from a model without LongRoPE',
        )
    return False


def _check_factors(place: str, settings: Mapping[str, Any], context: int, original: int) -> None:
    """The two factors that follow from the lengths agree with them."""
    follows = {
        "factor": (context / original, "max_position_embeddings / original_max_position_embeddings"),
        "attention_factor": (
            attention_factor(context, original),
            "sqrt(1 + ln(max_position_embeddings / original_max_position_embeddings) "
            "/ ln(original_max_position_embeddings))",
        ),
    }
    for name, (value, rule) in follows.items():
        stated = settings.get(name)
        if stated is not None and not (is_number(stated) and math.isclose(stated, value, rel_tol=_TOLERANCE)):
            raise unsupported(
                f"{place}.{name} = {stated!r}",
                f"{name} is {rule}: {value:.6g} here",
                f"correct the lengths, or remove {name} from {place}",
            )


def _numbers(settings: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = settings[name]
    if not isinstance(values, list) or not all(is_number(value) for value in values):
        raise unsupported(f"{name} = {values!r}", f"{name} is a list of finite numbers")
    return tuple(float(value) for value in values)
