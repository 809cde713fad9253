"""Names and seeds that derive from content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

CONTENT_ID_BYTES: Final = 8
HASH_CHUNK_BYTES: Final = 1 << 20


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


def directory_sha256(files: Mapping[str, str]) -> str:
    """The sha256 of a directory, from the names of its files and their sha256."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
