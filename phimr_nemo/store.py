"""Atomic files and record directories: zstd parquet shards, a checksum each, a manifest written last.

A record directory looks like this::

    part-00000.parquet   part-00000.json   (kind, rows, sha256)
    part-00001.parquet   part-00001.json
    manifest.json                          (only when the whole step is done)

A shard is the unit of retry: it is complete when its sidecar exists and agrees with the file. A
directory is complete when its manifest exists. Every write goes to a temporary name, is flushed to
the disk and renamed, so a killed process leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.records import KINDS, SCHEMA_VERSION, Kind, schemas

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST: Final = "manifest.json"
PARQUET_COMPRESSION: Final = "zstd"
CONTENT_ID_BYTES: Final = 8
HASH_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What made a record directory and what is in it.

    Attributes:
        kind: the record kind of every shard.
        rows: rows over all shards.
        shards: file name -> sha256 of the file.
        config: the resolved configuration of the step.
        inputs: input path -> sha256 of its manifest (or of the file itself).
        counts: named counts, among them why rows were rejected.
        versions: package versions and git sha at the time of writing.
    """

    kind: Kind
    rows: int
    shards: Mapping[str, str]
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    counts: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def content_id(*parts: str) -> str:
    """A 16-digit hexadecimal id that depends on the parts alone, so that a rerun makes the same ids."""
    digest = hashlib.blake2b(digest_size=CONTENT_ID_BYTES)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def content_seed(*parts: str) -> int:
    """A non-negative 63-bit seed that depends on the parts alone."""
    return int(content_id(*parts), 16) >> 1


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors into one clear message.

    Raises:
        UserError: the disk is full, the quota is used up, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left while writing {path}",
                rule="an output needs room on its disk; nothing half-written was kept",
                remedy="free space or choose another output directory, then run the same command again",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"cannot write {path}: {error.strerror}",
                rule="the output directory must be writable",
                remedy="choose another output directory or change its permissions",
            ) from error
        raise


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to the disk and rename it into place.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            _fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON, readable and with sorted keys, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success rename it into place.

    Raises:
        UserError: `path` exists and is not empty, the disk is full, or the place cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"output {path} exists already and is not empty",
            rule="a finished output is never overwritten",
            remedy="choose another output directory or remove this one",
        )
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            temporary.chmod(0o755)
            if path.exists():
                path.rmdir()
            temporary.rename(path)
            _fsync_directory(path.parent)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def _shard_path(directory: Path, index: int) -> Path:
    return directory / f"part-{index:05d}.parquet"


def write_shard(directory: Path, index: int, table: pa.Table, *, kind: Kind) -> Path:
    """Write shard `index` of a record directory: parquet first, then the sidecar that completes it.

    Args:
        directory: the record directory; made if it does not exist.
        index: the number of the shard.
        table: rows with at least the columns of `kind`, in any order.
        kind: the record kind.

    Returns:
        The path of the parquet file.

    Raises:
        UserError: a column is missing or holds null where it must not, or the disk is full.
    """
    import pyarrow.parquet as pq

    path = _shard_path(directory, index)
    with atomic_file(path) as temporary:
        pq.write_table(conform(table, kind), temporary, compression=PARQUET_COMPRESSION)
    write_json(
        path.with_suffix(".json"),
        {
            "kind": kind,
            "rows": table.num_rows,
            "sha256": file_sha256(path),
            "schema_version": SCHEMA_VERSION,
        },
    )
    return path


def conform(table: pa.Table, kind: Kind) -> pa.Table:
    """Select and cast the columns of `kind`.

    Raises:
        UserError: a column is missing, or holds null where the kind does not allow it.
    """
    schema = schemas()[kind]
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise UserError(
            f"columns {missing} are missing; the table has {table.column_names}",
            rule=f"a {kind!r} record has the columns {schema.names}",
            remedy="map your columns to these names (see `phimr generate --help`)",
        )
    selected = table.select(schema.names)
    for item in schema:
        nulls = selected.column(item.name).null_count
        if nulls and not item.nullable:
            raise UserError(
                f"column {item.name!r} holds {nulls} nulls",
                rule=f"{item.name!r} of a {kind!r} record is never null",
                remedy="drop or repair these rows in the input",
            )
    return selected.cast(schema)


def rows_to_table(rows: Sequence[Mapping[str, Any]], kind: Kind) -> pa.Table:
    """Rows given as mappings, as a table of `kind`."""
    import pyarrow as pa

    return pa.Table.from_pylist([dict(row) for row in rows], schema=schemas()[kind])


def shard_is_complete(directory: Path, index: int) -> bool:
    """Whether shard `index` exists with a sidecar whose checksum agrees with the file."""
    path = _shard_path(directory, index)
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        return False
    return bool(json.loads(sidecar.read_text("utf-8"))["sha256"] == file_sha256(path))


def finish(
    directory: Path,
    *,
    kind: Kind,
    config: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    counts: Mapping[str, int] | None = None,
) -> Manifest:
    """Write the manifest that declares a record directory complete.

    Args:
        directory: a directory with at least one shard.
        kind: the record kind of its shards.
        config: the step's resolved configuration.
        inputs: record directories or files that the step read.
        counts: named counts and reasons for rejection.

    Raises:
        UserError: the directory has no shard.
    """
    from phimr_nemo.runs import code_versions

    sidecars = sorted(directory.glob("part-*.json"))
    if not sidecars:
        raise UserError(
            f"{directory} holds no shard",
            rule="a finished step has written at least one shard",
            remedy="look at the step's own counts: every row may have been rejected",
        )
    facts = [json.loads(sidecar.read_text("utf-8")) for sidecar in sidecars]
    manifest = Manifest(
        kind=kind,
        rows=sum(fact["rows"] for fact in facts),
        shards={
            s.with_suffix(".parquet").name: fact["sha256"] for s, fact in zip(sidecars, facts, strict=True)
        },
        config=dict(config),
        inputs={str(path): input_hash(path) for path in inputs},
        counts=dict(counts or {}),
        versions=code_versions(),
    )
    write_json(directory / MANIFEST, asdict(manifest))
    return manifest


def input_hash(path: Path) -> str:
    """The sha256 that identifies an input: of the manifest of a record directory, else of the file."""
    manifest = path / MANIFEST
    if path.is_dir() and manifest.is_file():
        return file_sha256(manifest)
    if path.is_file():
        return file_sha256(path)
    return "absent"


def is_complete(directory: Path, kind: Kind) -> bool:
    """Whether `directory` holds a finished step of `kind`."""
    manifest = directory / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text("utf-8")).get("kind") == kind


def read_manifest(directory: Path, kind: Kind) -> Manifest:
    """The manifest of a finished record directory.

    Raises:
        UserError: the directory is absent, unfinished, of another kind, or of an older schema version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        state = "is not finished (no manifest.json)" if directory.is_dir() else "does not exist"
        raise UserError(
            f"{directory} {state}",
            rule=f"this step reads a finished directory of {kind!r} records",
            remedy="run the step that makes it first, or correct the path",
        )
    values = json.loads(path.read_text("utf-8"))
    if values["kind"] != kind or kind not in KINDS:
        raise UserError(
            f"{directory} holds {values['kind']!r} records",
            rule=f"this step reads {kind!r} records",
            remedy="give the directory that the preceding step wrote",
        )
    if values["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{directory} has schema version {values['schema_version']}",
            rule=f"this version reads schema version {SCHEMA_VERSION}",
            remedy="make the directory again with this version",
        )
    return Manifest(**values)


def iter_shards(directory: Path, kind: Kind, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read a finished record directory shard by shard, each checked against its checksum.

    Args:
        directory: a finished record directory.
        kind: the kind it must hold.
        columns: only these columns; all when None.

    Raises:
        UserError: the directory is not finished, or a shard is missing or damaged (it is named).
    """
    import pyarrow.parquet as pq

    for name, sha256 in sorted(read_manifest(directory, kind).shards.items()):
        path = directory / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise UserError(
                f"shard {path} is {'damaged' if path.is_file() else 'missing'}",
                rule="a shard's sha256 equals the one in the manifest",
                remedy=f"delete {directory / MANIFEST} and {path.with_suffix('.json').name}, then run the "
                "step that made it again: only this shard is redone",
            )
        yield pq.read_table(path, columns=list(columns) if columns is not None else None)


def read_table(directory: Path, kind: Kind, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of a finished record directory as one table.

    Raises:
        UserError: as :func:`iter_shards`.
    """
    import pyarrow as pa

    return pa.concat_tables(list(iter_shards(directory, kind, columns)))
