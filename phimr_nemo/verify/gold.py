"""Reference answers of which any one is right, as one text: a JSON array of texts, as Skywork-OR1 has them.

`["\\\\frac{1}{2}", "0.5"]` are two spellings of one answer, and a response that gives either is right. An array of
numbers, `[1, 2]`, is an interval or a list and stays one answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

MAX_ALTERNATIVES: Final = 16
"""More are no spellings of one answer; the others are not looked at."""


def alternatives(answer: str) -> tuple[str, ...]:
    """The answers of which any is right; one of the text itself where it is no JSON array of texts."""
    text = answer.strip()
    if not (text.startswith("[") and text.endswith("]") and '"' in text):
        return (answer,)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return (answer,)
    if not values or not all(isinstance(value, str) for value in values):
        return (answer,)
    given = tuple(dict.fromkeys(value.strip(" ") for value in values if value.strip()))
    return given[:MAX_ALTERNATIVES] or ("",)


def any_of(answers: Sequence[str]) -> str:
    """One text for answers of which any is right; an answer alone stays as it is."""
    given = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    return given[0] if len(given) == 1 else json.dumps(given, ensure_ascii=False) if given else ""
