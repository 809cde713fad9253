"""Recorded solutions instead of a live teacher: files that hold questions with responses, right and wrong.

Three layouts are read. Flat: one row a response. Listed: one row a question, the response column is a
list. Nested: one row a question with one object a model, `{"6b": {"solution": ..., "is_correct": ...}}`.
A source's own labels are kept in `metadata`, but the project's grader decides.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.sources.problems import (
    TEACHER_NAMING,
    Columns,
    IncompleteRow,
    IncompleteRows,
    find_columns,
    first_present,
    lookup,
    missing_column,
    problem_of,
)
from phimr_nemo.data.sources.rawfiles import Row, read_rows
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.records import FinishReason
from phimr_nemo.store.shards import rows_to_table
from phimr_nemo.text.thinking import with_thinking

if TYPE_CHECKING:
    import pyarrow as pa

RESPONSE_COLUMNS: Final = (
    "response",
    "responses",
    "generation",
    "generations",
    "completion",
    "message_content",
    "output",
)
NESTED_RESPONSE_COLUMNS: Final = ("solution", *RESPONSE_COLUMNS)
THINKING_COLUMNS: Final = ("message_thinking", "reasoning_content", "thinking")
TEACHER_COLUMNS: Final = ("model", "teacher", "generator")
UNNAMED_TEACHER: Final = "recorded"
TOKENS_UNKNOWN: Final = -1


@dataclass(frozen=True)
class Recorded:
    """One recorded response of one teacher with the source's own labels."""

    teacher: str
    response: str
    finish_reason: FinishReason
    labels: Row


def recorded_rollouts(
    path: Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    response: str | None = None,
    teacher: str | None = None,
    limit: int | None = None,
) -> pa.Table:
    """Read recorded responses (see :func:`load_recorded_rollouts`, which also counts what was dropped)."""
    return load_recorded_rollouts(
        path, question=question, answer=answer, response=response, teacher=teacher, limit=limit
    )[0]


def load_recorded_rollouts(
    path: Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    response: str | None = None,
    teacher: str | None = None,
    limit: int | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """Read recorded responses as rollouts.

    Args:
        path: JSON, JSONL (.gz, .zst) or parquet.
        question: column of the question; found by its usual names when None.
        answer: column of the right answer; a worked one that ends in `#### n` or `A: n` is split.
        response: column of the response, in the row or in each model's object; found when None.
        teacher: column of the model's name; found when None. In nested files the object's key is the name.
        limit: read only the first rows of the file; None or 0 = all.

    Returns:
        A table of kind "rollouts", and the counts "read" (rows of the file) and "incomplete" (without
        question, answer or response). Problem ids equal those of `read_problems` on the same questions;
        `sample_index` counts the responses of one teacher to one problem.

    Raises:
        UserError: the file is missing, empty, damaged or malformed, a column is not there, or more than
            `MAX_INCOMPLETE_SHARE` of the rows are incomplete (the first is named).
    """
    columns: Columns | None = None
    incomplete = IncompleteRows()
    samples: Counter[tuple[str, str]] = Counter()
    rows: list[Row] = []
    read = 0
    for place, row in itertools.islice(read_rows(path), limit or None):
        where = f"{path}, {place}"
        if columns is None:
            columns = find_columns(path, row, naming=TEACHER_NAMING, question=question, answer=answer)
            if not list(responses_of(row, response, teacher, where)):
                wanted = response or f"one of {list(RESPONSE_COLUMNS)}, or one object a model with one of these"
                raise missing_column(path, f"a response column ({wanted})", row, TEACHER_NAMING)
        read += 1
        try:
            problem = problem_of(row, columns, where=where, source=path.name)
            found = list(responses_of(row, response, teacher, where))
            if not found:
                raise _no_response(where, "no response")
        except IncompleteRow as error:
            incomplete.add(error)
            continue
        for recorded in found:
            key = (problem["id"], recorded.teacher)
            rows.append(_rollout(problem, recorded, samples[key]))
            samples[key] += 1
    incomplete.check(read)
    return rows_to_table(rows, "rollouts"), {"read": read, "incomplete": incomplete.count}


def _no_response(where: str, problem: str) -> IncompleteRow:
    return IncompleteRow(
        f"{where} has {problem}",
        rule="every row of recorded rollouts has responses, each a text",
        remedy="correct or remove the row, or name the column: response=COLUMN",
    )


def _rollout(problem: Row, recorded: Recorded, sample_index: int) -> Row:
    return {
        "id": content_id("rollout", problem["id"], recorded.teacher, "recorded", str(sample_index)),
        "problem_id": problem["id"],
        "question": problem["question"],
        "answer": problem["answer"],
        "response": recorded.response,
        "teacher": recorded.teacher,
        "sample_index": sample_index,
        "seed": content_seed("recorded", problem["id"], recorded.teacher, str(sample_index)),
        "finish_reason": recorded.finish_reason,
        "tokens": TOKENS_UNKNOWN,
        "domain": problem["domain"],
        "difficulty": problem["difficulty"],
        "source": problem["source"],
        "metadata": json.dumps(recorded.labels, ensure_ascii=False),
    }


def responses_of(row: Row, response: str | None, teacher: str | None, where: str) -> Iterator[Recorded]:
    """The responses in one row, whatever the layout."""
    column = response if response is not None and lookup(row, response) is not None else None
    if response is None:
        column = first_present(row, RESPONSE_COLUMNS)
    if column is not None:
        name_column = teacher or first_present(row, TEACHER_COLUMNS)
        name = lookup(row, name_column) if name_column else None
        values = lookup(row, column)
        for value in values if isinstance(values, list) else [values]:
            yield _recorded(str(name or UNNAMED_TEACHER), value, row, where)
        return
    for key, nested in row.items():
        if isinstance(nested, dict):
            inner = response or first_present(nested, NESTED_RESPONSE_COLUMNS)
            if inner is not None and isinstance(lookup(nested, inner), str):
                yield _recorded(key, lookup(nested, inner), nested, where)


def _recorded(teacher: str, response: Any, row: Row, where: str) -> Recorded:
    if not isinstance(response, str):
        raise _no_response(where, f"a response of type {type(response).__name__}")
    thinking_column = first_present(row, THINKING_COLUMNS)
    thinking = lookup(row, thinking_column) if thinking_column else None
    if isinstance(thinking, str) and thinking.strip():
        response = with_thinking(thinking.strip(), response)
    return Recorded(
        teacher=teacher,
        response=response,
        finish_reason="length" if lookup(row, "finish_reason") == "length" else "stop",
        labels={name: value for name, value in row.items() if isinstance(value, (bool, int, float))},
    )
