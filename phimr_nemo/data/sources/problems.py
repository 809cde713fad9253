"""The user's own problems: files of questions with answers, whatever their columns are called.

GSM8K, MATH, DeepScaleR, AIME and AMC files load as they are. Columns are named by the caller or found
by their usual names; a dotted name reaches into an object (`reward_model.ground_truth`).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.sources.normalise import storable
from phimr_nemo.data.sources.rawfiles import COMPRESSIONS, Row, read_rows
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id
from phimr_nemo.store.records import DIFFICULTIES, Difficulty
from phimr_nemo.store.shards import rows_to_table

if TYPE_CHECKING:
    import pyarrow as pa

QUESTION_COLUMNS: Final = ("question", "problem", "prompt", "query", "instruction")
ANSWER_COLUMNS: Final = (
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "gtruth_answer",
    "gold",
    "reward_model.ground_truth",
    "extra_info.answer",
)
SOLUTION_COLUMNS: Final = ("solution", "deepseek_solution", "ground_truth_solution")
DOMAIN_COLUMNS: Final = ("domain", "type", "subject", "problem_type")
DIFFICULTY_COLUMNS: Final = ("difficulty", "level")
MAX_METADATA_CHARS: Final = 1000
# Published files lack the odd answer (MATH's training set 4 of 7,474); more than this is a wrong column.
MAX_INCOMPLETE_SHARE: Final = 0.01

# GSM8K ends a worked answer with "#### 18", OpenAI's recorded solutions of it with "A: 18".
_FINAL_LINE: Final = re.compile(r"[ \t]*(?:####|A:)[ \t]*(\S.*)")
_THOUSANDS: Final = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
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
    """A row without a question, an answer or a response."""


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
        "duplicate" (same question and answer as an earlier row) and "incomplete" (no question or answer).

    Raises:
        UserError: the file is missing, empty, damaged or malformed, a column is not there, or more than
            `MAX_INCOMPLETE_SHARE` of the rows have no question or no answer (the first is named).
    """
    label = source or _stem(path)
    columns: Columns | None = None
    incomplete = IncompleteRows()
    rows: dict[str, Row] = {}
    read = 0
    for place, row in itertools.islice(read_rows(path), limit or None):
        if columns is None:
            columns = find_columns(
                path, row, naming=PROBLEMS_NAMING, question=question, answer=answer, solution=solution
            )
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
    }
    return rows_to_table(list(rows.values()), "problems"), counts


def find_columns(
    path: Path,
    row: Row,
    *,
    naming: str,
    question: str | None = None,
    answer: str | None = None,
    solution: str | None = None,
) -> Columns:
    """The columns of a file, as given or found by their usual names in its first row.

    Args:
        path: the file.
        row: its first row.
        naming: how the user names columns, for the remedy.
        question, answer, solution: the names given.

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
    if columns.answer is None and columns.solution is None:
        raise missing_column(
            path, f"an answer column (one of {list(ANSWER_COLUMNS + SOLUTION_COLUMNS)})", row, naming
        )
    return columns


def problem_of(row: Row, columns: Columns, *, where: str, source: str) -> Row:
    """One row of a file as a row of kind "problems".

    Raises:
        IncompleteRow: the row has no question or no answer.
    """
    question = storable(question_text(lookup(row, columns.question)))
    if not question:
        raise _incomplete(where, "question", columns.question)
    answer, solution = _answer_and_solution(row, columns)
    answer, solution = storable(answer), None if solution is None else storable(solution)
    if not answer:
        raise _incomplete(where, "answer", columns.answer or f"the last \\boxed{{}} of {columns.solution}")
    used = {columns.question, columns.answer, columns.solution, columns.domain, columns.difficulty}
    domain = lookup(row, columns.domain) if columns.domain else None
    level = lookup(row, columns.difficulty) if columns.difficulty else None
    metadata = {
        name: value
        for name, value in row.items()
        if name not in used and isinstance(value, (str, int, float)) and len(str(value)) <= MAX_METADATA_CHARS
    }
    if level is not None:
        metadata["level"] = str(level)
    return {
        "id": content_id("problem", question, answer),
        "source": source,
        "question": question,
        "answer": answer,
        "solution": solution,
        "domain": storable(str(domain)) if domain else None,
        "difficulty": difficulty_of(level),
        "metadata": storable(json.dumps(metadata, ensure_ascii=False)),
    }


def lookup(row: Row, name: str) -> Any:
    """The value of a column, or inside an object by a dotted name; None where it is absent."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def first_present(row: Row, names: Sequence[str]) -> str | None:
    """The first of the names that the row has a value for."""
    return next((name for name in names if lookup(row, name) is not None), None)


PROBLEMS_NAMING: Final = "problems.question=COLUMN problems.answer=COLUMN"
TEACHER_NAMING: Final = "teacher.question=COLUMN teacher.answer=COLUMN teacher.response=COLUMN"
SOURCE_NAMING: Final = "'sources=[{name: NAME, path: FILE, question: COLUMN, answer: COLUMN, response: COLUMN}]'"
EVALUATION_NAMING: Final = "question: COLUMN in its entry of decontamination.sets"
"""How columns are named where a file is read from."""


def missing_column(path: Path, wanted: str, row: Row, naming: str) -> UserError:
    """The error for a column that a file lacks; it lists what is there and says how columns are named."""
    return UserError(
        f"{path} lacks {wanted}; its columns are {sorted(row)}",
        rule="the columns of question and answer are found by their usual names or are given",
        remedy=f"name them: {naming} (a dotted name reaches into an object)",
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


def split_final_line(text: str) -> tuple[str, str] | None:
    """A worked answer that ends in `#### n` or `A: n`, as (worked part, n); None for other text."""
    worked, _, last_line = text.rstrip().rpartition("\n")
    found = _FINAL_LINE.fullmatch(last_line)
    if found is None:
        return None
    number = found[1].strip()
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    return worked.strip(), number


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with balanced braces; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        escaped = text[position - 1] == "\\"
        if text[position] == "{" and not escaped:
            depth += 1
        elif text[position] == "}" and not escaped:
            depth -= 1
        if depth == 0:
            return text[start:position].strip()
    return None


def _answer_and_solution(row: Row, columns: Columns) -> tuple[str, str | None]:
    raw_solution = lookup(row, columns.solution) if columns.solution else None
    solution = str(raw_solution) if isinstance(raw_solution, str) and raw_solution.strip() else None
    answer = answer_text(lookup(row, columns.answer)) if columns.answer else ""
    split = split_final_line(answer) if columns.answer else split_final_line(solution or "")
    if split is not None:
        worked, answer = split
        return answer, solution or worked or None
    if not columns.answer and solution is not None:
        answer = last_boxed(solution) or ""
    return answer, solution


def question_text(value: Any) -> str:
    """A question; of a list of chat messages the last one of the user."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user"]
        value = turns[-1].get("content") if turns else None
    return value.strip() if isinstance(value, str) else ""


_TEXT_OF: Final[dict[type, Callable[[Any], str]]] = {
    str: str.strip,
    int: str,
    float: lambda number: str(int(number)) if number.is_integer() else repr(number),
}


def answer_text(value: Any) -> str:
    """An answer as text: 142.0 is "142", a list of one element is the element."""
    if isinstance(value, list):
        return ", ".join(answer_text(item) for item in value)
    convert = _TEXT_OF.get(type(value))
    return convert(value) if convert else ""


def _incomplete(where: str, part: str, column: str) -> IncompleteRow:
    return IncompleteRow(
        f"{where} has no {part} ({column})",
        rule="every problem has a question and an answer",
        remedy="correct or remove the row, or name other columns",
    )


def _stem(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.stem
