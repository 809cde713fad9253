"""Megatron distributed checkpoints (format `torch_dist`), read and written tensor by tensor without a model.

Such a checkpoint holds whole tensors, cut into chunks: one for every place of the layout that wrote it, listed with
their offsets in `.metadata`. So any layout is read by looking at the chunks, and any layout is written by cutting
along its boundaries; Megatron-Core itself loads the result in whatever layout it runs. Nothing here starts a process
or builds a model: rows of bytes go from place to place (``phimr_nemo.model.files.blocks``).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.blocks import RowSource, common_dtype, read_at, require_space, transfer, write_at
from phimr_nemo.model.files.distindex import (
    BACKEND,
    BACKEND_VERSION,
    DATA_RECORD,
    FORMAT_FILE,
    INDEX_FILE,
    Chunk,
    Shape,
    Window,
    check_entry,
    check_format,
    chunks_of,
    damaged,
    data_start,
    overlap,
    prefix_of,
    read_index,
)
from phimr_nemo.model.files.distlayout import StoredTensor, stored_shape, stored_tensors
from phimr_nemo.model.layout import check_layout
from phimr_nemo.model.table import EMBEDDING_RULE, SavedTensor, full_tensors, parts_of, pieces, saved_tensors

COMMON_FILE: Final = "common.pt"
DATA_SUFFIX: Final = ".distcp"
# What Megatron-Core 0.13 writes into metadata.json.
FORMAT: Final[Mapping[str, Any]] = {
    "sharded_backend": BACKEND,
    "sharded_backend_version": BACKEND_VERSION,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Modules that keep FP8 state in a checkpoint. Loading fails where an entry is absent; each is a list of one.
NO_STATE: Final = [None]
LAYER_STATES: Final = (
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
)
NORM_STATES: Final = ("decoder.layers.self_attention.q_layernorm", "decoder.layers.self_attention.k_layernorm")
"""Of the layers of a model whose queries and keys are normalised."""
FINAL_STATE: Final = "decoder.final_layernorm"


class DistCheckpoint:
    """A Megatron distributed checkpoint as a source of Hugging Face tensors, whatever layout wrote it.

    Args:
        path: the directory with `metadata.json`.
        architecture: of the model in it.

    Raises:
        UserError: another format, a damaged or truncated file, or tensors that are not the architecture's.
    """

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.path, self.architecture = Path(path), architecture
        check_format(self.path)
        saved = read_index(self.path / INDEX_FILE)
        prefix = prefix_of(self.path, saved)
        self._saved = {tensor.placement.name: tensor for tensor in saved_tensors(architecture)}
        names = {key.removeprefix(prefix) for key in saved.state_dict_metadata if key.startswith(prefix)}
        self._stored = stored_tensors(self.path, architecture, names)
        self._parts = _parts_by_name(architecture)
        self._chunks: dict[str, list[Chunk]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._starts: dict[Chunk, int] = {}
        shapes = {part.key: stored_shape(part, architecture) for parts in self._stored.values() for part in parts}
        for key, shape in shapes.items():
            entry = saved.state_dict_metadata.get(prefix + key)
            check_entry(self.path, prefix + key, entry, shape)
            self._dtypes[key] = entry.properties.dtype
            self._chunks[key] = chunks_of(self.path, prefix + key, entry, saved.storage_data)
            for chunk in self._chunks[key]:
                self._starts[chunk] = data_start(chunk, self._dtypes[key])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, as it is stored."""
        return self._dtypes[self._stored[self._parts[name][0]][0].key]

    def place(self, name: str) -> Path:  # noqa: ARG002 (a tensor is in many files)
        """The checkpoint."""
        return self.path

    def read_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Fill `rows` with the tensor's rows from `start` on, in Hugging Face's order, unchecked; see ``RowSource``.

        Raises:
            UserError: a data file became unreadable.
        """
        name, first_row = self._parts[name]
        start += first_row
        placement = self._saved[name].placement
        if placement.split != "qkv":
            self._read_stored(name, start, rows)
            return
        # Stored are the pieces of one rank that has all of them, one after the other.
        at = 0
        for first, last in pieces(placement, self.architecture, 0, 1).ranges:
            low, high = max(first, start), min(last, start + rows.shape[0])
            if low < high:
                self._read_stored(name, at + low - first, rows[low - start : high - start])
            at += last - first

    def _read_stored(self, name: str, start: int, rows: Tensor) -> None:
        """Fill `rows` with rows in the order in which they are stored, from all tensors that have a part of them."""
        for stored in self._stored[name]:
            low = max(stored.start, start)
            high = min(stored.start + stored.shape[0], start + rows.shape[0])
            if low < high:
                self._read_chunks(stored, low - stored.start, rows[low - start : high - start])

    def _read_chunks(self, saved: StoredTensor, start: int, rows: Tensor) -> None:
        """Fill `rows` with a stored tensor's rows from `start` on, from all chunks that have a part of them."""
        lead = () if saved.layer is None else (saved.layer,)
        sizes = (*(1 for _ in lead), *rows.shape)
        wanted = Chunk((*lead, start, *(0 for _ in rows.shape[1:])), sizes, self.path, 0, 0)
        for chunk in self._chunks[saved.key]:
            common = overlap(wanted, chunk)
            if common is None:
                continue
            first, last = common[len(lead)]
            layers = 0 if saved.layer is None else saved.layer - chunk.offsets[0]
            before = layers * chunk.sizes[len(lead)] + first - chunk.offsets[len(lead)]
            width = chunk.sizes[len(lead) + 1 :]
            place = self._starts[chunk] + before * torch.Size(width).numel() * rows.dtype.itemsize
            target = rows[first - start : last - start]
            part = target if width == rows.shape[1:] else target.new_empty((last - first, *width))
            try:
                read_at(chunk.file, place, part)
            except (OSError, EOFError) as error:
                raise damaged(self.path, f"{chunk.file.name} cannot be read: {error}") from error
            if part is not target:
                column = chunk.offsets[-1]
                target[:, column : column + width[0]] = part


@dataclass(frozen=True)
class Part:
    """What a rank saves of a tensor as one block.

    Attributes:
        offsets, sizes: the block's place in the saved tensor.
        axis, ranges: what it is made of: ranges of the Hugging Face tensor.
    """

    offsets: Shape
    sizes: Shape
    axis: int
    ranges: tuple[tuple[int, int], ...]


class _DataFiles:
    """The data files of a layout, laid out at their full size, into which rows are written in any order."""

    def __init__(
        self, directory: Path, arch: Architecture, dtype: torch.dtype, layout: ParallelConfig, prefix: str
    ) -> None:
        self._places: dict[str, list[tuple[Path, int, Part]]] = {}
        self._parts = _parts_by_name(arch)
        self.chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {key: [] for key in _saved_shapes(arch)}
        self.states: list[str] = []
        self.storage: dict[dcp.MetadataIndex, Any] = {}
        for stage in range(layout.pipeline):
            for rank in range(layout.tensor):
                file = directory / f"__{stage * layout.tensor + rank}_0{DATA_SUFFIX}"
                with file.open("w+b") as data:
                    for tensor in _stage_tensors(arch, stage, layout.pipeline):
                        for part in _parts(arch, tensor, rank, layout.tensor):
                            info, start = _reserve(data, file.name, part.sizes, dtype)
                            offsets = torch.Size(part.offsets)
                            self.storage[dcp.MetadataIndex(prefix + tensor.key, offsets)] = info
                            self.chunks[tensor.key].append(dcp.ChunkStorageMetadata(offsets, torch.Size(part.sizes)))
                            self._places.setdefault(tensor.placement.name, []).append((file, start, part))
                    for state in _stage_states(arch, stage, layout.pipeline) if rank == 0 else ():
                        self.storage[dcp.MetadataIndex(prefix + state)] = _save(data, file.name, NO_STATE)
                        self.states.append(state)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of a tensor from `start` on into every rank's file that has a part of them.

        Raises:
            OSError: the disk is full or a file cannot be written.
        """
        name, first_row = self._parts[name]
        start += first_row
        for file, begin, part in self._places[name]:
            descriptor = os.open(file, os.O_WRONLY)
            try:
                if part.axis == 0:
                    _write_rows_of(descriptor, begin, part, start, rows)
                else:
                    ((first, last),) = part.ranges
                    block = rows[:, first:last].contiguous()
                    write_at(descriptor, begin + start * (last - first) * rows.dtype.itemsize, block)
            finally:
                os.close(descriptor)


def _write_rows_of(descriptor: int, begin: int, part: Part, start: int, rows: Tensor) -> None:
    """Write those of `rows` that belong to a part."""
    row_bytes = rows.dtype.itemsize * torch.Size(rows.shape[1:]).numel()
    at = 0
    for first, last in part.ranges:
        low, high = max(first, start), min(last, start + rows.shape[0])
        if low < high:
            write_at(descriptor, begin + (at + low - first) * row_bytes, rows[low - start : high - start])
        at += last - first


def write_dist_checkpoint(
    directory: Path,
    source: RowSource,
    layout: ParallelConfig,
    *,
    prefix: str = "",
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write what the ranks of a layout would save together.

    Args:
        directory: an empty directory.
        source: the weights.
        layout: `tensor` and `pipeline`; each place gets a data file of its own.
        prefix: of all names: "" for a bare model, "module." in NeMo.
        common: what is saved beside the tensors.

    Raises:
        UserError: the layout cannot hold the model, the disk has no room, or a tensor cannot be read, is not finite
            or has another dtype than the others.
        OSError: the disk is full or a file cannot be written.
    """
    arch = source.architecture
    check_layout(arch, layout)
    dtype = common_dtype(source)
    require_space(directory, arch.num_parameters * dtype.itemsize)
    files = _DataFiles(directory, arch, dtype, layout, prefix)
    transfer(source, files)
    entries: dict[str, Any] = {prefix + state: dcp.BytesStorageMetadata() for state in files.states}
    shapes = _saved_shapes(arch)
    for key, shape in shapes.items():
        properties = dcp.TensorProperties(dtype=dtype)
        entries[prefix + key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), files.chunks[key])
    metadata = dcp.Metadata(entries, storage_data=files.storage)
    # Megatron's note of how optimizer states were flattened: these tensors were not.
    metadata.mcore_data = {prefix + key: {} for key in shapes}
    torch.save(dict(common or {}), directory / COMMON_FILE)
    (directory / INDEX_FILE).write_bytes(pickle.dumps(metadata))
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def _parts_by_name(arch: Architecture) -> dict[str, tuple[str, int]]:
    """Tensor of a Hugging Face checkpoint -> the full tensor that it is part of, and its first row there."""
    return {part.name: (full.name, part.start) for full in full_tensors(arch) for part in parts_of(full)}


def _saved_shapes(arch: Architecture) -> dict[str, Shape]:
    """Name in the checkpoint (without prefix) -> shape there."""
    return {
        tensor.key: tensor.placement.shape
        if tensor.layer is None
        else (arch.num_hidden_layers, *tensor.placement.shape)
        for tensor in saved_tensors(arch)
    }


def _stage_tensors(arch: Architecture, stage: int, stages: int) -> Iterator[SavedTensor]:
    """The tensors of a pipeline stage: the embedding on the first, final norm and untied head on the last."""
    for tensor in saved_tensors(arch):
        if tensor.layer is not None:
            home = tensor.layer * stages // arch.num_hidden_layers
        else:
            home = 0 if tensor.key == EMBEDDING_RULE.megatron[0] else stages - 1
        if home == stage:
            yield tensor


def _stage_states(arch: Architecture, stage: int, stages: int) -> Iterator[str]:
    layers = arch.num_hidden_layers
    for layer in range(stage * layers // stages, (stage + 1) * layers // stages):
        for module in (*LAYER_STATES, *(NORM_STATES if arch.traits.has_qk_norm else ())):
            yield f"{module}._extra_state/shard_{layer}_{layers}"
    if stage == stages - 1:
        yield f"{FINAL_STATE}._extra_state/shard_0_1"


def _parts(arch: Architecture, tensor: SavedTensor, rank: int, size: int) -> Iterator[Part]:
    """The blocks that a tensor-parallel rank saves of a tensor."""
    placement = tensor.placement
    if placement.split == "whole" and rank > 0:
        return
    where = pieces(placement, arch, rank, size)
    if placement.split == "gate_up":
        # Megatron saves both halves of the stack by themselves.
        blocks: list[tuple[int, tuple[tuple[int, int], ...]]] = [
            (start, ((start, stop),)) for start, stop in where.ranges
        ]
    else:
        blocks = [(rank * where.length if placement.split != "whole" else 0, where.ranges)]
    lead = () if tensor.layer is None else (tensor.layer,)
    for start, ranges in blocks:
        length = sum(last - first for first, last in ranges)
        axes = range(len(placement.shape))
        offsets = tuple(start if axis == where.axis else 0 for axis in axes)
        sizes = tuple(length if axis == where.axis else placement.shape[axis] for axis in axes)
        yield Part((*lead, *offsets), (*(1 for _ in lead), *sizes), where.axis, ranges)


def _save(file: IO[bytes], name: str, value: Any) -> Any:
    """Save a value at the end of a data file; says where it lies."""
    start = file.tell()
    torch.save(value, file)
    return filesystem._StorageInfo(name, start, file.tell() - start)


def _reserve(file: IO[bytes], name: str, shape: Shape, dtype: torch.dtype) -> tuple[Any, int]:
    """Save a tensor's description at the end of a data file and leave the place of its numbers empty.

    Returns:
        Where the description lies, and the first byte of the numbers.
    """
    # The memory of this tensor is not touched. Without its data there is also no checksum, which nobody reads.
    with torch.serialization.skip_data():
        info = _save(file, name, torch.empty(shape, dtype=dtype))
    saved = Window(file, info.offset, info.length)
    start = info.offset + torch._C.PyTorchFileReader(saved).get_record_offset(DATA_RECORD)
    file.seek(info.offset + info.length)
    return info, start
