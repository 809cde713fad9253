"""The tags around a response's thinking: ours, and those that other models write."""

from __future__ import annotations

from typing import Final

OPEN: Final = "<think>"
CLOSE: Final = "</think>"
KNOWN: Final = (
    (OPEN, CLOSE),
    ("<thinking>", "</thinking>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Opening and closing tags of reasoning models, ours first."""


def with_thinking(thinking: str, answer: str, *, gap: str = "\n") -> str:
    """A response from its two halves.

    Args:
        thinking: without tags.
        answer: what comes after it.
        gap: between the closing tag and the answer.
    """
    return f"{OPEN}\n{thinking}\n{CLOSE}{gap}{answer}"
