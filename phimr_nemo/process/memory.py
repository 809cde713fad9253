"""Memory: its units, and whether what a process has freed stays with it or goes back to the machine."""

from __future__ import annotations

import ctypes
import os
from typing import Final

MEBIBYTE: Final = 2**20
GIBIBYTE: Final = 2**30
ARROW_POOL: Final = "ARROW_DEFAULT_MEMORY_POOL"
"""Arrow reads it when it is imported."""

# Of glibc's mallopt, and what they are set to. By default the end of the heap is given back to the system as soon as
# some MiB of it are free, which an activation is; the next step then waits for the same pages, zeroed one by one.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = GIBIBYTE
_LARGEST_IN_HEAP: Final = 32 * MEBIBYTE
"""Larger tensors are mapped apart and given back when they are freed, as by default."""


def choose_returning_allocator() -> None:
    """Let Arrow take its memory from the C library, unless the user has chosen; call before it is imported.

    Its own allocator keeps freed memory in pieces that the next shard's texts do not quite fit. A process that reads
    and writes one shard of 10,000 responses of 10,000 characters after another grew by 25 MiB with each, to 3.1 GiB
    after a hundred; with the C library's it does not grow, in the same processor time.
    """
    os.environ.setdefault(ARROW_POOL, "system")


def return_free_memory() -> None:
    """Give back what the C library keeps of freed memory, between two shards of long texts.

    Nothing happens where it has no such function.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let the freed tensors of a step stay with the process for the next one, where a model computes on a CPU.

    Other C libraries than glibc are left alone, and so is a glibc that the environment has settings for.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if set_option is not None and not is_set:
        set_option(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
