"""Units of memory."""

from __future__ import annotations

from typing import Final

MEBIBYTE: Final = 2**20
GIBIBYTE: Final = 2**30
