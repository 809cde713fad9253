"""Weights moved as blocks of rows: read a block, see that it is finite, write it where it belongs, several at a time.

A conversion changes no number and knows every place before it starts, so blocks need no order. Reading, checking and
writing release the interpreter's lock; a few threads, each with one block in memory, keep the disk busy both ways.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Final, Protocol

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.table import tensor_shapes
from phimr_nemo.store.progress import Progress

BLOCK_BYTES: Final = 32 * 2**20
MEGABYTE: Final = 1_000_000
WORKERS: Final = 4

Block = tuple[str, int, int]
"""Name of a tensor, first row, row after the last."""


class RowSource(Protocol):
    """Weights of a model under their Hugging Face names, whatever they are kept in."""

    architecture: Architecture

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, as it is stored."""

    def place(self, name: str) -> Path:
        """Where a tensor is stored, for messages."""

    def read_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Fill `rows`, contiguous on the CPU in the stored dtype, with the tensor's rows from `start` on.

        Rows are counted in Hugging Face's order; a vector's rows are its elements. Called from several threads.
        """


class RowSink(Protocol):
    """Where weights are written."""

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of a tensor from `start` on, the inverse of ``RowSource.read_rows``."""


def common_dtype(source: RowSource) -> torch.dtype:
    """The dtype of all tensors.

    Raises:
        UserError: they have several.
    """
    names = list(tensor_shapes(source.architecture))
    first = source.dtype(names[0])
    for name in names:
        if source.dtype(name) != first:
            raise UserError(
                f"tensor {name} in {source.place(name)} is {source.dtype(name)}, {names[0]} is {first}",
                rule="all tensors of a checkpoint that is converted have one dtype",
                remedy="save the model in one dtype first (in transformers: model.to(torch.bfloat16))",
            )
    return first


def blocks(architecture: Architecture, itemsize: int) -> Iterator[Block]:
    """All rows of all tensors in the order of the layers, in blocks of at most `BLOCK_BYTES` or one row."""
    for name, shape in tensor_shapes(architecture).items():
        row_bytes = itemsize * torch.Size(shape[1:]).numel()
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            yield name, start, min(start + step, shape[0])


def read_block(source: RowSource, block: Block, buffer: Tensor) -> Tensor:
    """The rows of a block, in the memory of `buffer`.

    Args:
        source: the weights.
        block: which rows.
        buffer: bytes, at least as many as the block has.

    Raises:
        UserError: they cannot be read, or one is NaN or infinite.
    """
    name, start, stop = block
    shape = (stop - start, *tensor_shapes(source.architecture)[name][1:])
    dtype = source.dtype(name)
    rows = buffer[: dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
    source.read_rows(name, start, rows)
    if not is_finite(rows):
        raise UserError(
            f"tensor {name} in {source.place(name)} holds NaN or infinite values",
            rule="weights are finite numbers",
            remedy="use a checkpoint from before the training diverged, or download the file again",
        )
    return rows


def block_buffer(architecture: Architecture, itemsize: int) -> Tensor:
    """Memory for any block of a model."""
    widest = max(torch.Size(shape[1:]).numel() for shape in tensor_shapes(architecture).values())
    return torch.empty(max(BLOCK_BYTES, itemsize * widest), dtype=torch.uint8)


def transfer(source: RowSource, sink: RowSink) -> None:
    """Write all weights of a source into a sink. Peak memory is `WORKERS` blocks, whatever the model's size.

    Raises:
        UserError: tensors of several dtypes, a tensor that cannot be read or is not finite.
        OSError: the target cannot be written.
    """
    arch = source.architecture
    itemsize = common_dtype(source).itemsize
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(WORKERS):
        buffers.put(block_buffer(arch, itemsize))

    def move(block: Block) -> int:
        buffer = buffers.get()
        try:
            rows = read_block(source, block, buffer)
            sink.write_rows(block[0], block[1], rows)
        finally:
            buffers.put(buffer)
        return rows.nbytes

    with (
        ThreadPoolExecutor(WORKERS) as pool,
        Progress(arch.num_parameters * itemsize // MEGABYTE, title="weights", unit="MB") as progress,
    ):
        pending = [pool.submit(move, block) for block in blocks(arch, itemsize)]
        written = 0
        try:
            for moved in pending:
                written += moved.result()
                progress.update(written // MEGABYTE - progress.done)
        finally:
            pool.shutdown(cancel_futures=True)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. One pass: the extremes are NaN where any element is."""
    if tensor.numel() == 0:
        return True
    extremes = torch.stack(torch.aminmax(tensor))
    return bool(torch.isfinite(extremes).all())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes as they stand in a file, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def read_at(file: Path, start: int, into: Tensor) -> None:
    """Fill a contiguous tensor on the CPU with the bytes of a file from `start` on.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    left = raw_bytes(into)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        while left:
            count = os.preadv(descriptor, [left], start)
            if count == 0:
                raise EOFError(f"{file} ends {len(left)} bytes early")
            left, start = left[count:], start + count
    finally:
        os.close(descriptor)


def write_at(descriptor: int, start: int, data: Tensor) -> None:
    """Write a tensor's bytes into an open file from `start` on.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    left = raw_bytes(data)
    while left:
        count = os.pwrite(descriptor, left, start)
        left, start = left[count:], start + count


def require_space(directory: Path, needed: int) -> None:
    """Refuse before the work what would fail after most of it.

    Raises:
        UserError: the disk of `directory` has less than `needed` bytes free.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"no space left for {needed / 1e9:.2f} GB in {directory.parent}: {free / 1e9:.2f} GB are free",
            rule="an output needs room on its disk; nothing was written",
            remedy="free space or choose another output directory, then run the same command again",
        )
