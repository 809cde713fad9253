"""Links of documents: where they lead in the repository, and where the site has that."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
DOCS: Final = "docs"
OUTSIDE: Final = "repository"
"""Where the site has what lies outside docs/."""
LINK: Final = re.compile(r"(?P<text>!?\[(?:[^\]\\]|\\.)*\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
SCHEME: Final = re.compile(r"^[a-z]+:")
WORD: Final = re.compile(r"^```(\w+) \w+$", re.MULTILINE)
"""A block's language and why it is not run (tests/documents); MkDocs knows the first alone."""
FENCE: Final = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def place(path: str) -> str:
    """Where the site's sources have a file of the repository."""
    return posixpath.relpath(path, DOCS) if path.startswith(f"{DOCS}/") else f"{OUTSIDE}/{path}"


def targets(text: str, path: str) -> set[str]:
    """The repository's files that a document links to."""
    found = set()
    for match in LINK.finditer(FENCE.sub("", text)):
        if not SCHEME.match(match["target"]):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["target"]))
            if (REPOSITORY / target).is_file():
                found.add(target)
    return found


def rewritten(text: str, path: str) -> str:
    """A document as the site takes it: links lead where it has their files, a link to a folder becomes its text."""

    def new(match: re.Match[str]) -> str:
        if SCHEME.match(match["target"]):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["target"]))
        if (REPOSITORY / target).is_dir():
            return match["text"][1:-1]
        if not (REPOSITORY / target).is_file():
            return match[0]
        link = posixpath.relpath(place(target), posixpath.dirname(place(path)) or ".")
        return f"{match['text']}({link}{match['anchor'] or ''})"

    parts = FENCE.split(WORD.sub(r"```\1", text))
    return "".join(part if number % 2 else LINK.sub(new, part) for number, part in enumerate(parts))
