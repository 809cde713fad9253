r"""Find the final answer in a response, in time linear in its length, without interpreting it.

Order of preference: the last ``\boxed``, then a phrase that announces the answer ("The answer is",
"####", "A:"), then the last value of the closing sentences of a finished response. Only the text
after the end of the thinking counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from phimr_nemo.text.thinking import KNOWN
from phimr_nemo.verify.read.names import words
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

BOX_COMMANDS: Final = ("\\boxed", "\\fbox")
MAX_BOXES: Final = 32
MAX_BOX_JOIN_CHARS: Final = 60
TAIL_CHARS: Final = 4096
CLOSING_CHARS: Final = 1200
CLOSING_SENTENCES: Final = 8

_SPECIAL_TOKENS = re.compile(r"<\|[A-Za-z_]{1,40}\|>|</?s>|</?(?:answer|solution)>")
_BOX_JOIN = re.compile(
    r"[\s$.)\]\\]*(?:,|;|、|&|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|和|或)"
    r"[\s$(\[\\]*(?:,|;|and\b|or\b)?[\s$(\[\\]*(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?[\s$]*"
)
_MARKERS = re.compile(
    r"\#{4}[ \t]*(?P<hash>[^\n]+)"
    r"|(?:^|\n)[ \t]*(?:\*\*)?(?:A|Answer|Final answer)(?:\*\*)?[ \t]*[:：](?P<line>[^\n]*\n?[^\n]*)"
    r"|答案[ \t]*(?:是|为|：|:)(?P<chinese>[^\n]*)"
    r"|\b(?:final[ \t]+)?(?:answer|option|choice)(?:[ \t]+(?:for|to)[ \t][^\n.:]{1,80})?[ \t]*(?:\*\*)?[ \t]*"
    r"(?:is|are|=|:|：|should be|must be|would be)(?:\*\*)?(?P<phrase>[^\n]*\n?\s*[^\n]*)",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\$\$(?P<display>[^$]{1,2000})\$\$|\\\[(?P<bracket>.{1,2000}?)\\\]"
    r"|\\\((?P<paren>.{1,2000}?)\\\)|(?<![\\$])\$(?P<inline>[^$\n]{1,2000})\$(?![0-9])",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"(?<=[a-zA-Z0-9)}$%\]*])[.!?](?:\*\*)?(?=\s|$)|\n|。")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^])[-−]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?%?"
    r"|(?<![0-9A-Za-z])[-−]?\.[0-9]+"
)
_FINISHED = re.compile(r"(?:[.!?。*$\"'”’`]|\\[\])])\s*$")
_CONCLUDING_LINE = re.compile(r"(?:^|\n)[^\n]*\b(?:so|therefore|thus|hence|total)\b[^\n]*[0-9%]\s*$", re.IGNORECASE)
_CHOICE_THEN_PROSE = re.compile(r"\(?([A-J])\)?(?:[.,;]\s|\s+(?:because|since|as|and not|not)\b)")
_PROSE = re.compile(r"(?:[A-Za-z']{2,}\s+){2}")
_LAST_CLAIM = re.compile(
    r"(?:=|≈|\b(?:is|are|be|equals|was|costs?|by|has|have)\b)(?:\s+(?:indeed|exactly|then|just))?"
)


_NO_ANSWERS: Final = frozenset(
    [
        *words("correct right wrong incorrect consistent valid reasonable clear confirmed fine good"),
        *("indeed correct", "as follows", "not correct"),
    ]
)


@dataclass(frozen=True)
class Extraction:
    """The final answer of a response.

    Attributes:
        text: the final answer as written; empty when there is none.
        parts: the boxes that make it up, when the response joins several ("\\boxed{1} and \\boxed{2}").
        boxes: every distinct box of the visible text, in order, for answers given in parts.
        how: "box", "marker", "closing" or why there is none.
    """

    text: str
    parts: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    how: str = ""


def visible_text(response: str) -> str | None:
    """The text after the thinking, without special tokens; None when the thinking never ended."""
    start = 0
    for _, closing in KNOWN:
        found = response.rfind(closing)
        if found >= 0:
            start = max(start, found + len(closing))
    if any(response.find(opening, start) >= 0 for opening, _ in KNOWN):
        return None
    return response[start:]


def final_answer(response: str) -> Extraction:
    """The final answer of a model's response.

    Args:
        response: the whole response, thinking included.

    Returns:
        The answer; with an empty `text` and a reason in `how` when there is none.
    """
    text = visible_text(response)
    if text is None:
        return Extraction("", how="the thinking never ended")
    if not text.strip():
        return Extraction("", how="the response is empty")
    boxes = _boxes(text)
    if boxes:
        return _from_boxes(text, boxes)
    tail = _SPECIAL_TOKENS.sub(" ", text[-TAIL_CHARS:]).rstrip()
    marked = _after_marker(tail)
    if marked:
        return Extraction(marked, how="marker")
    closing = _closing_value(tail)
    if closing:
        return Extraction(closing, how="closing")
    return Extraction("", how="no final answer in the response")


def gold_answer(answer: str) -> str:
    """The gold answer itself, from a bare answer or from a worked solution that ends in one."""
    answer = answer.strip()
    boxes = _boxes(answer)
    if boxes:
        return _from_boxes(answer, boxes).text
    if "####" in answer:
        return answer.rsplit("####", 1)[1].strip()
    if "\n" in answer:
        marked = _after_marker(answer[-TAIL_CHARS:])
        if marked:
            return marked
    return answer


@dataclass(frozen=True)
class _Box:
    start: int
    end: int
    content: str
    too_long: bool = False


def _boxes(text: str) -> list[_Box]:
    """The last boxes with content, first to last; nested boxes count once, as the inner one."""
    found: list[_Box] = []
    limit = len(text)
    commands = [command for command in BOX_COMMANDS if command in text]
    if not commands:
        return found
    for _ in range(MAX_BOXES):
        start, command = max((text.rfind(command, 0, limit), command) for command in commands)
        if start < 0:
            break
        limit = start
        box = _read_box(text, start, start + len(command))
        if box is not None and box.content and not (found and box.end >= found[-1].end):
            found.append(box)
    return found[::-1]


def _read_box(text: str, start: int, position: int) -> _Box | None:
    while position < len(text) and text[position] in " \t":
        position += 1
    if position >= len(text):
        return None
    if text[position] != "{":
        token = re.match(r"-?[0-9A-Za-z.,]+", text[position : position + MAX_ANSWER_CHARS])
        return _Box(start, position + token.end(), token.group().rstrip(".,")) if token else None
    depth, index = 0, position
    end = min(len(text), position + MAX_ANSWER_CHARS + 2)
    while index < end:
        character = text[index]
        if character == "\\":
            index += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return _Box(start, index + 1, text[position + 1 : index].strip())
        index += 1
    # The box never closes: what it holds up to the end of its formula or line.
    content = re.split(r"\$|\n|\\\]|\\\)", text[position + 1 : end], maxsplit=1)[0]
    return _Box(start, position + 1 + len(content), content.strip(), too_long=len(content) >= MAX_ANSWER_CHARS)


def _from_boxes(text: str, boxes: list[_Box]) -> Extraction:
    if boxes[-1].too_long:
        return Extraction("", how=f"the boxed answer is longer than {MAX_ANSWER_CHARS} characters")
    joined = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        gap = text[box.end : joined[0].start]
        if len(gap) > MAX_BOX_JOIN_CHARS or not _BOX_JOIN.fullmatch(gap):
            break
        joined.insert(0, box)
    parts = tuple(dict.fromkeys(box.content for box in joined))
    distinct = tuple(dict.fromkeys(box.content for box in boxes))
    return Extraction(", ".join(parts), parts=parts, boxes=distinct, how="box")


def _after_marker(tail: str) -> str:
    """The answer after the last phrase that announces one."""
    for match in reversed(list(_MARKERS.finditer(tail))):
        name = match.lastgroup or ""
        value = _trim_phrase(match.group(name))
        if value.lower() in _NO_ANSWERS:
            continue
        if value and (re.search(r"[0-9]|\\[A-Za-z]|^\(?[A-Za-z]\)?\b", value) or len(value.split()) <= 3):
            return value
    return ""


def _trim_phrase(phrase: str) -> str:
    """Cut a phrase down to the value that it starts with: a formula, a bold part, else its first sentence."""
    phrase = phrase.strip().lstrip(":：*").strip()
    formula = _MATH.match(phrase)
    if formula and formula.lastgroup:
        rest = phrase[formula.end() :].lstrip()
        joined = re.match(r"(?:,|and\b|or\b)", rest)
        if not joined:
            return formula.group(formula.lastgroup).strip().rstrip(".,")
    bold = re.match(r"\*\*(.{1,400}?)\*\*", phrase)
    if bold:
        return _trim_phrase(bold.group(1))
    sentence = _SENTENCE_END.split(phrase, maxsplit=1)[0]
    letter = _CHOICE_THEN_PROSE.match(sentence)
    if letter:
        return letter.group(1)
    if _PROSE.search(sentence) and _NUMBER.search(sentence):
        return _value_in_sentence(sentence)
    return sentence.replace("**", "").strip().rstrip(".,;")[:MAX_ANSWER_CHARS]


def _closing_value(tail: str) -> str:
    """The value that the closing sentences of a finished response state."""
    if not _FINISHED.search(tail) and not _CONCLUDING_LINE.search(tail):
        return ""
    sentences = [part for part in _SENTENCE_END.split(tail[-CLOSING_CHARS:]) if part and part.strip()]
    for sentence in reversed(sentences[-CLOSING_SENTENCES:]):
        if _NUMBER.search(sentence):
            return _value_in_sentence(sentence)
    return ""


def _value_in_sentence(sentence: str) -> str:
    """The value a sentence claims: what follows its last "is" or equals sign, else its last value."""
    formulas = [match for match in _MATH.finditer(sentence) if match.lastgroup]
    covered = [match.span() for match in formulas]

    def outside(match: re.Match[str]) -> bool:
        return not any(start <= match.start() < end for start, end in covered)

    values = sorted([*formulas, *filter(outside, _NUMBER.finditer(sentence))], key=lambda match: match.start())
    claims = [match for match in _LAST_CLAIM.finditer(sentence) if outside(match)]
    after = [value for value in values if claims and value.start() >= claims[-1].end()]
    ends_in_equation = values[-1] in formulas and "=" in values[-1].group()
    chosen = after[0] if after and not ends_in_equation else values[-1]
    return chosen.group(chosen.lastgroup or 0).strip()
