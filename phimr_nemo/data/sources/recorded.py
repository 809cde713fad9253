"""Recorded solutions instead of a live teacher: files that hold questions with responses, correct and wrong.

Three layouts are read. Flat: one row a response. Listed: one row a question, the response column is a
list. Nested: one row a question with one object a model, `{"6b": {"solution": ..., "is_correct": ...}}`.
A source's own labels are kept in `metadata`, but the project's grader decides.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.sources.cells import ASSISTANT_ROLES, first_present, lookup, merged, speaker, turn_text
from phimr_nemo.data.sources.damage import repair_value
from phimr_nemo.data.sources.problems import (
    CONVERSATIONS,
    TEACHER_NAMING,
    IncompleteRow,
    IncompleteRows,
    find_columns,
    is_label,
    missing_column,
    problem_of,
    sample,
)
from phimr_nemo.data.sources.rawfiles import Row, read_rows
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.records import FinishReason
from phimr_nemo.store.shards import rows_to_table
from phimr_nemo.text.thinking import CLOSE, with_thinking

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
    "model_answer",
)
TEXT_KEYS: Final = ("text", "content", "value")
"""Where a response stands in an object that has none of these columns."""
NESTED_RESPONSE_COLUMNS: Final = ("solution", *RESPONSE_COLUMNS)
THINKING_COLUMNS: Final = ("message_thinking", "reasoning_content", "thinking", "model_reasoning")
TEACHER_COLUMNS: Final = ("model", "teacher", "generator", "generation_model", "model_name", "response_model")
KNOWN_RESPONSE_COLUMNS: Final = (
    *RESPONSE_COLUMNS,
    *("generated_solution", "llm_response", "deepseek_attempt", "gemini_attempt", "thinking_trajectories"),
)
"""Where published sets have their responses: a column that is not asked for is named, never ignored in silence."""
# The markers of Sky-T1's prompt, in which Bespoke-Stratos and OpenThoughts are written.
THOUGHT_MARKERS: Final = ("<|begin_of_thought|>", "<|end_of_thought|>")
SOLUTION_MARKERS: Final = ("<|begin_of_solution|>", "<|end_of_solution|>")
NO_TEXT: Final = "response that is null or empty"
UNNAMED_TEACHER: Final = "recorded"
TOKENS_UNKNOWN: Final = -1


@dataclass(frozen=True)
class Recorded:
    """One recorded response of one teacher with the source's own labels; None for what is no text."""

    teacher: str
    response: str | None
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
        answer: column of the correct answer; a worked one that ends in `#### n` or `A: n` is split.
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
    first, all_rows = sample(itertools.islice(read_rows(path), limit or None))
    columns = find_columns(path, merged(first), naming=TEACHER_NAMING, question=question, answer=answer)
    if not any(responses_of(row, response, teacher) for row in first):
        wanted = response or f"one of {list(RESPONSE_COLUMNS)}, or one object a model with one of these"
        raise missing_column(path, f"a response column ({wanted})", merged(first), TEACHER_NAMING)
    incomplete = IncompleteRows()
    samples: Counter[tuple[str, str]] = Counter()
    rows: list[Row] = []
    repaired: Counter[str] = Counter()
    read = lost = 0
    for place, given in all_rows:
        where = f"{path}, {place}"
        row, repairs = repair_value(given)
        repaired.update(repairs)
        read += 1
        try:
            problem = problem_of(row, columns, where=where, source=path.name)
            found = responses_of(row, response, teacher)
            if all(recorded.response is None for recorded in found):
                raise IncompleteRow(
                    f"{where} has no response",
                    rule="every row of recorded rollouts has responses, each a text",
                    remedy="correct or remove the row, or name the column: response=COLUMN",
                    reason="no response",
                )
        except IncompleteRow as error:
            incomplete.add(error)
            continue
        lost += sum(not recorded.response for recorded in found)
        for recorded in found:
            if not recorded.response:
                continue
            key = (problem["id"], recorded.teacher)
            rows.append(_rollout(problem, recorded, recorded.response, samples[key]))
            samples[key] += 1
    incomplete.check(read)
    rare = {f"dropped: {NO_TEXT}": lost, **repaired}
    counts = {"read": read, "incomplete": incomplete.count, **{name: count for name, count in rare.items() if count}}
    return rows_to_table(rows, "rollouts"), counts


def _rollout(problem: Row, recorded: Recorded, response: str, sample_index: int) -> Row:
    return {
        "id": content_id("rollout", problem["id"], recorded.teacher, "recorded", str(sample_index)),
        "problem_id": problem["id"],
        "question": problem["question"],
        "answer": problem["answer"],
        "response": response,
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


def responses_of(row: Row, response: str | None, teacher: str | None) -> list[Recorded]:
    """The responses in one row, whatever the layout: a column, chat messages, or one object a model.

    Args:
        row: the row.
        response: the column, in the row or in each model's object; found when None.
        teacher: the column of the model's name; found when None.
    """
    column = response if response is not None and lookup(row, response) is not None else None
    if response is None:
        column = first_present(row, (*RESPONSE_COLUMNS, *CONVERSATIONS))
    if column is not None:
        name_column = teacher or first_present(row, TEACHER_COLUMNS)
        name = str((lookup(row, name_column) if name_column else None) or UNNAMED_TEACHER)
        values = lookup(row, column)
        if _is_conversation(values):
            # A prompt alone lacks nothing.
            said = [turn for turn in values if isinstance(turn, dict) and speaker(turn) in ASSISTANT_ROLES]
            return [_recorded(name, turn_text(said, ASSISTANT_ROLES), row)] if said else []
        return [_listed(name, value, row) for value in (values if isinstance(values, (list, tuple)) else [values])]
    found = []
    for key, nested in row.items():
        if isinstance(nested, dict):
            inner = response or first_present(nested, NESTED_RESPONSE_COLUMNS)
            if inner is not None and isinstance(lookup(nested, inner), str):
                found.append(_recorded(key, lookup(nested, inner), nested))
    return found


def unread_response(row: Row) -> str | None:
    """A column that holds responses by its name or by their thinking, for a source that was not asked for any."""
    column = first_present(row, KNOWN_RESPONSE_COLUMNS)
    if column is not None and isinstance(lookup(row, column), (str, list, tuple)):
        return column
    return next((name for name, value in row.items() if _holds_thinking(value)), None)


def _holds_thinking(value: Any) -> bool:
    texts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(text, str) and CLOSE in text for text in texts)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
    )


def _listed(teacher: str, value: Any, row: Row) -> Recorded:
    """A response of a list, a text or an object that may name its own model."""
    inner = first_present(value, (*RESPONSE_COLUMNS, *TEXT_KEYS)) if isinstance(value, dict) else None
    if inner is None:
        return _recorded(teacher, value, row)
    own = first_present(value, TEACHER_COLUMNS)
    return _recorded(str(lookup(value, own)) if own else teacher, lookup(value, inner), value)


def think_tagged(text: str) -> str:
    """The response with think tags in place of the markers of Sky-T1's prompt around thought and solution."""
    thought, solution = _between(text, THOUGHT_MARKERS), _between(text, SOLUTION_MARKERS)
    if thought is None or solution is None:
        return text
    return with_thinking(thought, solution, gap="\n\n")


def _between(text: str, markers: tuple[str, str]) -> str | None:
    """What stands between two markers, the second of which may be missing; None without the first."""
    _, first, rest = text.partition(markers[0])
    return rest.partition(markers[1])[0].strip() if first else None


def _recorded(teacher: str, response: Any, row: Row) -> Recorded:
    """A response with the thinking that stands in a column of its own."""
    text = (think_tagged(response) if response.strip() else "") if isinstance(response, str) else None
    thinking_column = first_present(row, THINKING_COLUMNS)
    thinking = lookup(row, thinking_column) if thinking_column else None
    if text and isinstance(thinking, str) and thinking.strip():
        text = with_thinking(thinking.strip(), text)
    return Recorded(
        teacher=teacher,
        response=text,
        finish_reason="length" if lookup(row, "finish_reason") == "length" else "stop",
        labels={
            name: value for name, value in row.items() if isinstance(value, (bool, int, float)) and is_label(value)
        },
    )
