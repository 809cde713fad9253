"""Reference answers of which any one is right, as one text: a JSON array of texts, as Skywork-OR1 has them.

`["\\\\frac{1}{2}", "0.5"]` are two spellings of one answer, and a response that gives either is right. So are
Python's `['1/2', '0.5']`, as tables hold lists that were written as text. An array of numbers, `[1, 2]`, is an
interval or a list and stays one answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

MAX_ALTERNATIVES: Final = 16
"""More are no spellings of one answer; the others are not looked at."""
_PYTHON_TEXT: Final = r"'(?:[^'\\\n]|\\.)*'"
_PYTHON_LIST: Final = re.compile(rf"\[\s*{_PYTHON_TEXT}(?:\s*,\s*(?:{_PYTHON_TEXT}|None))*\s*\]")


def alternatives(answer: str) -> tuple[str, ...]:
    """The answers of which any is right; one of the text itself where it is no array of texts. Null is none."""
    text = answer.strip()
    if not (text.startswith("[") and text.endswith("]") and ('"' in text or "'" in text)):
        return (answer,)
    try:
        values = _python_texts(text) if _PYTHON_LIST.fullmatch(text) else json.loads(text)
    except (ValueError, RecursionError):
        return (answer,)
    if not values or not all(isinstance(value, str) or value is None for value in values):
        return (answer,)
    given = tuple(dict.fromkeys(value.strip(" ") for value in values if value is not None and value.strip()))
    return given[:MAX_ALTERNATIVES] or ("",)


def _python_texts(text: str) -> list[str]:
    """The texts of a list as Python prints it; a backslash that was not doubled stays one, as in LaTeX."""
    return [re.sub(r"\\([\\'])", r"\1", found[1:-1]) for found in re.findall(_PYTHON_TEXT, text)]


def any_of(answers: Sequence[str]) -> str:
    """One text for answers of which any is right; an answer alone stays as it is."""
    given = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    return given[0] if len(given) == 1 else json.dumps(given, ensure_ascii=False) if given else ""
