"""GPQA from the user's own CSV file: the authors ask that its questions are not put where models learn from them.

The correct answer stands first in the file. Here the options stand in the order of their hashes, so every run, on any
machine and from any order of rows, asks the same question, and no letter is right more often than chance has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.sources.rawfiles import read_csv
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import rows_to_table

if TYPE_CHECKING:
    import pyarrow as pa

QUESTION_COLUMN: Final = "Question"
RIGHT_COLUMN: Final = "Correct Answer"
WRONG_COLUMNS: Final = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
DOMAIN_COLUMN: Final = "High-level domain"
LABEL_COLUMNS: Final = ("Record ID", "Subdomain")
LETTERS: Final = "ABCD"
SOURCE: Final = "GPQA"


def read_gpqa(path: Path) -> pa.Table:
    """Read GPQA's questions with lettered options.

    Args:
        path: a CSV file in the layout of the authors' `gpqa_diamond.csv`.

    Returns:
        A table of kind "problems"; the answer is a letter.

    Raises:
        UserError: the file is no such CSV, a cell is empty, or two options are equal.
    """
    rows = []
    for place, row in read_csv(path):
        missing = [name for name in (QUESTION_COLUMN, RIGHT_COLUMN, *WRONG_COLUMNS) if name not in row]
        if missing:
            raise _refused(path, f"lacks the columns {missing}; it has {list(row)}")
        rows.append(_problem(row, f"{path}, {place}"))
    return rows_to_table(rows, "problems")


def _problem(row: Mapping[str, str | None], where: str) -> dict[str, Any]:
    question, right, *wrong = ((row[name] or "").strip() for name in (QUESTION_COLUMN, RIGHT_COLUMN, *WRONG_COLUMNS))
    options = [right, *wrong]
    if not question or not all(options):
        raise _refused(where, "has an empty question or option")
    if len(set(options)) < len(options):
        raise _refused(where, "has the same option twice")
    options.sort(key=lambda option: content_id(SOURCE, question, option))
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)]
    asked = "\n".join([question, "", *lines])
    answer = LETTERS[options.index(right)]
    return {
        "id": content_id("problem", asked, answer),
        "source": SOURCE,
        "question": asked,
        "answer": answer,
        "solution": None,
        "domain": row.get(DOMAIN_COLUMN) or None,
        "difficulty": "graduate",
        "metadata": json.dumps({name: row[name] for name in LABEL_COLUMNS if row.get(name)}, ensure_ascii=False),
    }


def _refused(where: Path | str, problem: str) -> UserError:
    return UserError(
        f"{where} {problem}",
        rule=f"GPQA is read from the authors' CSV with the columns {[QUESTION_COLUMN, RIGHT_COLUMN, *WRONG_COLUMNS]}",
        remedy="download gpqa_diamond.csv from its authors and give its path",
    )
