"""A configuration that checks itself: the dataclass decorator, how a class states a broken rule, what the user reads.

Whoever makes a configuration, from YAML or in Python, gets it checked: unknown keys, types, ranges, and in
`__post_init__` the rules over several fields of one class.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import shlex
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from typing_extensions import dataclass_transform

from phimr_nemo.errors import UserError
from phimr_nemo.redact import redact

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")

KIND: Final = "kind"
"""The key that tells which dataclass of a union a section fills."""
AT: Final = "\x00"
"""Stands for the section's place in front of a key, in what a class says of its own fields."""
KEY: Final = "\x01"
"""Stands for the whole key, in what a type says of one value."""
SUGGESTIONS: Final = 3
SIMILAR_ENOUGH: Final = 0.5
MAX_SHOWN: Final = 200
EXAMPLES: Final[tuple[Any, ...]] = (1, 0.5, 2, 0, 5, 0.1, 1e-5, 1e-8, True, "text", ["text"], None)
"""What a remedy tries in the place of a refused value, in this order; `null` leaves a section out."""
MISSING: Final = ("missing", "missing_argument", "missing_keyword_only_argument")
OPTIONS: Final = re.compile(r"'([^']*)'")
INTERPOLATION: Final = "${"
"""Where a value of YAML refers to another one."""
CORRECT: Final = "correct the named keys in the YAML file or on the command line (key.sub=value)"


class RuleBroken(ValueError):
    """Fields of one class that do not go together, or a value that its type refuses.

    Args:
        problem: the values; a key is written with :data:`AT` before it, or :data:`KEY` for the only one.
        rule: what would have been right.
        remedy: what to do about it, with `key=value` where that is possible.
    """

    def __init__(self, problem: str, *, rule: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.rule, self.remedy = problem, rule, remedy


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that is checked when it is made; an unknown key is an error.

    Raises:
        UserError: (when an object is made) every mistake, with value, rule and remedy.
    """
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @functools.wraps(made.__init__)
    def initialise(self: T, **values: Any) -> None:
        vars(self).update(vars(checked(made, values)))

    made.__init__ = initialise  # type: ignore[method-assign,assignment]
    return made


def checked(schema: type[T], values: Mapping[str, Any], **context: Any) -> T:
    """A configuration of plain values, or of sections that are made already.

    Args:
        schema: its dataclass.
        values: its fields, nested.
        context: what :func:`refusal` takes besides.

    Raises:
        UserError: every mistake, with value, rule and remedy.
    """
    from pydantic import ValidationError

    try:
        found: T = _adapter(typing.cast("Hashable", schema)).validate_python(values)
    except ValidationError as error:
        raise refusal(error, schema, values, **context) from None
    return found


@functools.cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def refusal(
    error: ValidationError,
    schema: type,
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    moved: Mapping[str, str] | None = None,
) -> UserError:
    """Every mistake in a configuration's values as one error.

    Args:
        error: pydantic's.
        schema: the configuration's dataclass.
        values: what was given, nested.
        overrides: the `key=value` items among it, as they were typed.
        moved: former keys and kinds -> what they are now.
    """
    items = error.errors()
    # A section that is missing under its new name is there under its former one.
    former = {(moved or {}).get(".".join(map(str, item["loc"]))) for item in items}
    items = [item for item in items if item["type"] not in MISSING or ".".join(map(str, item["loc"])) not in former]
    # A list with a bad item is called too short as well.
    places = [item["loc"] for item in items]
    items = [
        item
        for item in items
        if not any(len(p) > len(item["loc"]) and p[: len(item["loc"])] == item["loc"] for p in places)
    ]
    found = [_explain(item, schema, values, overrides, moved or {}) for item in items]
    texts = [list(dict.fromkeys(column)) for column in zip(*found, strict=True)]
    return UserError("; ".join(texts[0]), rule="; ".join(texts[1]), remedy="; ".join(texts[2]))


def _explain(
    item: Mapping[str, Any],
    schema: type,
    values: Mapping[str, Any],
    overrides: Sequence[str],
    moved: Mapping[str, str],
) -> tuple[str, str, str]:
    """Problem, rule and remedy of one of pydantic's errors."""
    path = _written(item["loc"], values)
    key = ".".join(path)
    broken = item.get("ctx", {}).get("error")
    if isinstance(broken, RuleBroken):
        place = f"{key}." if key else ""
        texts = (broken.problem, broken.rule, broken.remedy)
        problem, rule, remedy = (text.replace(AT, place).replace(KEY, key) for text in texts)
        return problem, rule, remedy
    keys = f"the keys of {schema.__name__} ({schema.__module__})"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(key, schema, overrides, moved, keys)
    if item["type"] in MISSING:
        return f"{key!r} is not given", f"{keys} without a default", f"set {key}=..."
    if item["type"] == "union_tag_not_found":
        key, expected = f"{key}.{KIND}", "one of the kinds that the section has"
        return f"{key!r} is not given", expected, f"set {key}=..."
    if item["type"] == "union_tag_invalid":
        given, options = item["ctx"]["tag"], OPTIONS.findall(item["ctx"]["expected_tags"])
        rule = f"{key}.{KIND} is one of {', '.join(options)}"
        now = moved.get(f"{key}.{KIND}={given}")
        remedy = f"set {key}.{KIND}={options[0]}" if now is None else f"the former {key}.{KIND}={given} is now {now}"
        return f"{key}.{KIND}={given!r} is none of {', '.join(options)}", rule, remedy
    problem = f"{key}={_shown(item['input'])}: {item['msg'].removeprefix('Value error, ')}"
    return (
        problem,
        item["msg"].replace("Input should be", f"{key} is"),
        _remedy(item, key, path, schema, values, overrides),
    )


def _shown(value: Any) -> str:
    text = redact(repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _unknown(
    key: str, schema: type, overrides: Sequence[str], moved: Mapping[str, str], rule: str
) -> tuple[str, str, str]:
    """What is said of a key that no class has, or has no longer."""
    if key in moved:
        given = [item for item in overrides if item.partition("=")[0] == key or item.startswith(f"{key}.")]
        items = [moved[key] + item.removeprefix(key) for item in given]
        remedy = f"write {' '.join(items)}" if items else f"move its value to {moved[key]} in the YAML file"
        return f"unknown key {key!r}: it is now {moved[key]}", rule, remedy
    known = {name for name in _all_keys(schema) if name != key}
    similar = difflib.get_close_matches(key, sorted(known), SUGGESTIONS, SIMILAR_ENOUGH)
    meant = f" (did you mean {' or '.join(similar)}?)" if similar else ""
    return (
        f"unknown key {key!r}{meant}",
        rule,
        f"use {similar[0]}, or leave it out" if similar else f"leave {key} out",
    )


def _remedy(
    item: Mapping[str, Any],
    key: str,
    path: Sequence[str],
    schema: type,
    values: Mapping[str, Any],
    overrides: Sequence[str],
) -> str:
    """A value that is accepted in the place of one that is not; text that YAML took for something else is quoted."""
    if item["type"] in ("string_type", "path_type"):
        typed = [given for given in overrides if given.partition("=")[0] == key]
        quoted = quoted_override(typed[-1]) if typed else None
        if quoted is not None:
            return f"quote the text: {quoted}"
    options = OPTIONS.findall(item["ctx"]["expected"]) if item["type"] == "literal_error" else []
    bounds = [item.get("ctx", {}).get(name) for name in ("ge", "le", "multiple_of")]
    given = item["input"]
    positive = [-given] if isinstance(given, int | float) and given < 0 and math.isfinite(given) else []
    before = {tuple(_written(e["loc"], values)) for e in _errors(schema, values)} - {tuple(path)}
    accepted = []
    for example in (*options, *(bound for bound in bounds if bound is not None), *positive, *EXAMPLES):
        changed = _replaced(values, path, example)
        after = {tuple(_written(e["loc"], changed)) for e in _errors(schema, changed)}
        if after <= before:
            return f"for example {key}={_literal(example)}"
        if tuple(path) not in after:
            accepted.append(example)
    # What remains is wrong with other values.
    return f"for example {key}={_literal(accepted[0])}" if accepted else CORRECT


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _errors(schema: type, values: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """What is wrong with values."""
    from pydantic import ValidationError

    try:
        _adapter(schema).validate_python(values)
    except ValidationError as error:
        return typing.cast("Sequence[Mapping[str, Any]]", error.errors())
    return ()


def _replaced(values: Any, path: Sequence[str], new: Any) -> Any:
    if not path:
        return new
    if isinstance(values, Mapping):
        return {**values, path[0]: _replaced(values.get(path[0]), path[1:], new)}
    if isinstance(values, list | tuple) and path[0].isdigit() and int(path[0]) < len(values):
        return [_replaced(one, path[1:], new) if i == int(path[0]) else one for i, one in enumerate(values)]
    return values


def _written(location: Sequence[str | int], values: Any) -> list[str]:
    """A place in the config as the user writes it: without the kinds that pydantic puts between the keys."""
    parts: list[str] = []
    is_entered = False
    for part in location:
        if isinstance(values, Mapping):
            # The kind comes first; a section of the same name may follow it.
            if part == values.get(KIND) and not (part in values and is_entered):
                is_entered = True
                continue
            values, is_entered = values.get(part), False
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif dataclasses.is_dataclass(values):
            values = getattr(values, str(part), None)
        elif parts:
            # The member of a plain union that was tried.
            continue
        parts.append(str(part))
    return parts


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        yield prefix + item.name
        for option in (hints[item.name], *typing.get_args(hints[item.name])):
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                yield from _all_keys(option, f"{prefix}{item.name}.")


def quoted_override(item: str) -> str | None:
    """An override whose value is taken as text, in the quotes that shell and YAML need; None where no quotes help.

    Args:
        item: `key=value` as it was typed; its value holds braces, quotes, a colon, or looks like a number.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, _, text = item.partition("=")
    if not text:
        return None
    # OmegaConf fills in ${...} in quoted text as well, unless a backslash stands before it.
    escaped = text.replace(INTERPOLATION, f"\\{INTERPOLATION}")
    quoted = f"{key}={json.dumps(escaped, ensure_ascii=False)}"
    try:
        read = OmegaConf.to_container(OmegaConf.from_dotlist([quoted]), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError):
        return None
    for part in key.split("."):
        read = read.get(part) if isinstance(read, Mapping) else None
    return shlex.quote(quoted) if read == text else None
