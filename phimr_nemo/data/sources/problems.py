"""The user's own problems: files of questions with answers, whatever their columns are called.

GSM8K, MATH, DeepScaleR, AIME and AMC files load as they are. Columns are named by the caller or found
by their usual names; a dotted name reaches into an object or a JSON text (`reward_model.ground_truth`).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.data.sources.cells import (
    answer_text,
    bare_solution,
    first_present,
    lookup,
    merged,
    question_text,
    sequence,
    split_worked,
)
from phimr_nemo.data.sources.damage import is_damaged, repair_value
from phimr_nemo.data.sources.misfits import holder_of_rows, holds_rows
from phimr_nemo.data.sources.normalise import storable
from phimr_nemo.data.sources.rawfiles import COMPRESSIONS, Row, read_rows
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id
from phimr_nemo.store.records import DIFFICULTIES, Difficulty
from phimr_nemo.store.shards import rows_to_table

if TYPE_CHECKING:
    import pyarrow as pa

CONVERSATIONS: Final = ("messages", "conversations")
QUESTION_COLUMNS: Final = (
    *("question.problem", "question_concat", "question", "problem", "problem_statement", "prompt", "query"),
    *("instruction", "input", *CONVERSATIONS),
)
ANSWER_COLUMNS: Final = (
    # Beside one of these, `answer` is a worked one or a model's.
    *("reference_answer", "expected_answer", "ground_truth", "ground_truth_answer", "gt_answer", "gold_answer"),
    *("correct_answer", "answer", "final_answer", "gtruth_answer", "gold", "gt", "reward_model.ground_truth"),
    *("extra_info.answer", "extra_info.ground_truth", "verification_info.ground_truth", "metadata.expected_answer"),
    *("question.ground_truth_answer",),
    *(f"{name}.info.{answer}" for name in CONVERSATIONS for answer in ("reference_answer", "ground_truth")),
    "target",
)
SOLUTION_COLUMNS: Final = ("solution", "solutions", "deepseek_solution", "ground_truth_solution")
DOMAIN_COLUMNS: Final = ("domain", "type", "subject", "problem_type")
DIFFICULTY_COLUMNS: Final = ("difficulty", "level")
MAX_METADATA_CHARS: Final = 1000
# Published files lack the odd answer (MATH's training set 4 of 7,474); more than this is a wrong column.
MAX_INCOMPLETE_SHARE: Final = 0.01
SAMPLE_ROWS: Final = 100
DAMAGED: Final = "damaged text: a control character before a letter"

_LEVEL: Final = re.compile(r"(?:Level )?(\d+(?:\.\d+)?)")
# Upper bounds of a competition scale from 0 to 10, on which MATH's levels are 1 to 5, AIME 4 to 6 and the
# International Olympiad 7 to 10: our choice.
_DIFFICULTY_BELOW: Final[tuple[tuple[float, Difficulty], ...]] = (
    (2.0, "elementary"),
    (3.0, "middle"),
    (6.0, "high_school"),
    (8.0, "college"),
    (math.inf, "graduate"),
)


@dataclass(frozen=True)
class Columns:
    """Where the parts of a problem are; None where a file has no such column."""

    question: str
    answer: str | None
    solution: str | None
    domain: str | None
    difficulty: str | None


class IncompleteRow(UserError):
    """A row without a question, an answer or a response, or with one that is damaged.

    Attributes:
        reason: what is wrong with it, the same for all rows of this kind.
    """

    def __init__(self, problem: str, *, rule: str, remedy: str, reason: str) -> None:
        super().__init__(problem, rule=rule, remedy=remedy)
        self.reason = reason


class IncompleteRows:
    """Counts incomplete rows: a few are dropped, many are an error."""

    def __init__(self) -> None:
        self.count = 0
        self.first: IncompleteRow | None = None

    def add(self, error: IncompleteRow) -> None:
        """Remember one incomplete row."""
        self.count += 1
        self.first = self.first or error

    def check(self, rows: int) -> None:
        """Refuse a file of which more than `MAX_INCOMPLETE_SHARE` is incomplete, naming the first such row.

        Raises:
            IncompleteRow: there are too many.
        """
        if self.first is not None and self.count > MAX_INCOMPLETE_SHARE * rows:
            raise self.first


def read_problems(
    path: Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    solution: str | None = None,
    source: str | None = None,
    limit: int | None = None,
) -> pa.Table:
    """Read a file of problems (see :func:`load_problems`, which also counts what was dropped)."""
    return load_problems(path, question=question, answer=answer, solution=solution, source=source, limit=limit)[0]


def load_problems(
    path: Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    solution: str | None = None,
    source: str | None = None,
    limit: int | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """Read a file of problems.

    Args:
        path: JSON, JSONL (.gz, .zst) or parquet.
        question: column of the question; found by its usual names when None.
        answer: column of the answer; a worked answer that ends in `#### n` is split.
        solution: column of the worked solution; without an answer column its last `\\boxed{}` is the answer.
        source: label of the origin; the file's name when None.
        limit: read only the first rows; None or 0 = all.

    Returns:
        A table of kind "problems" (other short columns are kept in `metadata`), and the counts "read",
        "duplicate" (same question and answer as an earlier row) and "incomplete" (no question or answer), and
        in how many rows what was repaired.

    Raises:
        UserError: the file is missing, empty, damaged or malformed, a column is not there, or more than
            `MAX_INCOMPLETE_SHARE` of the rows have no question or no answer (the first is named).
    """
    label = source or _stem(path)
    first, all_rows = sample(itertools.islice(read_rows(path), limit or None))
    columns = find_columns(
        path, merged(first), naming=PROBLEMS_NAMING, question=question, answer=answer, solution=solution
    )
    incomplete = IncompleteRows()
    rows: dict[str, Row] = {}
    repaired: Counter[str] = Counter()
    read = 0
    for place, given in all_rows:
        row, repairs = repair_value(given)
        repaired.update(repairs)
        read += 1
        try:
            problem = problem_of(row, columns, where=f"{path}, {place}", source=label)
        except IncompleteRow as error:
            incomplete.add(error)
            continue
        rows.setdefault(problem["id"], problem)
    incomplete.check(read)
    counts = {
        "read": read,
        "incomplete": incomplete.count,
        "duplicate": read - incomplete.count - len(rows),
        **repaired,
    }
    return rows_to_table(list(rows.values()), "problems"), counts


def sample(rows: Iterator[tuple[str, Row]]) -> tuple[list[Row], Iterator[tuple[str, Row]]]:
    """The first rows, from which columns are found (one row may hold nulls), and all rows from the first on."""
    head = list(itertools.islice(rows, SAMPLE_ROWS))
    return [row for _, row in head], itertools.chain(head, rows)


def find_columns(
    path: Path,
    row: Row,
    *,
    naming: str,
    question: str | None = None,
    answer: str | None = None,
    solution: str | None = None,
    answer_needed: bool = True,
) -> Columns:
    """The columns of a file, as given or found by their usual names.

    Args:
        path: the file.
        row: what its first rows have (:func:`merged`).
        naming: how the user names columns, for the remedy.
        question, answer, solution: the names given.
        answer_needed: refuse a file that tells no answer.

    Raises:
        UserError: a column that was given is not there, no question is found, or neither answer nor solution.
    """
    for name, given in (("question", question), ("answer", answer), ("solution", solution)):
        if given is not None and lookup(row, given) is None:
            raise missing_column(path, f"the {name} column {given!r}", row, naming)
    columns = Columns(
        question=question or first_present(row, QUESTION_COLUMNS) or "",
        answer=answer or (None if solution else first_present(row, ANSWER_COLUMNS)),
        solution=solution or first_present(row, SOLUTION_COLUMNS),
        domain=first_present(row, DOMAIN_COLUMNS),
        difficulty=first_present(row, DIFFICULTY_COLUMNS),
    )
    if not columns.question:
        raise missing_column(path, f"a question column (one of {list(QUESTION_COLUMNS)})", row, naming)
    if answer_needed and columns.answer is None and columns.solution is None:
        raise missing_column(
            path, f"an answer column (one of {list(ANSWER_COLUMNS + SOLUTION_COLUMNS)})", row, naming
        )
    return columns


def problem_of(row: Row, columns: Columns, *, where: str, source: str, answer_needed: bool = True) -> Row:
    """One row of a file as a row of kind "problems".

    Raises:
        IncompleteRow: the row has no question or, where it is needed, no answer; or either is damaged.
    """
    question = storable(question_text(lookup(row, columns.question)))
    if not question:
        raise _incomplete(where, "question", columns.question)
    answer, solution = _answer_and_solution(row, columns)
    answer, solution = storable(answer), None if solution is None else storable(solution)
    if not answer and answer_needed:
        raise _incomplete(where, "answer", columns.answer or f"the last \\boxed{{}} of {columns.solution}")
    if is_damaged(question, answer):
        raise IncompleteRow(
            f"{where} holds a control character before a letter",
            rule="LaTeX that lost a backslash is repaired where it is known what was lost",
            remedy="correct or remove the row",
            reason=DAMAGED,
        )
    used = {columns.question, columns.answer, columns.solution, columns.domain, columns.difficulty}
    domain = lookup(row, columns.domain) if columns.domain else None
    level = lookup(row, columns.difficulty) if columns.difficulty else None
    metadata = {name: value for name, value in row.items() if name not in used and is_label(value)}
    if level is not None:
        metadata["level"] = str(level)
    return {
        "id": content_id("problem", question, answer),
        "source": storable(source),
        "question": question,
        "answer": answer,
        "solution": solution,
        "domain": storable(str(domain)) if domain else None,
        "difficulty": difficulty_of(level),
        "metadata": storable(json.dumps(metadata, ensure_ascii=False)),
    }


def is_label(value: object) -> bool:
    """Whether a value is short enough for metadata, and one that JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (str, int, float)) and len(str(value)) <= MAX_METADATA_CHARS


PROBLEMS_NAMING: Final = "problems.question=COLUMN problems.answer=COLUMN"
TEACHER_NAMING: Final = "teacher.question=COLUMN teacher.answer=COLUMN teacher.response=COLUMN"
SOURCE_NAMING: Final = "'sources=[{name: NAME, path: FILE, question: COLUMN, answer: COLUMN, response: COLUMN}]'"
EVALUATION_NAMING: Final = "question: COLUMN in its entry of decontamination.sets"
"""How columns are named where a file is read from."""


def missing_column(path: Path, wanted: str, row: Row, naming: str) -> UserError:
    """The error for a column that a file lacks; it lists what is there and says how columns are named.

    A file that holds its rows under a name has no columns to name: the error says how they are taken out.
    """
    if (holder := holder_of_rows(row, QUESTION_COLUMNS)) is not None:
        return holds_rows(path, holder)
    return UserError(
        f"{path} lacks {wanted}; its columns are {sorted(row)}",
        rule="the columns of question and answer are found by their usual names or are given",
        remedy=f"name them: {naming} (a dotted name reaches into an object or a JSON text)",
    )


def difficulty_of(level: object) -> Difficulty | None:
    """A source's own level as one of our tiers; None where it says nothing.

    Accepts a tier's name, "Level 3" (MATH) and numbers on a competition scale from 0 to 10.
    """
    text = str(level).strip()
    for tier in DIFFICULTIES:
        if text.lower().replace(" ", "_") == tier:
            return tier
    found = _LEVEL.fullmatch(text)
    if found is None:
        return None
    return next(tier for bound, tier in _DIFFICULTY_BELOW if float(found[1]) < bound)


def _answer_and_solution(row: Row, columns: Columns) -> tuple[str, str | None]:
    solutions = sequence(lookup(row, columns.solution) if columns.solution else None)
    solution = next((text for text in solutions if isinstance(text, str) and text.strip()), None)
    worked, answer = split_worked(answer_text(lookup(row, columns.answer)) if columns.answer else solution or "")
    if not columns.answer and not worked and solution is not None:
        return bare_solution(answer_text(solution)), solution
    return answer, solution or worked or None


def _incomplete(where: str, part: str, column: str) -> IncompleteRow:
    return IncompleteRow(
        f"{where} has no {part} ({column})",
        rule="every problem has a question and an answer",
        remedy="correct or remove the row, or name other columns",
        reason=f"no {part}",
    )


def _stem(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.stem
