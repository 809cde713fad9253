"""Values of a config.json, each of the kind that it must be; what is of another kind is refused, never converted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from phimr_nemo.errors import UserError

MAX_SHOWN: Final = 300
FAMILY: Final = "use a dense model of Phi-3, 3.5 or 4-mini, Llama, SmolLM2, SmolLM3, Mistral, Qwen2.5 or Qwen3"


def unsupported(found: str, rule: str, remedy: str = FAMILY) -> UserError:
    """The refusal of a config that the model would not reproduce."""
    return UserError(f"model config with {cut(found)}", rule=rule, remedy=remedy)


def shown(value: object) -> str:
    """A value for a message: the beginning of it, when it is long."""
    return cut(repr(value))


def cut(text: str) -> str:
    """A text of bounded length."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number; `default` where the config does not state it.

    Raises:
        UserError: another kind of value, null too, or none and no default.
    """
    if name not in config:
        if default is None:
            raise unsupported(f"no {name}", f"config.json states {name}")
        return default
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise unsupported(f"{name} = {value!r}", f"{name} is a whole number", f"write {name} as a whole number")
    return value


def at_least_zero(config: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number, 0 or above; `default` where the config does not state it.

    Raises:
        UserError: another kind of value, null too.
    """
    value = config.get(name, default)
    if not is_number(value) or value < 0:
        raise unsupported(f"{name} = {value!r}", f"{name} is a number, 0 or above", f"write {name} as such a number")
    return float(value)


def positive(config: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number above 0; `default` where the config does not state it.

    Raises:
        UserError: another kind of value, null too.
    """
    value = at_least_zero(config, name, default)
    if value == 0:
        raise unsupported(f"{name} = 0", f"{name} is a number above 0", f"write {name} as such a number")
    return value


def truth(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false; `default` where the config does not state it.

    Raises:
        UserError: another kind of value, null too.
    """
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise unsupported(f"{name} = {value!r}", f"{name} is true or false", f"write {name} as true or false")
    return value


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
