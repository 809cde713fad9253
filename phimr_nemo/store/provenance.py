"""What a thing was made from, in one form everywhere: the content of its inputs, the settings that decide its own.

A shard's sidecar, a record directory that is begun, its manifest, a run, an evaluation and a release hold the same
two mappings, `inputs` and `config`. An input stands there by its content and not by its path, so what is moved,
copied or made again alike is the same, and what was replaced in its place is not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.content import content_id, file_sha256
from phimr_nemo.store.inputs import MODEL_FILE, RECORDS_FILE
from phimr_nemo.store.records import KINDS
from phimr_nemo.store.runs import BEGUN_FILE, DONE_FILE, RESULTS_FILE, RUN_FILE

MADE_FROM: Final = "made_from"
"""The key of it in a JSON file that says other things too."""
ABSENT: Final = "absent"
SHARDS: Final = "part-*.json"
"""The sidecars of a record directory."""
WEIGHTS_SUFFIX: Final = ".safetensors"
MODEL_SUFFIXES: Final = frozenset((WEIGHTS_SUFFIX, ".json", ".jinja", ".model", ".txt"))
"""The files of a model that decide what it computes; its card and licence do not."""
SETTLED_NS: Final = 2 * 10**9
"""A file that was touched so recently may be written once more with the same times: its hash is not kept."""
SHOWN_DIGITS: Final = 12


@dataclass(frozen=True)
class MadeFrom:
    """What decides the content of a shard, a set, a run, an evaluation or a release.

    Attributes:
        inputs: name of an input -> hash of its content (see :func:`content_of`).
        config: name of a setting -> its value, as JSON has it.
    """

    inputs: Mapping[str, str]
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", dict(self.inputs))
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))

    def to_json(self) -> dict[str, Any]:
        """For a JSON file; :func:`read_made_from` is the inverse."""
        return asdict(self)

    def changes(self, now: MadeFrom) -> list[str]:
        """What is different now, in words; nothing where a rerun would make the same."""
        return [*self.changed_settings(now), *self.changed_inputs(now)]

    def changed_settings(self, now: MadeFrom) -> list[str]:
        """The settings that are different now, with both values."""
        return [
            f"{key}: {self.config.get(key)!r} there, {now.config.get(key)!r} now"
            for key in sorted(self.config.keys() | now.config.keys())
            if self.config.get(key) != now.config.get(key)
        ]

    def changed_inputs(self, now: MadeFrom) -> list[str]:
        """The inputs whose content is different now; one that is not there any more cannot be compared."""
        return [
            f"{name}: content {_shown(self.inputs.get(name))} there, {_shown(now.inputs.get(name))} now"
            for name in sorted(self.inputs.keys() | now.inputs.keys())
            if self.inputs.get(name) != now.inputs.get(name) and now.inputs.get(name) != ABSENT
        ]


def _shown(content: str | None) -> str:
    return "none" if content is None else content[:SHOWN_DIGITS]


def read_made_from(values: object) -> MadeFrom | None:
    """The `inputs` and `config` of a JSON object; None where it does not hold them."""
    if not isinstance(values, Mapping):
        return None
    inputs, config = values.get("inputs"), values.get("config")
    if not isinstance(inputs, Mapping) or not isinstance(config, Mapping):
        return None
    return MadeFrom({str(name): str(content) for name, content in inputs.items()}, config)


def begin(directory: Path, made_from: MadeFrom) -> None:
    """Say what a record directory is made from, or compare with what it was begun from.

    Raises:
        UserError: it is something else.
    """
    begun = begun_from(directory)
    if begun is None:
        write_json(directory / BEGUN_FILE, made_from.to_json())
        return
    changed = begun.changes(made_from)
    if changed:
        raise UserError(
            f"{directory} was begun with other settings: {'; '.join(changed)}",
            rule="the records of one directory are made from the same inputs with the same settings",
            remedy="choose another output directory, or remove this one",
        )


def begun_from(directory: Path) -> MadeFrom | None:
    """What a record directory was begun from; None where it was not, or that is damaged."""
    try:
        return read_made_from(json.loads((directory / BEGUN_FILE).read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


# The content of an input ----------------------------------------------------------------------------------


class FileHashes:
    """Hashes of files. One that has not changed since it was hashed is not read again, weights excepted.

    Whether it has is told by its place on the disk, size and times, the one of its inode's last change among them,
    which nobody can set back. Weights are read in full by each process, whatever the times say.

    Args:
        kept: a JSON file that keeps them between processes; None = only this one.
    """

    def __init__(self, kept: Path | None = None) -> None:
        self._kept = kept
        self._known: dict[str, str] = {}
        if kept is not None:
            try:
                stored = json.loads(kept.read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                stored = {}
            if isinstance(stored, dict):
                self._known = {str(key): str(value) for key, value in stored.items()}
        self._new = False

    def sha256(self, path: Path) -> str:
        """Of a file."""
        if path.suffix == WEIGHTS_SUFFIX:
            return file_sha256(path)
        before = path.stat()
        facts = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        key = ":".join(map(str, facts))
        if key not in self._known:
            found, started = file_sha256(path), time.time_ns()
            if started - max(before.st_mtime_ns, before.st_ctime_ns) < SETTLED_NS:
                return found
            self._known[key], self._new = found, True
        return self._known[key]

    def keep(self) -> None:
        """Write what was learnt."""
        if self._new and self._kept is not None:
            write_json(self._kept, self._known)


def content_of(path: Path, hashes: FileHashes | None = None) -> str:
    """A hash of what a path holds, the same wherever it lies.

    Of finished records the checksums in their manifest, which every reader compares with the shards; of a model the
    files that decide what it computes; of a finished run what it was made from and how it ended; of a file or any
    other directory the bytes. :data:`ABSENT` where there is nothing, or what has not finished.
    """
    hashes = hashes or FileHashes()
    if path.is_file():
        return hashes.sha256(path)
    if not path.is_dir():
        return ABSENT
    manifest = _json(path / RECORDS_FILE)
    if manifest.get("kind") in KINDS and isinstance(manifest.get("shards"), dict):
        return records_content(str(manifest["kind"]), manifest["shards"])
    # Names alone tell nothing: a directory of other people's rows may hold a config.json, a run.json, a DONE as well.
    if (path / MODEL_FILE).is_file() and any(path.glob(f"*{WEIGHTS_SUFFIX}")):
        return _files_content(path, hashes, lambda file: file.suffix in MODEL_SUFFIXES)
    if read_made_from(_json(path / RESULTS_FILE).get(MADE_FROM)) is not None:
        return hashes.sha256(path / RESULTS_FILE)
    if (path / BEGUN_FILE).is_file() or any(map(_is_sidecar, path.glob(SHARDS))):
        return ABSENT
    described = _json(path / RUN_FILE)
    if "starts" in described:
        if not (path / DONE_FILE).is_file():
            return ABSENT
        made_from = json.dumps(described.get(MADE_FROM), sort_keys=True)
        return content_id("run", made_from, hashes.sha256(path / DONE_FILE))
    return _files_content(path, hashes, lambda _: True)


def _is_sidecar(file: Path) -> bool:
    return file.with_suffix(".parquet").is_file() and _json(file).get("kind") in KINDS


def records_content(kind: str, shards: Mapping[str, str]) -> str:
    """The content of a record directory: its kind, and the checksum of each shard by name."""
    return content_id("records", kind, *(part for item in sorted(shards.items()) for part in item))


def tokenizer_content(path: Path, hashes: FileHashes | None = None) -> str:
    """The content of a model's directory as far as it decides how texts become tokens: not its weights."""
    if not path.is_dir():
        return ABSENT
    hashes = hashes or FileHashes()
    return _files_content(
        path,
        hashes,
        lambda file: file.suffix in MODEL_SUFFIXES - {WEIGHTS_SUFFIX} and not file.name.startswith(_OF_THE_WEIGHTS),
    )


_OF_THE_WEIGHTS: Final = (MODEL_FILE, "model.safetensors", "generation_config")


def _files_content(path: Path, hashes: FileHashes, wanted: Any) -> str:
    parts = [part for name, file in _files(path) if wanted(file) for part in (name, hashes.sha256(file))]
    return content_id("files", *parts)


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Files below a directory by their names in it, in order; hidden ones are passed over."""
    for directory, below, names in os.walk(root, followlinks=False):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(directory) / name
            if not name.startswith(".") and file.is_file():
                yield str(file.relative_to(root)), file


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
