"""Memory that a process has freed, given back to the machine."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Give back what Arrow and the C library keep of freed memory, between two shards of long texts.

    Both keep it in pieces that the next shard's texts do not quite fit, so that a process that reads one shard after
    another grew to three times the memory of one (measured over 30 shards of 10,000 responses of 10,000 characters).
    Nothing happens where the C library has no such function.
    """
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
