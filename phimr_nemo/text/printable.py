"""The one way in which foreign text reaches a terminal: as text, which the terminal shows and does not obey."""

from __future__ import annotations

import sys
from typing import Final

FILLERS: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Printable by Unicode, and nothing is seen of them: two names that differ in one look the same."""


def printable(text: str) -> str:
    """The text with every control character but line break and tab as its escape: a terminal obeys none.

    So are characters that turn the direction of writing, or that cannot be seen.
    """
    if text.replace("\n", "").replace("\t", "").isprintable() and (text.isascii() or FILLERS.isdisjoint(text)):
        # Nearly every text: looking at it as a whole takes a hundredth of the time.
        return text
    return "".join(
        c if (c.isprintable() and c not in FILLERS) or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def say(text: object, *, end: str = "\n") -> None:
    """Print to standard output, at once."""
    sys.stdout.write(printable(str(text)) + end)
    sys.stdout.flush()
