"""Megatron distributed checkpoints (format `torch_dist`), read and written tensor by tensor without a model.

Such a checkpoint holds whole tensors, cut into chunks: one for every place of the layout that wrote it, listed with
their offsets in `.metadata`. So any layout is read by looking at the chunks, and any layout is written by cutting
along its boundaries; Megatron-Core itself loads the result in whatever layout it runs. Nothing here starts a process
or builds a model, and memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.distindex import (
    BACKEND,
    FORMAT_FILE,
    INDEX_FILE,
    Chunk,
    Shape,
    Window,
    check_entry,
    check_format,
    chunks_of,
    overlap,
    prefix_of,
    read_chunk,
    read_index,
)
from phimr_nemo.model.layout import check_layout
from phimr_nemo.model.shards import is_finite, raw_bytes, read_ahead, write_pieces
from phimr_nemo.model.table import EMBEDDING_RULE, SavedTensor, pieces, saved_tensors, tensor_shapes

COMMON_FILE: Final = "common.pt"
DATA_SUFFIX: Final = ".distcp"
# Of the one storage in what torch.save writes.
DATA_RECORD: Final = "data/0"
# What Megatron-Core 0.13 writes into metadata.json.
FORMAT: Final[Mapping[str, Any]] = {
    "sharded_backend": BACKEND,
    "sharded_backend_version": 1,
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
FINAL_STATE: Final = "decoder.final_layernorm"


class WeightSource(Protocol):
    """Weights of a model under their Hugging Face names, whatever they are kept in."""

    architecture: Architecture

    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of the layers."""

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, finite."""

    def read_pieces(self, name: str, axis: int, ranges: Sequence[tuple[int, int]] | None) -> Tensor:
        """The concatenation of ranges of a tensor along one axis; ``None`` is all of it."""


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
        self._chunks: dict[str, list[Chunk]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for key, shape in _saved_shapes(architecture).items():
            entry = saved.state_dict_metadata.get(prefix + key)
            check_entry(self.path, prefix + key, entry, shape)
            self._dtypes[key] = entry.properties.dtype
            self._chunks[key] = chunks_of(self.path, prefix + key, entry, saved.storage_data)

    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of the layers."""
        return tuple(tensor_shapes(self.architecture))

    def read(self, name: str) -> Tensor:
        """A whole tensor under its Hugging Face name, on the CPU in the checkpoint's dtype.

        Raises:
            UserError: it holds a NaN or an infinity, or its bytes cannot be read.
        """
        saved = self._saved[name]
        stored = self._stored(saved)
        if not is_finite(stored):
            raise UserError(
                f"tensor {saved.key} in {self.path} holds NaN or infinite values",
                rule="weights are finite numbers",
                remedy="use a checkpoint from before the training diverged",
            )
        if saved.placement.split != "qkv":
            return stored
        full = torch.empty_like(stored)
        write_pieces(full, stored, pieces(saved.placement, self.architecture, 0, 1))
        return full

    def read_pieces(self, name: str, axis: int, ranges: Sequence[tuple[int, int]] | None) -> Tensor:
        """The concatenation of ranges of a tensor along one axis; ``None`` is all of it.

        Raises:
            UserError: as ``read``.
        """
        full = self.read(name)
        if ranges is None:
            return full
        return torch.cat([full.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)

    def _stored(self, saved: SavedTensor) -> Tensor:
        """The tensor as it is stored: its block of the saved tensor, put together from the chunks."""
        shape = saved.placement.shape
        lead = () if saved.layer is None else (saved.layer,)
        wanted = Chunk((*lead, *(0 for _ in shape)), (*(1 for _ in lead), *shape), self.path, 0, 0)
        full: Tensor | None = None
        for chunk in self._chunks[saved.key]:
            common = overlap(wanted, chunk)
            if common is None:
                continue
            part = read_chunk(chunk, self._dtypes[saved.key])
            if chunk.offsets == wanted.offsets and chunk.sizes == wanted.sizes:
                return part.view(shape)
            if full is None:
                full = torch.empty(wanted.sizes, dtype=part.dtype)
            to, of = (
                [slice(a - o, b - o) for (a, b), o in zip(common, c.offsets, strict=True)] for c in (wanted, chunk)
            )
            full[tuple(to)] = part[tuple(of)]
        assert full is not None, "the chunks were counted when the checkpoint was opened"
        return full.view(shape)


def write_dist_checkpoint(
    directory: Path,
    source: WeightSource,
    layout: ParallelConfig,
    *,
    prefix: str = "",
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write what the ranks of a layout would save together, one rank after the other.

    Args:
        directory: an empty directory.
        source: the weights.
        layout: `tensor` and `pipeline`; each place gets a data file of its own.
        prefix: of all names: "" for a bare model, "module." in NeMo.
        common: what is saved beside the tensors.

    Raises:
        UserError: the layout cannot hold the model, or a tensor cannot be read or is not finite.
    """
    arch = source.architecture
    check_layout(arch, layout)
    shapes = _saved_shapes(arch)
    chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {key: [] for key in shapes}
    dtypes: dict[str, torch.dtype] = {}
    entries: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, Any] = {}
    for stage in range(layout.pipeline):
        for rank in range(layout.tensor):
            name = f"__{stage * layout.tensor + rank}_0{DATA_SUFFIX}"
            with (directory / name).open("w+b") as file:
                for tensor, offsets, part in read_ahead(_rank_parts(source, stage, rank, layout)):
                    index = dcp.MetadataIndex(prefix + tensor.key, torch.Size(offsets))
                    storage[index] = _append(file, name, part)
                    chunks[tensor.key].append(dcp.ChunkStorageMetadata(torch.Size(offsets), part.shape))
                    dtypes[tensor.key] = part.dtype
                for state in _stage_states(arch, stage, layout.pipeline) if rank == 0 else ():
                    storage[dcp.MetadataIndex(prefix + state)] = _append(file, name, NO_STATE)
                    entries[prefix + state] = dcp.BytesStorageMetadata()
    for key, shape in shapes.items():
        properties = dcp.TensorProperties(dtype=dtypes[key])
        entries[prefix + key] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks[key])
    metadata = dcp.Metadata(entries, storage_data=storage)
    # Megatron's note of how optimizer states were flattened: these tensors were not.
    metadata.mcore_data = {prefix + key: {} for key in shapes}
    torch.save(dict(common or {}), directory / COMMON_FILE)
    (directory / INDEX_FILE).write_bytes(pickle.dumps(metadata))
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


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
        for module in LAYER_STATES:
            yield f"{module}._extra_state/shard_{layer}_{layers}"
    if stage == stages - 1:
        yield f"{FINAL_STATE}._extra_state/shard_0_1"


def _rank_parts(
    source: WeightSource, stage: int, rank: int, layout: ParallelConfig
) -> Iterator[tuple[SavedTensor, Shape, Tensor]]:
    """Everything that one rank saves: (tensor, offsets in the saved tensor, block)."""
    for tensor in _stage_tensors(source.architecture, stage, layout.pipeline):
        for offsets, part in _parts(source, tensor, rank, layout.tensor):
            yield tensor, offsets, part


def _parts(source: WeightSource, tensor: SavedTensor, rank: int, size: int) -> Iterator[tuple[Shape, Tensor]]:
    """The chunks of a tensor that a tensor-parallel rank saves: (offsets in the saved tensor, block)."""
    placement = tensor.placement
    if placement.split == "whole" and rank > 0:
        return
    where = pieces(placement, source.architecture, rank, size)
    if placement.split == "gate_up":
        # Megatron saves both halves of the stack by themselves.
        blocks: list[tuple[int, tuple[tuple[int, int], ...]]] = [
            (start, ((start, stop),)) for start, stop in where.ranges
        ]
    else:
        blocks = [(rank * where.length if placement.split != "whole" else 0, where.ranges)]
    for start, ranges in blocks:
        part = _compact(source.read_pieces(placement.name, where.axis, ranges))
        offsets = tuple(start if axis == where.axis else 0 for axis in range(part.dim()))
        if tensor.layer is None:
            yield offsets, part
        else:
            yield (tensor.layer, *offsets), part[None]


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: saving a view would save all that it looks at."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _append(file: IO[bytes], name: str, value: Tensor | list[None]) -> Any:
    """Save a value at the end of a data file; says where it lies."""
    start = file.tell()
    if not isinstance(value, Tensor):
        torch.save(value, file)
        return filesystem._StorageInfo(name, start, file.tell() - start)
    # torch.save copies the data and computes a checksum that nobody reads; so it leaves the place empty.
    with torch.serialization.skip_data():
        torch.save(value, file)
    end = file.tell()
    archive = torch._C.PyTorchFileReader(Window(file, start, end - start))
    file.seek(start + archive.get_record_offset(DATA_RECORD))
    file.write(raw_bytes(value))
    file.seek(end)
    return filesystem._StorageInfo(name, start, end - start)
