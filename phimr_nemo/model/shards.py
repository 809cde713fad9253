"""Writing safetensors shards tensor by tensor: the header is known before the first byte of data.

The library writes a shard only from tensors that are all in memory, and then holds them twice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.table import Pieces, tensor_shapes

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
_HEADER_ALIGNMENT: Final = 8

# safetensors' names of the formats that weights come in.
DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


Item = TypeVar("Item")


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made in a thread while the one before is used: reading goes on while writing."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = reader.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = reader.submit(next, items, None)
            yield item


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass and no mask, as either makes the sum one."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)))


def write_weights(
    directory: Path, arch: Architecture, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> torch.dtype:
    """Stream a checkpoint's tensors into shards of at most `max_shard_bytes`, and an index if there are several.

    Returns:
        The tensors' dtype.

    Raises:
        UserError: the stream is not the architecture's tensors in order, of one dtype and finite.
    """
    stream = iter(tensors)
    first = next(stream, None)
    if first is None or first[1].dtype not in DTYPES:
        raise _wrong_stream("none" if first is None else f"{first[0]} of {first[1].dtype}")
    dtype = first[1].dtype
    stream = itertools.chain([first], stream)
    shapes = tensor_shapes(arch)
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        with (directory / shard).open("wb") as file:
            total += _write_header(file, {name: shapes[name] for name in names}, dtype)
            for name in names:
                given = next(stream, ("nothing", torch.empty(0)))
                _check_given(given, name, shapes[name], dtype)
                file.write(raw_bytes(given[1]))
                weight_map[name] = shard
    surplus = next(stream, None)
    if surplus is not None:
        raise _wrong_stream(f"{surplus[0]} after the last tensor")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtype


def plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Tensor names per file, in order; a file exceeds `max_bytes` only with a single tensor that does."""
    shards: list[list[str]] = []
    used = 0
    for name, shape in shapes.items():
        size = itemsize * torch.Size(shape).numel()
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_header(file: IO[bytes], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """The safetensors header: its length (8 bytes, little-endian) and JSON. Returns the bytes of data to come."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    return at


def _check_given(given: tuple[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if given[0] != name or tuple(given[1].shape) != shape or given[1].dtype != dtype:
        raise _wrong_stream(
            f"{given[0]} {list(given[1].shape)} {given[1].dtype} where {name} {list(shape)} {dtype} belongs"
        )
    if not is_finite(given[1]):
        raise UserError(
            f"tensor {name} holds NaN or infinite values",
            rule="only finite weights are exported",
            remedy="go back to a checkpoint from before the training diverged",
        )


def _wrong_stream(found: str) -> UserError:
    return UserError(
        f"tensors to export: {found}",
        rule="the tensors of the architecture, all of one floating dtype, in the order of the layers",
        remedy="pass what phimr_nemo.model.convert.export_tensors yields",
    )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes as they stand in a file, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def write_pieces(full: Tensor, part: Tensor, where: Pieces) -> None:
    """Write a rank's part into the full tensor, the inverse of reading and concatenating the pieces."""
    at = 0
    for start, stop in where.ranges:
        length = stop - start
        full.narrow(where.axis, start, length).copy_(part.narrow(where.axis, at, length))
        at += length
