"""What is wrong with a file that is no file of rows, and the command that makes one of it."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError

ENCODINGS: Final = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
LIKELIEST: Final = "ISO-8859-1"
"""Of a text that is not in UTF-8 and has no mark."""
_TAKE_OUT: Final = (
    "import json, sys; rows = json.load(open(sys.argv[1], encoding='utf-8'))[sys.argv[2]]; "
    "[print(json.dumps(row)) for row in rows]"
)
_AS_PARQUET: Final = (
    "import sys, pyarrow.feather as feather, pyarrow.parquet as parquet; "
    "parquet.write_table(feather.read_table(sys.argv[1]), sys.argv[2])"
)


def malformed(path: Path, place: str, problem: str) -> UserError:
    """The error for a row that is none."""
    return UserError(
        f"{path}, {place} {problem}",
        rule="every row is an object in which a name stands once",
        remedy="correct or remove it",
    )


def not_utf8(path: Path, place: str, error: UnicodeDecodeError) -> UserError:
    """The error for text in another encoding: which one it is, as far as its first bytes tell."""
    encoding = ENCODINGS.get(bytes(error.object[:2]), LIKELIEST)
    command = shlex.join(("iconv", "-f", encoding, "-t", "UTF-8", str(path)))
    return UserError(
        f"{path}, {place} is not JSON: {str(error)[:200]}",
        rule="text is in UTF-8",
        remedy=f"convert it: {command} > {shlex.quote(str(path.with_name('utf8-' + path.name)))} "
        f"(if it is in {encoding}; one that is compressed is unpacked first)",
    )


def holder_of_rows(row: dict[str, Any], question_columns: tuple[str, ...]) -> str | None:
    """The name under which an object holds a list of rows with a question, such as "data"; the longest list's."""
    held = {
        name: len(value)
        for name, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and set(value[0]) & set(question_columns)
    }
    return max(held, key=lambda name: held[name]) if held else None


def holds_rows(path: Path, name: str) -> UserError:
    """The error for one object that holds the rows under a name."""
    command = shlex.join(("python", "-c", _TAKE_OUT, str(path), name))
    target = shlex.quote(str(path.with_name(f"{path.stem}-rows.jsonl")))
    return UserError(
        f"{path} holds its rows in a list under {name!r}",
        rule="a file of rows is an array of objects, or has one on each line",
        remedy=f"take them out: {command} > {target}",
    )


def unreadable_arrow(path: Path, error: Exception) -> UserError:
    """The error for an .arrow file that `datasets` cannot read: another of Arrow's formats, or a damaged one."""
    command = shlex.join(("python", "-c", _AS_PARQUET, str(path), str(path.with_suffix(".parquet"))))
    return UserError(
        f"{path} cannot be read: {str(error)[:200]}",
        rule="an .arrow file is one that `datasets` wrote, in Arrow's stream format",
        remedy=f"if it is in Arrow's file format (Feather), convert it: {command}; else download it again",
    )
