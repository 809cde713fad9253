"""Splitting canonical text outside its brackets, with a bound on their depth."""

from __future__ import annotations

import re
from typing import Final

MAX_NESTING: Final = 24
MAX_ITEMS: Final = 512


class Malformed(ValueError):
    """Brackets that do not match, or nesting or a number of items beyond the bounds."""


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPEN: Final = frozenset(["(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"])
_CLOSE: Final = {
    ")": "([", "]": "([", "}": "{", r"\}": (r"\{",), r"\rangle": (r"\langle",), r"\end": (r"\begin",),
    r"\rfloor": (r"\lfloor",), r"\rceil": (r"\lceil",),
}  # fmt: skip


def check_balance(text: str) -> None:
    """Raise :class:`Malformed` unless every bracket is closed by one that may close it, within the bound on depth."""
    split_top(text, frozenset())


def split_top(text: str, separators: frozenset[str]) -> list[str]:
    """Split at separators outside all brackets.

    Raises:
        Malformed: unbalanced or too deeply nested brackets.
    """
    stack: list[str] = []
    parts, start = [], 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _OPEN:
            stack.append(token)
            if len(stack) > MAX_NESTING:
                raise Malformed(f"nested deeper than {MAX_NESTING}")
        elif token in _CLOSE:
            if not stack or stack[-1] not in _CLOSE[token]:
                raise Malformed("unbalanced brackets")
            stack.pop()
        elif not stack and token in separators:
            parts.append(text[start : match.start()])
            start = match.end()
    if stack:
        raise Malformed("unbalanced brackets")
    parts.append(text[start:])
    if len(parts) > MAX_ITEMS:
        raise Malformed(f"more than {MAX_ITEMS} items")
    return parts
