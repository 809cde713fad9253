"""Values of a row's columns: found by (dotted) names, also inside JSON text, and read as a question or an answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Final

from phimr_nemo.data.sources.damage import repair_text, repair_value
from phimr_nemo.data.sources.rawfiles import Row
from phimr_nemo.text.turn import last_user_turn
from phimr_nemo.verify.extract import final_answer, last_box
from phimr_nemo.verify.gold import alternatives, any_of

# GSM8K ends a worked answer with "#### 18", OpenAI's recorded solutions of it with "A: 18".
_FINAL_LINE: Final = re.compile(r"[ \t]*(?:####|A:)[ \t]*(\S.*)")
_THOUSANDS: Final = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
# Not the points within numbers, of abbreviations, or in LaTeX.
_SENTENCE_END: Final = re.compile(r"[^\W\d_]{2,}[)\"'$]*[.!?。！？](?:\s|\Z)|\d\.(?:\s+[A-Z]|\Z)")
_WORD: Final = re.compile(r"(?<![\\{\w])[^\W\d_]{2,}")
_ANNOUNCES: Final = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer\b", re.IGNORECASE
)
MAX_BARE_SOLUTION_CHARS: Final = 60
"""A longer solution that marks no answer is a worked one."""
MAX_BARE_WORDS: Final = 40
"""A longer answer is a worked one."""
MISSING_WORDS: Final = frozenset(("nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "N/A", "n/a"))
"""What numpy, JSON, Python and pandas write for a value that is not there."""
NO_ANSWER_WORDS: Final = frozenset(
    (
        "proof",
        "notfound",
        "not found",
        "see solution",
        "unknown",
        "no answer",
        "n.a.",
        "-",
        "--",
        "–",
        "—",
        "?",
        "...",
    )
)
"""What people and sets (NuminaMath, and what was made of it) write where an answer should be, in lower case."""
USER_ROLES: Final = ("user", "human")
ASSISTANT_ROLES: Final = ("assistant", "gpt")


def lookup(row: Row, name: str) -> Any:
    """The value of a column, or by a dotted name inside an object or a JSON text; None where it is absent.

    A column whose own name has dots comes first. In a list of objects (chat messages) the last one counts that has
    a value there.
    """
    return row[name] if name in row else _reach(row, name.split("."))


def _reach(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, str):
        value = json_value(value)
    if isinstance(value, dict):
        return _reach(value.get(parts[0]), parts[1:])
    if isinstance(value, (list, tuple)):
        found = (_reach(one, parts) for one in reversed(value) if isinstance(one, dict))
        return next((one for one in found if one is not None), None)
    return None


def json_value(text: str) -> Any:
    """The object or array that a text spells in JSON; None for other text."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return repair_value(json.loads(text))[0]
    except (ValueError, RecursionError):
        return None


def merged(rows: Sequence[Row]) -> Row:
    """One row with the first value that each column has in some rows, also inside objects."""
    whole: Row = {}
    for row in rows:
        for name, value in row.items():
            known = whole.get(name)
            if known is None:
                whole[name] = value
            elif isinstance(known, dict) and isinstance(value, dict):
                whole[name] = merged([known, value])
    return whole


def first_present(row: Row, names: Sequence[str]) -> str | None:
    """The first of the names (lower case) that the row has a value for; else one that differs in case alone."""
    exact = next((name for name in names if lookup(row, name) is not None), None)
    if exact is not None:
        return exact
    spelled = {column.lower(): column for column, value in row.items() if value is not None}
    return next((spelled[name] for name in names if name in spelled), None)


def question_text(value: Any) -> str:
    """A question; of chat messages, a list or the JSON text of one, and of a rendered chat the user's last turn."""
    if isinstance(value, str):
        spelled = json_value(value)
        if not (isinstance(spelled, list) and any(isinstance(turn, dict) for turn in spelled)):
            return last_user_turn(value).strip()
        value = spelled
    return last_user_turn(turn_text(value, USER_ROLES))


def turn_text(conversation: Any, roles: Sequence[str]) -> str:
    """The last turn of a role, in ShareGPT's words ("from", "value") or in chat's ("role", "content")."""
    text = ""
    for turn in conversation if isinstance(conversation, (list, tuple)) else ():
        if isinstance(turn, dict) and speaker(turn) in roles:
            text = content_text(turn.get("value", turn.get("content")))
    return text


def speaker(turn: Row) -> Any:
    """Whose turn it is, in the words of its set."""
    return turn.get("from", turn.get("role"))


def content_text(content: Any) -> str:
    """What a turn says: a text, or a list of parts that are all text (``{"type": "text", "text": ...}``)."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, (list, tuple)):
        return ""
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts).strip() if len(texts) == len(parts) else ""


def _number(number: float) -> str:
    if not math.isfinite(number):
        return ""
    return str(int(number)) if number.is_integer() else repr(number)


def _decimal(number: Decimal) -> str:
    """Parquet's fixed-point numbers, without the zeros that only fill their places."""
    if not number.is_finite():
        return ""
    digits = format(number, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


_TEXT_OF: Final[dict[type, Callable[[Any], str]]] = {str: str.strip, int: str, float: _number, Decimal: _decimal}


def answer_text(value: Any) -> str:
    """An answer as text; empty for one that is missing.

    142.0 is "142", of a list all elements that are there, "nan" and its like are missing, the texts of a JSON array
    are alternatives, and an object is no answer.
    """
    if isinstance(value, (list, tuple)):
        # A list within a list would lose what belongs together.
        if any(isinstance(item, (list, tuple, dict)) for item in value):
            return ""
        return ", ".join(text for text in map(answer_text, value) if text)
    convert = _TEXT_OF.get(type(value))
    text = convert(value) if convert else ""
    if text in MISSING_WORDS or text.lower() in NO_ANSWER_WORDS:
        return ""
    if text.startswith("{") and isinstance(json_value(text), dict):
        return ""
    if not text.startswith("["):
        return text
    if json_value(text) in ([], [None]):
        return ""
    return any_of([repair_text(one, answer=True)[0] for one in alternatives(text) if one not in MISSING_WORDS])


def sequence(value: Any) -> Sequence[Any]:
    """A list; one of a single text or object; empty for None."""
    if value is None:
        return []
    return value if isinstance(value, (list, tuple)) else [value]


def labels_of(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """The named columns that have a value."""
    return {name: row[name] for name in names if row.get(name) is not None}


def split_worked(text: str) -> tuple[str, str]:
    """An answer as (worked part, final answer): the worked part is empty for a bare one, the final one if unmarked.

    Text of several sentences is a worked answer, whose last box or announced value ("The final answer is 4.") is
    the final one. Whether a value in its last sentence is meant nobody can tell.
    """
    split = split_final_line(text)
    if split is not None:
        return split
    is_worked = len(_SENTENCE_END.findall(text)) > 1 or len(_WORD.findall(text)) > MAX_BARE_WORDS
    if not is_worked and not _ANNOUNCES.match(text):
        return "", text
    found = final_answer(text)
    final = found.text if found.how in ("box", "marker") else ""
    return (text, final) if is_worked else ("", final or text)


def bare_solution(solution: str) -> str:
    """The answer that a worked solution ends in, its last box; a short one that is a value is the answer itself."""
    boxed = last_box(solution)
    is_value = len(solution.split()) == 1 or any(one.isdigit() or one == "\\" for one in solution)
    return boxed or (
        solution if is_value and len(solution) <= MAX_BARE_SOLUTION_CHARS and "\n" not in solution else ""
    )


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
