r"""LaTeX whose backslash was eaten by JSON or by a programming language, put back where there is no doubt.

Text that is written into a JSON string by hand keeps `\frac` as the escape `\f` and "rac". A form feed, a backspace,
a vertical tab or a bell before the rest of a command can be nothing else. A tab, a newline or a carriage return may
be one, so these are read as part of a command only before a rest that starts no word (`imes`, `heta`, `eq`, `ight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_REST_OF: Final = {
    "\f": "rac|orall|lat|box|loor|ootnotesize|rown|allingdotseq",
    "\b": r"eta|oxed|inom|egin|ar|ig[glr]?|igcup|igcap|igoplus|igtriangleup|f|mod|ullet|ot|oldsymbol|mathbf|ackslash"
    "|ecause|etween|owtie|reve|ox",
    "\v": "ec|ert|arepsilon|arphi|artheta|ee|dots|space|arnothing|phantom",
    "\a": "lpha|ngle|pprox|rc(?:sin|cos|tan)|st|symp|leph|ligned|cute|malg",
    "\t": r"imes|ext(?:bf|it|rm|tt|sf|style)?(?=\s*\{)|heta|riangle(?:left|right)?|herefore|frac|ilde|binom",
    # Not `eq1 = Eq(...)` and `eq = ...` of a program.
    "\n": r"(?<!\r\n)(?:eq(?!\w|\s*=)|abla|otin|ewline)",
    "\r": "ight(?:arrow)?",
}
# In a short answer no line starts with such a rest, in a question it may ("o", "angle").
_REST_IN_ANSWER: Final = {"\t": "anh?|au|op?", "\n": "eq|u|ot|mid|leq|geq", "\r": "ho|angle|floor|ceil|brace"}
_LETTER_OF: Final = {"\f": "f", "\b": "b", "\v": "v", "\a": "a", "\t": "t", "\n": "n", "\r": "r"}


def _compiled(rests: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(f"{re.escape(control)}(?:{rest})(?![A-Za-z])" for control, rest in rests.items()))


_EATEN: Final = _compiled(_REST_OF)
_EATEN_IN_ANSWER: Final = _compiled(
    {control: "|".join(filter(None, (rest, _REST_IN_ANSWER.get(control)))) for control, rest in _REST_OF.items()}
)
# What no text holds for its own sake. A form feed alone ends a page of a scanned book, and before letters it is what
# some PDFs leave of the ligature in "find".
_REMNANT: Final = re.compile(r"[\x07\x08\x0b](?=[A-Za-z])|\x0c(?=[A-Za-z]+\s*[{\\^_])")
_REMNANT_IN_ANSWER: Final = re.compile(r"[\x07\x08\x0b\x0c](?=[A-Za-z])")


MAX_BARE_CHARS: Final = 40
"""A shorter cell is read as an answer."""


def repair_latex(text: str, *, answer: bool = False) -> tuple[str, int]:
    """The text with the backslashes put back, and how many there were.

    Args:
        text: a question, a response or an answer.
        answer: it is a bare answer, in which no line starts with a word.
    """
    if not any(control in text for control in _LETTER_OF):
        return text, 0
    return (_EATEN_IN_ANSWER if answer else _EATEN).subn(
        lambda found: "\\" + _LETTER_OF[found[0][0]] + found[0][1:], text
    )


def is_damaged(question: str, answer: str) -> bool:
    """Whether a control character is left where something was eaten, and nobody knows what."""
    return _REMNANT.search(question) is not None or _REMNANT_IN_ANSWER.search(answer) is not None


def repair_value(value: Any) -> tuple[Any, int]:
    """A cell, a row or a list of them with :func:`repair_latex` in every text, and how much was repaired."""
    if isinstance(value, str):
        return repair_latex(value, answer=len(value) <= MAX_BARE_CHARS)
    if isinstance(value, dict):
        repaired = {name: repair_value(one) for name, one in value.items()}
        count = sum(number for _, number in repaired.values())
        return ({name: one for name, (one, _) in repaired.items()} if count else value), count
    if isinstance(value, (list, tuple)):
        parts = [repair_value(one) for one in value]
        count = sum(number for _, number in parts)
        return ([one for one, _ in parts] if count else value), count
    return value, 0
