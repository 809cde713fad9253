"""Atomic files and record directories: zstd parquet shards, a checksum each, a manifest written last.

A record directory looks like this::

    part-00000.parquet   part-00000.json   (kind, rows, sha256, made_from)
    part-00001.parquet   part-00001.json
    manifest.json                          (only when the whole step is done)

A shard is the unit of retry: complete when its sidecar agrees with the file, kept when it was made from what
it would be made from now. A directory is complete when its manifest exists. Every write goes to a temporary
name, is flushed and renamed, so a killed process leaves either the old state or the new one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_directory, atomic_file, atomic_write_bytes, atomic_write_text, write_json
from phimr_nemo.store.content import content_id, content_seed, file_sha256
from phimr_nemo.store.inputs import records_remedy
from phimr_nemo.store.provenance import MADE_FROM, MadeFrom, read_made_from, records_content
from phimr_nemo.store.records import KINDS, OPTIONAL_COLUMNS, SCHEMA_VERSION, Kind, conform, schemas, with_optional

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "MANIFEST",
    "Manifest",
    "atomic_directory",
    "atomic_file",
    "atomic_write_bytes",
    "atomic_write_text",
    "check_shard",
    "conform",
    "content_id",
    "content_seed",
    "file_sha256",
    "finish",
    "is_complete",
    "iter_shards",
    "read_columns",
    "read_manifest",
    "read_shard",
    "read_table",
    "rows_to_table",
    "shard_facts",
    "shard_is_complete",
    "write_json",
    "write_shard",
]

MANIFEST: Final = "manifest.json"
SHARD_NAME: Final = re.compile(r"part-(\d{5,9})\.parquet")
MAX_SHOWN: Final = 200
SIDECAR_KEYS: Final = ("kind", "rows", "sha256", "schema_version")
PARQUET_COMPRESSION: Final = "zstd"
ROW_GROUPS: Final[Mapping[Kind, int]] = {"rows": 64, "conversations": 256}
"""Rows that are read together, of the kinds that training reads in random order: a few MB of long ones."""
REDO: Final = "run `phimr data check {} --redo`, then the step that made it: only this shard is made again"


@dataclass(frozen=True)
class Manifest:
    """What made a record directory and what is in it.

    Attributes:
        kind: the record kind of every shard.
        rows: rows over all shards.
        shards: file name -> sha256 of the file.
        inputs, config: see :class:`phimr_nemo.store.provenance.MadeFrom`.
        counts: named counts, among them why rows were rejected.
        versions: package versions and git sha at the time of writing.
        examples: the first rejected rows of each reason, in words.
    """

    kind: Kind
    rows: int
    shards: Mapping[str, str]
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    counts: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def made_from(self) -> MadeFrom:
        """What decides the content of the directory."""
        return MadeFrom(self.inputs, self.config)

    @property
    def content(self) -> str:
        """The hash of the records, as what is made from them names it."""
        return records_content(self.kind, self.shards)


def _shard_path(directory: Path, index: int) -> Path:
    return directory / f"part-{index:05d}.parquet"


def write_shard(
    directory: Path, index: int, table: pa.Table, *, kind: Kind, made_from: MadeFrom | None = None
) -> Path:
    """Write shard `index` of a record directory: parquet first, then the sidecar that completes it.

    Args:
        directory: the record directory; made if it does not exist.
        index: the number of the shard.
        table: rows with at least the columns of `kind`, in any order.
        kind: the record kind.
        made_from: what decides the shard's content, for the next run that finds it.

    Returns:
        The path of the parquet file.

    Raises:
        UserError: a column is missing, has the wrong type or holds null where it must not, or the disk is full.
    """
    import pyarrow.parquet as pq

    path = _shard_path(directory, index)
    records = conform(table, kind)
    with atomic_file(path) as temporary:
        pq.write_table(records, temporary, compression=PARQUET_COMPRESSION, row_group_size=ROW_GROUPS.get(kind))
    write_json(
        path.with_suffix(".json"),
        {
            "kind": kind,
            "rows": table.num_rows,
            "sha256": file_sha256(path),
            "schema_version": SCHEMA_VERSION,
            **({} if made_from is None else {MADE_FROM: made_from.to_json()}),
        },
    )
    return path


def read_columns(path: Path, kind: Kind, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a shard, all when None; optional ones that it was written without hold null."""
    import pyarrow.parquet as pq

    if columns is None:
        return pq.read_table(path)
    optional = OPTIONAL_COLUMNS.get(kind, ())
    with pq.ParquetFile(path) as file:
        there = [name for name in columns if name not in optional or name in file.schema_arrow.names]
    return with_optional(pq.read_table(path, columns=there), kind, columns).select(list(columns))


def rows_to_table(rows: Sequence[Mapping[str, Any]], kind: Kind) -> pa.Table:
    """Rows given as mappings, as a table of `kind`."""
    import pyarrow as pa

    return pa.Table.from_pylist([dict(row) for row in rows], schema=schemas()[kind])


def shard_is_complete(directory: Path, index: int, made_from: MadeFrom | None = None) -> bool:
    """Whether shard `index` exists, of this schema version, with a sidecar whose checksum agrees with the file.

    Args:
        directory, index: the record directory and the number of the shard.
        made_from: what it has to be made from; None = whatever it was.
    """
    path = _shard_path(directory, index)
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        return False
    try:
        facts = _read_facts(sidecar, SIDECAR_KEYS)
    except UserError:
        return False  # a damaged sidecar completes nothing: the shard is made again
    if made_from is not None and read_made_from(facts.get(MADE_FROM)) != made_from:
        return False
    return bool(facts["schema_version"] == SCHEMA_VERSION and facts["sha256"] == file_sha256(path))


def _read_facts(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with at least these keys.

    Raises:
        UserError: the file holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        lacking = [key for key in keys if key not in values] if isinstance(values, dict) else list(keys)
    except ValueError as error:
        values, lacking = error, list(keys)
    if lacking:
        raise UserError(
            f"{path} is damaged: {values if isinstance(values, ValueError) else f'{lacking} are absent'}",
            rule=f"it is a JSON object with the keys {list(keys)}",
            remedy="delete it and run the step that made it again: finished shards are kept",
        )
    return dict(values)


def finish(
    directory: Path,
    *,
    kind: Kind,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    counts: Mapping[str, int] | None = None,
    examples: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Write the manifest that declares a record directory complete.

    Args:
        directory: a directory with at least one shard.
        kind: the record kind of its shards.
        config, inputs: see :class:`phimr_nemo.store.provenance.MadeFrom`.
        counts: named counts.
        examples: the first rejected rows of each reason, in words.

    Raises:
        UserError: the directory has no shard, one without its file, a damaged one, or one of another kind.
    """
    from phimr_nemo.store.runs import code_versions

    sidecars = sorted(directory.glob("part-*.json"), key=lambda path: (len(path.name), path.name))
    if not sidecars:
        raise UserError(
            f"{directory} holds no shard",
            rule="a finished step has written at least one shard",
            remedy="look at the step's own counts: every row may have been rejected",
        )
    facts = [_read_facts(sidecar, SIDECAR_KEYS) for sidecar in sidecars]
    for sidecar, fact in zip(sidecars, facts, strict=True):
        if fact["kind"] != kind or not sidecar.with_suffix(".parquet").is_file():
            raise UserError(
                f"{sidecar} tells of {fact['kind']!r} records in {sidecar.with_suffix('.parquet').name}",
                rule=f"every shard of the directory holds {kind!r} records, and its file is there",
                remedy="delete what is left of another run, then run the step again",
            )
    manifest = Manifest(
        kind=kind,
        rows=sum(fact["rows"] for fact in facts),
        shards={s.with_suffix(".parquet").name: fact["sha256"] for s, fact in zip(sidecars, facts, strict=True)},
        config=dict(config),
        inputs=dict(inputs or {}),
        counts=dict(counts or {}),
        versions=code_versions(),
        examples=dict(examples or {}),
    )
    write_json(directory / MANIFEST, asdict(manifest))
    return manifest


def is_complete(directory: Path, kind: Kind) -> bool:
    """Whether `directory` holds a finished step of `kind`."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return False
    try:
        return bool(_read_facts(manifest, _manifest_keys())["kind"] == kind)
    except UserError:
        return False  # a damaged manifest declares nothing: the step writes it again


def _manifest_keys() -> list[str]:
    """What every manifest says; those of earlier versions have no examples."""
    return [item.name for item in fields(Manifest) if item.name != "examples"]


def read_manifest(directory: Path, kind: Kind) -> Manifest:
    """The manifest of a finished record directory.

    Raises:
        UserError: the directory is absent, unfinished, of another kind or schema version, or its manifest is
            damaged or names files that are no shards.
    """
    path = directory / MANIFEST
    if not path.is_file():
        state = "is not finished (no manifest.json)" if directory.is_dir() else "does not exist"
        raise UserError(
            f"{directory} {state}",
            rule=f"this step reads a finished directory of {kind!r} records",
            remedy=records_remedy(directory, kind),
        )
    values = _read_facts(path, _manifest_keys())
    if values["kind"] != kind or kind not in KINDS:
        raise UserError(
            f"{directory} holds {values['kind']!r} records",
            rule=f"this step reads {kind!r} records",
            remedy=records_remedy(directory, kind),
        )
    if values["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{directory} has schema version {values['schema_version']}",
            rule=f"this version reads schema version {SCHEMA_VERSION}",
            remedy="run the step that made it again, with this version and into another directory",
        )
    names = values["shards"]
    if not isinstance(names, dict) or not all(SHARD_NAME.fullmatch(name) for name in names):
        raise UserError(
            f"{path} names other files than shards: {str(names)[:MAX_SHOWN]}",
            rule="shards are files part-NNNNN.parquet in the directory itself",
            remedy="make the directory again; do not use one from a source you do not trust",
        )
    return Manifest(**{key: values[key] for key in _manifest_keys()}, examples=values.get("examples", {}))


def iter_shards(directory: Path, kind: Kind, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read a finished record directory shard by shard, each checked against its checksum.

    Args:
        directory: a finished record directory.
        kind: the kind it must hold.
        columns: only these columns; all when None.

    Raises:
        UserError: the directory is not finished, or a shard is missing or damaged (it is named).
    """
    shards = read_manifest(directory, kind).shards
    for name, sha256 in sorted(shards.items(), key=lambda item: (len(item[0]), item[0])):
        path = directory / name
        check_shard(path, sha256)
        yield read_columns(path, kind, columns)


def read_shard(directory: Path, index: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Shard `index` of a record directory, finished or not; call :func:`shard_is_complete` first."""
    import pyarrow.parquet as pq

    return pq.read_table(_shard_path(directory, index), columns=list(columns) if columns is not None else None)


def check_shard(path: Path, sha256: str) -> None:
    """Compare a shard with its checksum.

    Raises:
        UserError: the shard is missing or damaged; it is named.
    """
    if not path.is_file() or file_sha256(path) != sha256:
        raise UserError(
            f"shard {path} is {'damaged' if path.is_file() else 'missing'}",
            rule="a shard's sha256 equals the one in the manifest",
            remedy=REDO.format(path.parent),
        )


def shard_facts(path: Path) -> dict[str, Any]:
    """What the sidecar of a shard says of it: kind, rows, sha256, schema_version.

    Raises:
        UserError: the sidecar is missing or damaged.
    """
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise UserError(
            f"{sidecar} is missing",
            rule="every shard has a sidecar with its rows and its checksum",
            remedy=REDO.format(path.parent),
        )
    return _read_facts(sidecar, SIDECAR_KEYS)


def read_table(directory: Path, kind: Kind, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of a finished record directory as one table.

    Raises:
        UserError: as :func:`iter_shards`.
    """
    import pyarrow as pa

    return pa.concat_tables(list(iter_shards(directory, kind, columns)))
