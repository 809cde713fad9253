r"""Damage of texts, put right where there is no doubt: eaten or doubled backslashes, HTML entities, wrong encodings.

Text that is written into a JSON string by hand keeps `\frac` as the escape `\f` and "rac". A form feed, a backspace,
a vertical tab or a bell before the rest of a command can be nothing else. A tab, a newline or a carriage return may
be one, so these are read as part of a command only before a rest that starts no word (`imes`, `heta`, `eq`, `ight`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
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


EATEN: Final = "repaired: LaTeX without its backslash"
MAX_BARE_CHARS: Final = 40
"""A shorter cell is read as an answer."""
PICTURE: Final = "a picture in the question, which is not read"
_IMAGE: Final = re.compile(r"<image(?:_\d+)?>|<img\s|!\[[^\]]{0,200}\]\(|\[asy\]\s*\[/asy\]|\\includegraphics\b")
ENTITIES_WITHIN: Final = 2
"""So often a text may have been escaped: `&amp;lt;`."""
_ENTITY: Final = re.compile(
    r"&(?:lt|gt|amp|quot|apos|nbsp|times|divide|minus|plusmn|deg|le|ge|ne|pi|radic|infin|frac(?:12|14|34)|sup[123]"
    r"|middot|sdot|ndash|mdash|[lr][sd]quo|hellip|prime|theta|alpha|beta|sum|#\d{1,5}|#[xX][0-9a-fA-F]{1,4});"
)
_CP1252: Final = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_CONTINUED: Final = f"[\x80-\xbf{_CP1252}]"
# What a byte of UTF-8 before others looks like: of Latin-1 and Greek, of punctuation and signs, of full width. One
# letter of Chinese may be a word's end before a quotation mark, several are none.
_MOJIBAKE: Final = re.compile(f"[ÂÃÎÏ]{_CONTINUED}|[âï]{_CONTINUED}{{2}}|(?:[ã-é]{_CONTINUED}{{2}}){{2,}}")
_COMMANDS: Final = (
    "[dtc]?frac|sqrt|times|cdot|pi|theta|alpha|beta|boxed|begin|end|math[a-z]{2,4}|overline|angle|leq?|geq?|neq?|pm"
    "|infty|sum|int|left|right|text|circ|triangle|binom|lfloor|rfloor|log|ln|sin|cos|tan|ldots|dots|equiv|pmod"
)
_DOUBLED: Final = re.compile(rf"(?<!\\)\\\\(?:{_COMMANDS})(?![A-Za-z])|(?<!\\)\\\\[(\[](?!-?[\d.]+ ?[a-z]{{2}}\])")
_SINGLE: Final = re.compile(r"(?<!\\)\\(?:\\\\)*(?=[A-Za-z()\[\]])")
_UNICODE_ESCAPE: Final = re.compile(r"(?<!\\)(?:\\u[0-9a-fA-F]{4})+")
_LINE_BREAK: Final = re.compile(
    r"(?<!\\)(?:\\r)?\\n(?:(?=[^A-Za-z{]|\Z)|(?=[A-Z][a-z]* )(?!(?:Right|Left)arrow|Leftright|V))"
)


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


def shows_picture(question: str) -> bool:
    """Whether a picture stands in a question, of which only the reference is text."""
    return _IMAGE.search(question) is not None


def repair_entities(text: str) -> str:
    """The text with the characters that HTML entities stand for; code keeps its own."""
    if "&" not in text or "```" in text:
        return text
    plain = text
    for _ in range(ENTITIES_WITHIN):
        plain = _ENTITY.sub(lambda found: html.unescape(found[0]), plain)
    return plain


def repair_mojibake(text: str) -> str:
    """The text with UTF-8 that was read as Windows' Latin-1 read as what it is ("3Ï€", "90Â°", "itâ€™s")."""
    return text if text.isascii() else _MOJIBAKE.sub(_as_utf8, text)


def _as_utf8(found: re.Match[str]) -> str:
    raw = b"".join(one.encode("cp1252") if one in _CP1252 else one.encode("latin-1") for one in found[0])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return found[0]


def repair_escapes(text: str) -> str:
    r"""The text without escapes that its LaTeX has one too many of (`\\frac`), and what `\u03c0`, `\n` stand for.

    JSON text keeps them, and text that has line breaks keeps its `\n`, which may be a program's.
    """
    if "\\" not in text or text.lstrip().startswith(("{", "[")):
        return text
    if _DOUBLED.search(text) and not _SINGLE.search(text):
        text = text.replace("\\\\", "\\")
    if "```" not in text:
        text = _UNICODE_ESCAPE.sub(_as_characters, text)
    return text if "\n" in text else _LINE_BREAK.sub("\n", text)


def _as_characters(found: re.Match[str]) -> str:
    read: str = json.loads(f'"{found[0]}"')
    # Half of a pair, or a control character, is no character that was meant.
    return read if read.isprintable() else found[0]


def repair_text(text: str, *, answer: bool = False) -> tuple[str, frozenset[str]]:
    """A text with all that is known to be damage put right, and what that was."""
    kinds = set()
    for kind, repair in _REPAIRS.items():
        repaired = repair(text)
        if repaired != text:
            kinds.add(kind)
            text = repaired
    text, count = repair_latex(text, answer=answer)
    return text, frozenset(kinds | {EATEN} if count else kinds)


def repair_value(value: Any) -> tuple[Any, frozenset[str]]:
    """A cell, a row or a list of them with :func:`repair_text` in every text, and what was repaired."""
    if isinstance(value, str):
        return repair_text(value, answer=len(value) <= MAX_BARE_CHARS)
    if isinstance(value, dict):
        repaired = {name: repair_value(one) for name, one in value.items()}
        kinds = frozenset[str]().union(*(kinds for _, kinds in repaired.values()))
        return ({name: one for name, (one, _) in repaired.items()} if kinds else value), kinds
    if isinstance(value, (list, tuple)):
        parts = [repair_value(one) for one in value]
        kinds = frozenset[str]().union(*(kinds for _, kinds in parts))
        return ([one for one, _ in parts] if kinds else value), kinds
    return value, frozenset()


_REPAIRS: Final[Mapping[str, Callable[[str], str]]] = {
    "repaired: characters written as HTML entities": repair_entities,
    "repaired: UTF-8 that was read as Latin-1": repair_mojibake,
    "repaired: escapes within escapes": repair_escapes,
}
