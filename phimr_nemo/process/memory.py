"""Memory: its units, and what a process has freed given back to the machine."""

from __future__ import annotations

import ctypes
import os
from typing import Final

MEBIBYTE: Final = 2**20
GIBIBYTE: Final = 2**30
ARROW_POOL: Final = "ARROW_DEFAULT_MEMORY_POOL"
"""Arrow reads it when it is imported."""


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
