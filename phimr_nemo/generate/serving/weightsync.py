"""Send a checkpoint to rollout servers, bucket by bucket, to all of them at once."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx

from phimr_nemo.config import ServerEngine
from phimr_nemo.generate.serving.weights import BEGIN, BUCKET, BUCKET_SUFFIX, FINISH, MB, buckets

if TYPE_CHECKING:
    import torch

FILE_PREFIX: Final = "phimr-weights-"
STEP_SECONDS: Final = 600.0
"""What a server may take for one bucket, or to abort what it samples."""
SHOWN: Final = 300
"""Characters of a server's refusal."""
PIECE_BYTES: Final = 1 << 20
"""Of a bucket on its way: the HTTP client copies what it is given several times over."""


def version_label(run: str, version: int) -> str:
    """The name of a run's weights on the servers: another run's with the same number are others."""
    return f"{run}-{version}"


def label_number(run: str, label: str) -> int | None:
    """The number in a label of this run; None for any other label."""
    name, _, number = label.rpartition("-")
    return int(number) if name == run and number.isascii() and number.isdigit() else None


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


async def push(
    client: httpx.AsyncClient,
    urls: Sequence[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    label: str,
    config: ServerEngine,
) -> dict[str, str]:
    """Stream tensors to servers; a server that fails is left with incomplete weights, which it says itself.

    The tensors are consumed to their end whatever happens: other processes take part in making them.

    Args:
        client: with the key and the time limit of a request.
        urls: the servers.
        tensors: (Hugging Face name, tensor), the whole checkpoint.
        label: the version's name.
        config: bucket size, and the shared directory if there is one.

    Returns:
        server -> what went wrong, for those that have not the new weights.
    """
    from safetensors.torch import save, save_file

    failed: dict[str, str] = {}

    async def post(url: str, path: str, bucket: bytes | None, message: dict[str, str] | None) -> None:
        body: dict[str, Any] = {"json": message}
        if bucket is not None:
            body = {"content": _pieces(bucket), "headers": {"Content-Length": str(len(bucket))}}
        try:
            response = await client.post(url + path, timeout=STEP_SECONDS, **body)
            if response.status_code != httpx.codes.OK:
                failed[url] = f"HTTP {response.status_code} {response.text[:SHOWN]}"
        except httpx.TransportError as error:
            failed[url] = type(error).__name__

    async def post_all(path: str, *, bucket: bytes | None = None, message: dict[str, str] | None = None) -> None:
        await asyncio.gather(*(post(url, path, bucket, message) for url in urls if url not in failed))

    await post_all(BEGIN)
    for bucket in buckets(tensors, config.bucket_mb * MB):
        if len(failed) == len(urls):
            continue
        if config.directory is None:
            await post_all(BUCKET, bucket=save(bucket))
            continue
        # Only its end is this process's to clean up: the servers read it by its name.
        with tempfile.NamedTemporaryFile(dir=config.directory, prefix=FILE_PREFIX, suffix=BUCKET_SUFFIX) as file:
            save_file(bucket, file.name)
            await post_all(BUCKET, message={"file": Path(file.name).name})
    await post_all(FINISH, message={"version": label})
    return failed
