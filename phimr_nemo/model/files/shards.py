"""Writing safetensors shards row by row: every place in them is known before the first byte of data.

The library writes a shard only from tensors that are all in memory, and then holds them twice.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.blocks import is_finite, require_space, write_at
from phimr_nemo.model.table import Pieces, tensor_shapes

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
LENGTH_BYTES: Final = 8
_HEADER_ALIGNMENT: Final = 8

# safetensors' names of the formats that weights come in.
DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class WeightFiles:
    """The shards of a checkpoint, laid out at their full size, into which rows are written in any order.

    Args:
        directory: where to; it exists.
        arch: the model.
        dtype: of all tensors.
        max_shard_bytes: tensors are put into one file up to this size.

    Raises:
        UserError: the disk has no room for them.
    """

    def __init__(self, directory: Path, arch: Architecture, dtype: torch.dtype, max_shard_bytes: int) -> None:
        shapes = tensor_shapes(arch)
        require_space(directory, arch.num_parameters * dtype.itemsize)
        shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
        self._places: dict[str, tuple[Path, int]] = {}
        for number, names in enumerate(shards, start=1):
            shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
            file = directory / shard
            for name, start in _lay_out(file, {name: shapes[name] for name in names}, dtype).items():
                self._places[name] = (file, start)
        if len(shards) > 1:
            weight_map = {name: file.name for name, (file, _) in self._places.items()}
            write_index(directory, weight_map, arch.num_parameters * dtype.itemsize)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of a tensor from `start` on.

        Raises:
            OSError: the disk is full or the file cannot be written.
        """
        file, begin = self._places[name]
        row_bytes = rows.dtype.itemsize * torch.Size(rows.shape[1:]).numel()
        descriptor = os.open(file, os.O_WRONLY)
        try:
            write_at(descriptor, begin + start * row_bytes, rows)
        finally:
            os.close(descriptor)


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Say which of a directory's files holds which tensor.

    Args:
        directory: where the files are.
        weight_map: tensor -> file name.
        total_bytes: of all tensors' data.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_weights(
    directory: Path, arch: Architecture, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> torch.dtype:
    """Stream a checkpoint's tensors into shards of at most `max_shard_bytes`, and an index if there are several.

    Returns:
        The tensors' dtype.

    Raises:
        UserError: the stream is not the architecture's tensors in order, of one dtype and finite; or no room.
    """
    stream = iter(tensors)
    first = next(stream, None)
    if first is None or first[1].dtype not in DTYPES:
        raise _wrong_stream("none" if first is None else f"{first[0]} of {first[1].dtype}")
    dtype = first[1].dtype
    files = WeightFiles(directory, arch, dtype, max_shard_bytes)
    stream = itertools.chain([first], stream)
    # Only the stream holds a tensor: a whole embedding need not be in memory twice.
    del first
    for name, shape in tensor_shapes(arch).items():
        given = next(stream, ("nothing", torch.empty(0)))
        _check_given(given, name, shape, dtype)
        files.write_rows(name, 0, given[1])
    surplus = next(stream, None)
    if surplus is not None:
        raise _wrong_stream(f"{surplus[0]} after the last tensor")
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


def _lay_out(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, int]:
    """Make a shard with its header (length in 8 bytes, little-endian, and JSON) and empty data of full size.

    Returns:
        Per tensor, its first byte in the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        places[name], at = at, end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    begin = LENGTH_BYTES + len(encoded)
    with file.open("wb") as output:
        output.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        output.write(encoded)
        output.truncate(begin + at)
    return {name: begin + start for name, start in places.items()}


def tensor_places(file: Path) -> dict[str, int]:
    """Per tensor, its first byte in a safetensors file whose header the library has found to be right."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(LENGTH_BYTES), "little")
        header = json.loads(source.read(length))
    begin = LENGTH_BYTES + length
    return {name: begin + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


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
        remedy="pass what phimr_nemo.model.megatron.convert.export_tensors yields",
    )


def write_pieces(full: Tensor, part: Tensor, where: Pieces) -> None:
    """Write a rank's part into the full tensor, the inverse of reading and concatenating the pieces."""
    at = 0
    for start, stop in where.ranges:
        length = stop - start
        full.narrow(where.axis, start, length).copy_(part.narrow(where.axis, at, length))
        at += length
