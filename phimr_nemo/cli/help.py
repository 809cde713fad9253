"""`phimr STAGE --help`: examples, and every key with its type and what it is. Nothing is loaded before that."""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from typer.core import TyperCommand

from phimr_nemo.errors import UserError

WIDTH: Final = 100
KEY_WIDTH: Final = 34
CONF: Final = "conf"
ATTRIBUTE: Final = re.compile(r"^    (?:    )?(\w+(?:, \w+)*): (.*)$")


class Key(typing.NamedTuple):
    """A key of a stage's configuration.

    Attributes:
        name: with dots.
        kind: its type as it is shown.
        text: what it is; empty where the dataclass says nothing.
        default: as it is written in YAML; None for a key that a configuration has to give.
    """

    name: str
    kind: str
    text: str
    default: str | None


class StageCommand(TyperCommand):
    """A stage's command: its help ends with examples and keys, and a key written like an option is explained."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        super().format_help(ctx, formatter)
        stage = str(ctx.info_name)
        formatter.write(f"Examples:\n{''.join(f'  {line}{chr(10)}' for line in examples(stage))}")
        formatter.write(f"\nPresets in conf/{stage}: {', '.join(presets(stage))}\n")
        formatter.write(f"\nKeys, for KEY=VALUE on the command line and for the YAML file (conf/{stage}/*.yaml):\n")
        for line in key_lines(stage):
            formatter.write(f"{line}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, but say of `--optim.lr 1e-3` how it is written.

        Raises:
            UserError: a setting is written like an option.
        """
        options = {name for item in self.get_params(ctx) for name in (*item.opts, *item.secondary_opts)}
        for word, after in itertools.zip_longest(args, args[1:], fillvalue=""):
            name, equals, value = word.partition("=")
            key = name.lstrip("-")
            if word.startswith("--") and key and name not in options and is_key(str(ctx.info_name), key):
                given = value if equals else ("VALUE" if after.startswith("-") or "=" in after else after or "VALUE")
                raise UserError(
                    f"{word} is not an option",
                    rule="settings are written KEY=VALUE, without dashes",
                    remedy=f"write {key}={given}",
                )
        return list(super().parse_args(ctx, args))


def is_key(stage: str, name: str) -> bool:
    """Whether a name with dots, or one of the stage's own keys, is meant for the configuration."""
    return "." in name or name in {key.name for key in keys(stage)}


def _schema(stage: str) -> type[Any]:
    from phimr_nemo.config import STAGES, QuickstartConfig

    return {**STAGES, "quickstart": QuickstartConfig}[stage]


def examples(stage: str) -> Iterator[str]:
    """Commands to begin with: the tiny preset, a look without running, a changed value."""
    if stage == "quickstart":
        yield "phimr quickstart"
        yield "phimr quickstart --seeds 0,1,2 --out runs/three"
        yield "phimr quickstart --dry-run"
        return
    preset = f"conf/{stage}/tiny.yaml"
    yield f"phimr {stage} --config {preset}"
    yield f"phimr {stage} --config {preset} --dry-run"
    yield f"phimr {stage} --config {preset} run.output=runs/another run.seed=1"


def presets(stage: str) -> list[str]:
    """Names of a stage's presets."""
    return sorted(path.stem for path in (Path(__file__).resolve().parents[2] / CONF / stage).glob("*.yaml"))


def key_lines(stage: str) -> Iterator[str]:
    """A line or two a key: name, type, what it is."""
    for key, kind, text, _ in keys(stage):
        head = f"  {key}  {kind}" if text else f"  {key}  {kind}".rstrip()
        if not text:
            yield head
            continue
        padding = " " * (KEY_WIDTH + 2)
        first = f"{head:<{KEY_WIDTH}}  " if len(head) <= KEY_WIDTH else f"{head}\n{padding}"
        lines = textwrap.wrap(text, WIDTH - KEY_WIDTH - 2) or [""]
        yield first + f"\n{padding}".join(lines)


def keys(stage: str) -> Iterator[Key]:
    """Every key of a stage; of a section with kinds, those of each kind."""
    yield from _keys(_schema(stage))


def _keys(schema: type[Any], prefix: str = "") -> Iterator[Key]:
    described = _attributes(schema)
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        sections = [kind for kind in _members(hints[item.name]) if dataclasses.is_dataclass(kind)]
        if not sections:
            yield Key(
                f"{prefix}{item.name}", _type_name(hints[item.name]), described.get(item.name, ""), _default(item)
            )
            continue
        if type(None) in _members(hints[item.name]):
            yield Key(f"{prefix}{item.name}", "null, or:", described.get(item.name, ""), _default(item))
        for section in sections:
            yield from _keys(typing.cast("type[Any]", section), f"{prefix}{item.name}.")


def _default(item: dataclasses.Field[Any]) -> str | None:
    value = item.default
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    if value is dataclasses.MISSING:
        return None
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _members(hint: Any) -> Iterator[Any]:
    """The types that a hint joins."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _members(arguments[0])
    elif arguments and origin not in (dict, list, tuple, typing.Literal):
        for argument in arguments:
            yield from _members(argument)
    else:
        yield hint


def _type_name(hint: Any) -> str:
    names = []
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            names.append("|".join(map(str, typing.get_args(member))))
        elif member is type(None):
            names.append("null")
        else:
            names.append(getattr(member, "__name__", str(member)).lower().removeprefix("posix"))
    return "|".join(dict.fromkeys(names))


def _attributes(schema: type[Any]) -> dict[str, str]:
    """The lines of a docstring's section "Attributes" by name, over those of the class that it is derived from."""
    _, _, section = (schema.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = _attributes(schema.__base__) if dataclasses.is_dataclass(schema.__base__) else {}
    names: list[str] = []
    for line in section.splitlines():
        start = ATTRIBUTE.match(line)
        if start is not None:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
