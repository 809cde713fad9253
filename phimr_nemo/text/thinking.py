"""The tags around a response's thinking, as this recipe's models write them; `text.turn` reads those of others."""

from __future__ import annotations

from typing import Final

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


def with_thinking(thinking: str, answer: str, *, gap: str = "\n") -> str:
    """A response from its two halves.

    Args:
        thinking: without tags.
        answer: what comes after it.
        gap: between the closing tag and the answer.
    """
    return f"{OPEN}\n{thinking}\n{CLOSE}{gap}{answer}"
