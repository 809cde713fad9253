"""What the quickstart shows at its end: its model's answers to questions that it never saw, and what to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from phimr_nemo.evaluate.evaluate import VERDICTS
from phimr_nemo.store.shards import read_table
from phimr_nemo.text.printable import printable

SHOWN_QUESTIONS: Final = 3
SHOWN_CHARS: Final = 200


def answers(evaluation: Path) -> Iterator[str]:
    """The first questions of an evaluation: how the first response to each ends, and its verdict.

    Args:
        evaluation: its run directory.

    Raises:
        UserError: it is absent, unfinished or damaged.
    """
    columns = ["question", "answer", "response", "verdict"]
    seen: set[str] = set()
    for row in read_table(evaluation / VERDICTS, "verdicts", columns).to_pylist():
        if row["question"] in seen:
            continue
        seen.add(row["question"])
        ending = row["response"].strip().rpartition("\n")[2][-SHOWN_CHARS:]
        yield f"  {printable(row['question'])}"
        yield f"    {printable(ending) or '(nothing)'}  [{row['verdict']}; the answer is {printable(row['answer'])}]"
        if len(seen) == SHOWN_QUESTIONS:
            return


def to_type(*words: str) -> str:
    """A `phimr` command as it is typed in this shell: the environment first, where it is not active."""
    command = shlex.join(("phimr", *words))
    if shutil.which("phimr") is not None:
        return command
    activate = os.path.relpath(Path(sys.prefix) / "bin" / "activate")
    return f". {shlex.quote(activate)} && {command}"
