"""Checkpoints that a run continues from are read as plain data: nothing that they name is called.

Megatron-Core and torch read two files of a distributed checkpoint with pickle: the index `.metadata` without any
restriction, and `common.pt` with ``weights_only=False``. A pickle may name any function to call, and whoever can
write into a run directory on a shared file system could place one. Here the index is compared with a list of what
Megatron writes before it is handed on, and torch is told to load all the rest with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from phimr_nemo.errors import UserError

INDEX_FILE: Final = ".metadata"
FORCE_PLAIN: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
KNOWN: Final = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData", "SavePlan")
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        ("torch", "Size"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"),
    }
)
"""What the index of a checkpoint of Megatron-Core 0.13 is made of; torch's dtypes come on top."""


class _KnownNames(pickle.Unpickler):
    """Builds what the index of a checkpoint is made of, and ends at the first other name."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in KNOWN and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_index(file: Path) -> None:
    """Refuse an index that names anything which no checkpoint needs; nothing of it has been called then.

    Raises:
        UserError: it does, or it is absent or damaged.
    """
    try:
        _KnownNames(io.BytesIO(file.read_bytes())).load()
    # A damaged pickle can fail in any of these ways.
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        MemoryError,
        OverflowError,
    ) as error:
        raise _refused(file, error) from error


@contextlib.contextmanager
def only_plain_data(directory: Path) -> Iterator[None]:
    """Around the loading of a Megatron checkpoint: what it holds is data, whoever wrote it.

    Args:
        directory: the checkpoint, with `.metadata`, `common.pt` and the tensors' files.

    Raises:
        UserError: a file of it names functions or classes, or is damaged.
    """
    check_index(directory / INDEX_FILE)
    before = os.environ.get(FORCE_PLAIN)
    os.environ[FORCE_PLAIN] = "1"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _refused(directory, error) from error
    finally:
        if before is None:
            del os.environ[FORCE_PLAIN]
        else:
            os.environ[FORCE_PLAIN] = before


def _refused(place: Path, error: BaseException) -> UserError:
    return UserError(
        f"{place} cannot be read as plain data: {str(error).splitlines()[0] if str(error) else error!r}",
        rule="a checkpoint holds tensors, numbers and texts, and names no function to call",
        remedy="restore it from a copy, or remove it to continue from an earlier one",
    )
