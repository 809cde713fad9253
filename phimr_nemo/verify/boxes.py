r"""The boxes of a text: ``\boxed`` and ``\fbox``, closed or not, in time linear in its length."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

BOX_COMMANDS: Final = ("\\boxed", "\\fbox")
MAX_BOXES: Final = 32


@dataclass(frozen=True)
class Box:
    """A box.

    Attributes:
        start: where its command begins.
        end: behind its closing brace, or behind what it holds.
        content: what it holds.
        is_closed: its braces close, or it has none.
        too_long: it holds more than `MAX_ANSWER_CHARS` characters.
    """

    start: int
    end: int
    content: str
    is_closed: bool
    too_long: bool = False


def boxes_of(text: str) -> list[Box]:
    """The last boxes with content, first to last; nested boxes count once, as the inner one."""
    found: list[Box] = []
    limit = len(text)
    commands = [command for command in BOX_COMMANDS if command in text]
    if not commands:
        return found
    for _ in range(MAX_BOXES):
        start, command = max((text.rfind(command, 0, limit), command) for command in commands)
        if start < 0:
            break
        limit = start
        box = _read_box(text, start, start + len(command))
        if box is not None and box.content and not (found and box.end >= found[-1].end):
            found.append(box)
    return found[::-1]


def _read_box(text: str, start: int, position: int) -> Box | None:
    while position < len(text) and text[position] in " \t":
        position += 1
    if position >= len(text):
        return None
    if text[position] != "{":
        token = re.match(r"-?[0-9A-Za-z.,]+", text[position : position + MAX_ANSWER_CHARS])
        return Box(start, position + token.end(), token.group().rstrip(".,"), is_closed=True) if token else None
    depth, index = 0, position
    end = min(len(text), position + MAX_ANSWER_CHARS + 2)
    while index < end:
        character = text[index]
        if character == "\\":
            index += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return Box(start, index + 1, text[position + 1 : index].strip(), is_closed=True)
        index += 1
    # The box never closes: what it holds up to the end of its formula or line.
    content = re.split(r"\$|\n|\\\]|\\\)", text[position + 1 : end], maxsplit=1)[0]
    too_long = len(content) >= MAX_ANSWER_CHARS
    return Box(start, position + 1 + len(content), content.strip(), is_closed=False, too_long=too_long)
