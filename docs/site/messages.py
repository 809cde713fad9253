"""Every message that the package raises as a UserError, read from its source: problem, rule and remedy."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("phimr_nemo", "recipes")
RAISED: Final = "UserError"


class Message(NamedTuple):
    """One place that raises a UserError.

    Attributes:
        module: its file, from the repository's root.
        problem: what it says it found; what is filled in stands in braces.
        rule: what would have been right.
        remedy: what to do.
    """

    module: str
    problem: str
    rule: str
    remedy: str


def text_of(node: ast.expr | None) -> str | None:
    """A literal's text, with what is filled in as `{expression}`; None for what is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        ]
        return "".join(parts)
    return None


@functools.cache
def messages() -> tuple[Message, ...]:
    """Every message whose problem is written where it is raised; parts made elsewhere are left empty."""
    return tuple(_raised())


def _raised() -> Iterator[Message]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == RAISED):
                    continue
                problem = text_of(node.args[0]) if node.args else None
                if problem is not None:
                    given = {word.arg: text_of(word.value) or "" for word in node.keywords}
                    module = str(path.relative_to(REPOSITORY))
                    yield Message(module, problem, given.get("rule", ""), given.get("remedy", ""))


def code(text: str) -> str:
    """A text as Markdown's code on one line; MkDocs takes a bar in code, also in a table, for what it is."""
    flat = " ".join(text.split())
    fence = "``" if "`" in flat else "`"
    space = " " if "`" in flat else ""
    return f"{fence}{space}{flat}{space}{fence}" if flat else ""


def listed(found: list[Message]) -> str:
    """Messages as a list in Markdown."""
    lines = []
    for message in found:
        lines.append(f"- {code(message.problem)}")
        lines += [f"    - rule: {code(message.rule)}"] if message.rule else []
        lines += [f"    - remedy: {code(message.remedy)}"] if message.remedy else []
    return "\n".join(lines)


def page() -> str:
    """The page of all messages, by package."""
    by_package: dict[str, list[Message]] = {}
    for message in messages():
        parts = Path(message.module).parts
        by_package.setdefault("/".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(message)
    total = sum(map(len, by_package.values()))
    head = (
        "# Error messages\n\n"
        f"What the commands refuse, read from their source: {total} messages, by the package that raises them. "
        "Each names what was found, the rule that it breaks and a remedy; words in braces are filled in. The exit "
        "code is 2. Search for a part of the message that has no number in it.\n"
    )
    return head + "".join(f"\n## {name}\n\n{listed(found)}\n" for name, found in by_package.items())
