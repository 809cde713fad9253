"""Read a YAML file, apply `key=value` overrides, check the result against its dataclass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from phimr_nemo.config.rules import INTERPOLATION, KIND, checked, quoted_override
from phimr_nemo.errors import UserError
from phimr_nemo.redact import is_secret_setting, redact

T = TypeVar("T")

PACKAGE: Final = Path(__file__).resolve().parents[1]
CONF: Final = "conf"
"""The directory of the presets: a link in the source tree's package, files in a wheel's."""

MAX_SHOWN: Final = 500
MISSING_VALUE: Final = "???"
MOST_NODES: Final = 10_000
EXTENDS: Final = "extends"
PLACE: Final = "place"
"""The key of a YAML file that names another one beside it, whose values it changes."""


def locate(path: Path | str) -> Path:
    """A file or directory of conf/ where it can be opened: relative to the working directory, else in the package."""
    return Path(path) if Path(path).exists() else PACKAGE / path


def find_config(path: Path) -> Path:
    """A config file as given, or the same relative path in the package, wherever `phimr` is called from.

    Raises:
        UserError: there is no such file; the ones beside it are listed.
    """
    found = locate(path)
    if found.is_file():
        return found
    siblings = sorted({file.name for root in (Path(), PACKAGE) for file in (root / path).parent.glob("*.yaml")})
    raise UserError(
        f"config file {path} does not exist",
        rule="a YAML file, relative to the working directory, or one that comes with the package",
        remedy=f"use one of {siblings} in {path.parent}" if siblings else f"see the files in {locate(CONF)}",
    )


def load_config(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """A stage's configuration.

    Args:
        schema: the dataclass of the stage (see :data:`phimr_nemo.config.STAGES`).
        path: YAML file; None when the overrides say everything.
        overrides: `key.sub=value` items, applied in order.

    Raises:
        UserError: no such file, malformed YAML or override, unknown key, wrong type, missing value,
            a secret among the values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise UserError(
                f"override {item!r} is malformed",
                rule="an override has the form key.sub=value, without dashes or spaces around =",
                remedy="for example optim.lr=1e-5 parallel.tensor=2",
            )
        _refuse_undecoded(item)
    source = None if path is None else find_config(path)
    _check_overrides(overrides)
    try:
        merged = OmegaConf.create() if source is None else _read(source)
        _drop_other_kinds(merged, overrides)
        given = {item.partition("=")[0] for item in overrides}
        inside = [item for item in overrides if _goes_into_a_list(merged, item.partition("=")[0], given)]
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item for item in overrides if item not in inside]))
        for item in inside:
            _set_in_list(merged, item)
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"cannot read the configuration {path}: {str(error)[:MAX_SHOWN]}",
            rule="a config is a YAML mapping; overrides have the form key.sub=value",
            remedy="; ".join([f"quote the text: {quoted_override(one)}" for one in overrides if INTERPOLATION in one])
            or "correct the named place",
        ) from error
    if not isinstance(values, Mapping):
        raise UserError(
            f"config {path} holds a {type(values).__name__}",
            rule="a config is a YAML mapping of keys to values",
            remedy=f"look at the files in {locate(CONF)} for examples",
        )
    refuse_secrets(values)
    return parse_config(schema, {str(key): value for key, value in values.items()}, overrides)


def _refuse_undecoded(item: str) -> None:
    """Refuse an argument with bytes that this Python could not read as letters; YAML takes no such text.

    Raises:
        UserError: it holds some.
    """
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        is_utf8 = encoding.replace("-", "").lower() == "utf8"
        raise UserError(
            f"the override {item!r} holds bytes that are no {encoding} text",
            rule="keys and values are text",
            remedy="rename the file or directory in UTF-8, or go through a link with such a name"
            if is_utf8
            else "set PYTHONUTF8=1, or a locale in UTF-8 (LC_ALL=C.UTF-8)",
        ) from error


def _goes_into_a_list(values: Any, key: str, given: Collection[str]) -> bool:
    """Whether an override names a place inside a list of the file, and no override gives that list as a whole."""
    from omegaconf import OmegaConf

    places = key.split(".")
    above = (".".join(places[:count]) for count in range(1, len(places)))
    return any(one not in given and OmegaConf.is_list(OmegaConf.select(values, one)) for one in above)


def _set_in_list(values: Any, item: str) -> None:
    """Apply an override of a place inside a list.

    Raises:
        UserError: there is no such place.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, _, text = item.partition("=")
    value = OmegaConf.from_dotlist([f"{PLACE}={text}"])[PLACE]
    try:
        OmegaConf.update(values, key, value, merge=True)
    except (OmegaConfBaseException, TypeError, IndexError, ValueError) as error:
        places = key.split(".")
        above = [".".join(places[:count]) for count in range(1, len(places))]
        name = next(one for one in above if OmegaConf.is_list(OmegaConf.select(values, one)))
        raise UserError(
            f"the override {item!r} names no place in the list {name}",
            rule=f"its {len(OmegaConf.select(values, name))} entries are counted from 0",
            remedy=f"name one of them, or give the list as a whole: {name}='[...]'",
        ) from error


def _check_overrides(overrides: Sequence[str]) -> None:
    """Look at each override by itself.

    Raises:
        UserError: a value is no YAML, or refers to what is not there; the item is named, with the quotes it needs.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for item in overrides:
        try:
            OmegaConf.from_dotlist([item])
        except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
            quoted = quoted_override(item)
            reason = " ".join(str(error).split())[:MAX_SHOWN]
            raise UserError(
                f"cannot read the override {item!r}: {reason}",
                rule="the value of an override is YAML, in which braces, brackets, quotes and ': ' have a meaning",
                remedy="quote it where it has none" + ("" if quoted is None else f": {quoted}"),
            ) from error


def read_preset(path: Path) -> dict[str, Any]:
    """A YAML file's values, unchecked; over those of the one that it extends.

    Raises:
        UserError: there is no such file, or it extends what it may not.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(_read(find_config(path)))
    return dict(values)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys, as overrides name them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _read(source: Path) -> Any:
    """A YAML file, over the one that it extends.

    Raises:
        UserError: that one is not there, or extends another itself.
    """
    from omegaconf import OmegaConf

    _refuse_large(source)
    values: Any = OmegaConf.load(source)
    if not OmegaConf.is_dict(values) or EXTENDS not in values:
        return values
    below = source.parent / str(values.pop(EXTENDS))
    lower = None
    if below.is_file():
        _refuse_large(below)
        lower = OmegaConf.load(below)
    if lower is None or not OmegaConf.is_dict(lower) or EXTENDS in lower:
        raise UserError(
            f"{source} extends {below}",
            rule="the file is a mapping, stands in the same directory and extends no other",
            remedy=f"name one like it, for example {EXTENDS}: paper.yaml",
        )
    changes: Any = OmegaConf.to_container(values)
    _drop_other_kinds(lower, _whole_sections(changes))
    return OmegaConf.merge(lower, values)


def _whole_sections(changes: Mapping[str, Any]) -> list[str]:
    """`section.kind=KIND` for each section that says more than its kind: it stands for itself. One that says only its
    kind keeps what it extends, where the two kinds have the same keys."""
    values = flat(changes)
    sections = {key.rpartition(".")[0]: value for key, value in values.items() if key.rpartition(".")[2] == KIND}
    told = [key.rpartition(".")[0] for key in values]
    return [f"{section}.{KIND}={kind}" for section, kind in sections.items() if told.count(section) > 1]


def _refuse_large(source: Path) -> None:
    """Refuse a YAML file whose anchors, written out, are more than any configuration.

    Raises:
        UserError: they are; or one of them is a part of itself.
    """
    import yaml

    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            # A part of itself is as large as that.
            sizes[id(node)] = MOST_NODES
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            below = (one for part in parts for one in (part if isinstance(part, tuple) else (part,)))
            sizes[id(node)] = 1 + sum(map(size, below))
        return sizes[id(node)]

    root = yaml.compose(source.read_text("utf-8"), Loader=yaml.SafeLoader)
    if root is not None and size(root) > MOST_NODES:
        raise UserError(
            f"{source} holds anchors that make more than {MOST_NODES:,} values",
            rule="a config is a YAML mapping of a few hundred values; what an anchor names counts at each use",
            remedy="write the values out",
        )


def _drop_other_kinds(values: Any, overrides: Sequence[str]) -> None:
    """Empty each section whose `kind` is changed: the file's values there belong to the other kind."""
    from omegaconf import OmegaConf

    for item in overrides:
        key, _, kind = item.partition("=")
        section, _, last = key.rpartition(".")
        if last == KIND and OmegaConf.select(values, key) not in (None, kind):
            OmegaConf.update(values, section, {}, merge=False)


def parse_config(schema: type[T], values: Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """Plain values -> a frozen dataclass, checked.

    Args:
        schema: the dataclass.
        values: its fields, nested.
        overrides: the `key=value` items among them, for the remedies.

    Raises:
        UserError: unknown key, wrong type, missing value, a value out of range, values that do not go together:
            every such place is listed.
    """
    from phimr_nemo.config.stages import MOVED

    return checked(schema, _without_missing(values), overrides=overrides, moved=MOVED.get(schema))


def _without_missing(values: Any) -> Any:
    """Drop `???`, so that a value the preset leaves to the user is reported as missing."""
    if isinstance(values, Mapping):
        return {k: _without_missing(v) for k, v in values.items() if v != MISSING_VALUE}
    if isinstance(values, list):
        return [_without_missing(v) for v in values]
    return values


def to_dict(config: object) -> dict[str, Any]:
    """A config dataclass as plain values (paths as strings), the inverse of :func:`parse_config`."""
    return dict(_plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def to_yaml(config: object) -> str:
    """A config dataclass as YAML, in the order of its fields."""
    from omegaconf import OmegaConf

    # OmegaConf's own writer quotes what its reader would take for a number, "1e5" for example.
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def refuse_secrets(values: Mapping[Any, Any]) -> None:
    """Settings are recorded with every run: none may hold a secret.

    Args:
        values: the resolved settings, nested.

    Raises:
        UserError: one does; it is named by its key alone.
    """
    for key, text in _texts(values, ""):
        if redact(text) != text or is_secret_setting(key.rpartition(".")[2].partition("[")[0], text):
            raise UserError(
                f"the setting {key} holds a secret (it is not repeated here)",
                rule="settings are recorded in config.yaml, run.json, manifests; secrets come from the environment",
                remedy="put it into an environment variable, and that variable's name into the setting "
                "(api_key_env for an endpoint; HF_TOKEN and WANDB_API_KEY are read by themselves)",
            )


def _texts(value: Any, key: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            place = f"{key}.{name}" if key else str(name)
            yield f"the key of {key or 'a section'}", str(name)
            yield from _texts(item, place)
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from _texts(item, f"{key}[{index}]")
