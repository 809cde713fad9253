"""JSON files of unknown origin: of bounded size, and everything that is wrong with one is a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

MAX_CONFIG_BYTES: Final = 4 << 20
"""A model's configuration, with LongRoPE's factors, has some kilobytes; an index of shards a few hundred."""

MAX_TOKENIZER_BYTES: Final = 128 << 20
"""Those of a vocabulary of 200,000 entries have 16 million."""


def read_json(file: Path, *, limit: int = MAX_CONFIG_BYTES) -> Any:
    """The content of a JSON file.

    Args:
        file: to read.
        limit: bytes that it has at most.

    Raises:
        ValueError: it is longer, no JSON, nested too deeply, or no UTF-8.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
