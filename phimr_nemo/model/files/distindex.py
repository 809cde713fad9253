"""The index of a Megatron distributed checkpoint (format `torch_dist`): which block of which tensor lies where.

The format keeps its index in a pickle. A pickle can name any function to call, so it is read by a reader that
builds torch's own records and nothing else, and every number in it is checked before it is used.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from phimr_nemo.errors import UserError
from phimr_nemo.model.table import EMBEDDING_RULE

FORMAT_FILE: Final = "metadata.json"
INDEX_FILE: Final = ".metadata"
BACKEND: Final = "torch_dist"
BACKEND_VERSION: Final = 1
OPTIMIZER_PREFIX: Final = "optimizer."
# Of the one storage in what torch.save writes.
DATA_RECORD: Final = "data/0"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A block of a saved tensor and where its bytes are.

    Attributes:
        offsets, sizes: the block, along every axis of the saved tensor.
        file: its data file.
        start, length: its bytes there.
    """

    offsets: Shape
    sizes: Shape
    file: Path
    start: int
    length: int


def check_format(path: Path) -> None:
    """Refuse a directory that is not saved as `torch_dist`.

    Raises:
        UserError: `metadata.json` is unreadable or names another backend.
    """
    try:
        found = json.loads((path / FORMAT_FILE).read_text("utf-8"))
        backend = found["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / FORMAT_FILE} cannot be read: {error!r}",
            rule="a Megatron distributed checkpoint describes its format there",
            remedy="copy the checkpoint again",
        ) from error
    if backend == BACKEND and found.get("sharded_backend_version") != BACKEND_VERSION:
        raise UserError(
            f"{path} has version {found.get('sharded_backend_version')} of the format {BACKEND}",
            rule=f"version {BACKEND_VERSION}, which Megatron-Core 0.13 to 0.19 write",
            remedy="export it to Hugging Face with the Megatron-Core that wrote it",
        )
    if backend != BACKEND:
        raise UserError(
            f"{path} is saved with the backend {backend!r}",
            rule=f"the backend is {BACKEND!r}",
            remedy="load it in Megatron and save it again with dist_ckpt_format=torch_dist",
        )


class _Inert:
    """Stands for every class or function in the metadata that is not needed; nothing of it is run."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take list items from the pickle."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take dictionary items from the pickle."""


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the records of torch's checkpoint index and nothing else: a pickle could name any function to call."""

    KNOWN: Final[Mapping[tuple[str, str], Any]] = {
        (cls.__module__, cls.__qualname__): cls
        for cls in (
            dcp.Metadata,
            dcp.TensorStorageMetadata,
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.TensorProperties,
            dcp.MetadataIndex,
            dcp._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            torch.Size,
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.KNOWN.get((module, name), _Inert)


def read_index(file: Path) -> Any:
    """The index: `state_dict_metadata` (name -> shape, dtype, blocks) and `storage_data` (block -> bytes in a file).

    Raises:
        UserError: the file is absent, damaged or something else.
    """
    try:
        found = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    # A damaged pickle can fail in any of these ways.
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        MemoryError,
        OverflowError,
    ) as e:
        raise UserError(
            f"{file} cannot be read: {e!r}",
            rule="the index of a distributed checkpoint is whole",
            remedy="copy the checkpoint again, or use an earlier one",
        ) from e
    if not isinstance(found, dcp.Metadata) or not isinstance(found.storage_data, dict):
        raise UserError(
            f"{file} holds no index of a distributed checkpoint",
            rule="torch.distributed.checkpoint writes its index there",
            remedy="copy the checkpoint again",
        )
    return found


def prefix_of(path: Path, saved: Any) -> str:
    """What stands before the model's own names: "" for a bare model, "module." in NeMo.

    Raises:
        UserError: there is no GPT model's embedding, or more than one.
    """
    embedding = EMBEDDING_RULE.megatron[0]
    found = sorted(
        key.removesuffix(embedding)
        for key in saved.state_dict_metadata
        if key.endswith(embedding) and not key.startswith(OPTIMIZER_PREFIX)
    )
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found)} tensors named ...{embedding}",
            rule="a checkpoint holds one GPT model of Megatron-Core",
            remedy="give a checkpoint of a model that Megatron-Core or NeMo 2.0 saved",
        )
    return found[0]


def check_entry(path: Path, key: str, entry: Any, shape: Shape) -> None:
    """Refuse a checkpoint in which a tensor is absent or has another shape.

    Raises:
        UserError: so it is.
    """
    if not isinstance(entry, dcp.TensorStorageMetadata):
        raise UserError(
            f"{path} lacks the tensor {key}",
            rule="the checkpoint holds every tensor of the architecture in its config.json",
            remedy="give the config.json that belongs to these weights (--hf)",
        )
    if tuple(entry.size) != shape:
        raise UserError(
            f"tensor {key} in {path} has shape {list(entry.size)}",
            rule=f"the architecture asks for {list(shape)}",
            remedy="give the config.json that belongs to these weights (--hf)",
        )


def chunks_of(path: Path, key: str, entry: Any, storage: Mapping[Any, Any]) -> list[Chunk]:
    """The chunks of a tensor, each inside its file and all of them together the whole tensor.

    Raises:
        UserError: they are not; a file is missing, truncated or outside the checkpoint.
    """
    found: list[Chunk] = []
    for chunk in entry.chunks:
        info = storage.get(dcp.MetadataIndex(key, chunk.offsets))
        if info is None or Path(str(info.relative_path)).name != info.relative_path or info.transform_descriptors:
            raise damaged(path, f"no plain data of {key} at {list(chunk.offsets)}")
        file = path / info.relative_path
        if not file.is_file() or info.offset < 0 or info.offset + info.length > file.stat().st_size:
            raise damaged(path, f"{info.relative_path} is missing or truncated")
        found.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length))
    whole = Chunk((0,) * len(entry.size), tuple(entry.size), path, 0, 0)
    inside = all(overlap(whole, chunk) == extent(chunk) for chunk in found)
    if not inside or sum(torch.Size(chunk.sizes).numel() for chunk in found) != entry.size.numel():
        raise damaged(path, f"the chunks of {key} do not add up to its shape {list(entry.size)}")
    return found


def damaged(path: Path, found: str) -> UserError:
    """The error of a checkpoint whose data is not what its index says."""
    return UserError(
        f"{path}: {found}",
        rule="every chunk in the index lies in a data file beside it",
        remedy="copy the checkpoint again, or use an earlier one",
    )


def extent(chunk: Chunk) -> list[tuple[int, int]]:
    """(start, stop) along every axis."""
    return [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]


def overlap(one: Chunk, other: Chunk) -> list[tuple[int, int]] | None:
    """The block that two chunks share, as (start, stop) along every axis."""
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(extent(one), extent(other), strict=True)]
    return common if all(start < stop for start, stop in common) else None


class Window(io.RawIOBase):
    """A range of a file as a file, so that a chunk is loaded without a copy of its bytes."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the range."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """Where in the range the next read begins."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the range."""
        self._file.seek(self._start + self._at)
        room = memoryview(buffer)[: max(0, self._length - self._at)]
        count = self._file.readinto(room)  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def data_start(chunk: Chunk, dtype: torch.dtype) -> int:
    """Where in its file the numbers of a chunk begin, one row after the other, without reading them.

    Raises:
        UserError: its bytes are no tensor of this size and dtype in that order.
    """
    try:
        with chunk.file.open("rb") as file:
            saved = Window(file, chunk.start, chunk.length)
            # On this device the description of a tensor is read and its numbers are not.
            tensor = torch.load(saved, map_location="meta", weights_only=True)
            saved.seek(0)
            record = torch._C.PyTorchFileReader(saved).get_record_offset(DATA_RECORD)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise damaged(chunk.file.parent, f"{chunk.file.name} cannot be read at {chunk.start}: {error}") from error
    numel = torch.Size(chunk.sizes).numel()
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.numel() != numel:
        raise damaged(chunk.file.parent, f"{chunk.file.name} holds something else at {chunk.start}")
    begin = int(record) + tensor.storage_offset() * dtype.itemsize
    if not tensor.is_contiguous() or begin + numel * dtype.itemsize > chunk.length:
        raise damaged(chunk.file.parent, f"{chunk.file.name} holds a tensor in another order at {chunk.start}")
    return chunk.start + begin
