r"""Find the final answer in a response, in time linear in its length, without interpreting it.

Order of preference: the last ``\boxed``, then a phrase that announces the answer ("The answer is",
"####", "A:"), then the last value of the closing sentences of a finished response. Only the text
after the end of the thinking counts. Of a response that is known to be cut off only what is complete counts: a
closed box, or an announcement that another sentence follows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from phimr_nemo.text.turn import visible_text
from phimr_nemo.verify.boxes import BOX_COMMANDS, Box, boxes_of
from phimr_nemo.verify.read.names import words
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

CUT_OFF: Final = "the response was cut off before an answer was complete"
MAX_MISSING_BRACES: Final = 3
MAX_BOX_JOIN_CHARS: Final = 60
TAIL_CHARS: Final = 4096
CLOSING_CHARS: Final = 1200
CLOSING_SENTENCES: Final = 8
MAX_BARE_CHARS: Final = 300
MAX_BARE_TEXT: Final = 40
MAX_BARE_WORDS: Final = 3
MAX_BARE_CJK: Final = 4
_WORD_IN_FRONT = re.compile(r"[A-Za-z]{2,}[,:]?\s+[^\s=]|.{0,40}[.:]\s+[A-Za-z]{2,}\s")
_DERIVING: Final = frozenset(words("so thus hence therefore then since because"))
_NEGATED = re.compile(
    r"\b(?:cannot|can't|not|isn't|never)\s+(?:be\s+|equal\s+(?:to\s+)?)?\$?[-−]?[0-9][0-9.,/]*[^0-9]*$"
)
_NONE_SUCH = re.compile(
    r"\bthere (?:is|are|exists?) no\b|\bno (?:such )?(?:integer|number|value|solution)s?\b", re.IGNORECASE
)
_QUALIFIED = re.compile(
    r"(?:\bat (?:most|least)|\b(?:greater|less|more|fewer|larger|smaller|bigger|higher|lower) than(?: or equal to)?"
    r"|\b(?:multiples?|factors?|divisors?|one|power|root|half|third|quarter|square|cube|most|elements?|members?) of"
    r"|\bdivisible by|\b(?:up|close|not equal) to|\b(?:anything|nothing|everything|all) but|\bother than"
    r"|\b(?:above|below|over|under|near|nearly|almost|twice|except|exceeds?|exceeding)"
    r"|\b(?:not|never|can't|cannot|isn't|aren't)(?: be)?"
    r"|\bbetween\b[^.]{0,40}\band)\s*[$\\(]*\s*(?:\{[^{}]{0,80})?\Z",
    re.IGNORECASE,
)
_COMPARED = re.compile(
    r"\s*[$)\\]*\s*(?:(?:or|if|unless)\b|(?:more|less|fewer|greater|larger|smaller) than\b|times (?:as|more|the)\b)",
    re.IGNORECASE,
)
_NO_SOLUTION = re.compile(
    r"\bno (?:real |integer |such )?(?:solutions?|values?|numbers?)(?: exists?)?$", re.IGNORECASE
)
_ENDS_IN_CLAIM = re.compile(r"\b(?:is|are|equals)\s+(?:\$[^$]*\$|\\\([^$]*\\\))\s*$")
_ASKS = re.compile(r"\s*(?:what|which|how|find|is|are|does|do|can|could|write|determine|compute)\b", re.IGNORECASE)
_HEDGE = re.compile(r"(?<=[0-9)$}])\s*,?\s+(?:but|because|since|which|where|(?:and )?not|rather than|instead of)\b")
_OPEN_BRACE = re.compile(r"(?<!\\)\{")
_CLOSED_BRACE = re.compile(r"(?<!\\)\}")
_LIST_ITEM = re.compile(r"\s*(?:[-*•]|[0-9]{1,2}[.)])\s+\S")
_SPACES = re.compile(r"[ \t]{2,}")
_CUT_OFF = re.compile(r"[=+\-*/^_({,:]\s*$")

_SPECIAL_TOKENS = re.compile(r"<\|[A-Za-z_]{1,40}\|>|</?s>|</?(?:answer|solution)>")
_BOX_JOIN = re.compile(
    r"[\s$.)\]\\]*(?:,|;|、|&|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|和|或)"
    r"[\s$(\[\\]*(?:,|;|and\b|or\b)?[\s$(\[\\]*(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?[\s$]*"
)
_BOX_BEGINS = re.compile(r"\\(?:box(?:ed)?|fbox)\s*\{?\s*\Z")
_MARKERS = re.compile(
    r"\#{4}(?!\#)[ \t]*(?=[^\n])"
    r"|(?:(?<=\n)|(?<![\s\S]))[ \t]*(?:[^\w\s\\$]{1,8}[ \t]*)?"
    r"(?:(?:A|final)(?=[*]{0,2}[ \t]*[:：])|(?:the[ \t]+)?(?:final[ \t]+|correct[ \t]+)?(?:ans(?:wer)?|result))"
    r"(?:\*\*)?(?:[ \t]*[:：.][ \t]*(?:\*\*)?|[ \t]+[-–—][ \t]+|[ \t]*(?:\*\*)?[ \t]*\n)"
    r"|答案?[ \t]*(?:(?<=案)[ \t]*(?:是|为|选)|[：:])+"
    r"|\banswers[ \t]+are(?=[ \t]*[-$\\(0-9])"
    r"|\b(?:final[ \t]+)?(?:answer|option|choice)(?:[ \t]+(?:for|to|of)[ \t][^\n.:]{1,80}?)?[ \t]*(?:\*\*)?[ \t]*"
    r"(?:is|are|=|:|：|(?:should|must|would|could|may|might) be)(?![A-Za-z])(?:\*\*)?",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?:(?i:option|choice|answer)[ \t]*\(?(?P<named>[A-J])\)?[ \t]+(?i:is|are)[ \t]+(?i:the[ \t]+)?"
    r"(?i:correct|right|best|true))"
    r"|(?<!if )(?<!whether )(?<!that )\b(?P<said>[A-J])\)?[ \t]+is[ \t]+"
    r"the[ \t]+(?:(?:only[ \t]+)?(?:correct|right|best)[ \t]+(?:answer|option|choice)|answer(?=[ \t]*(?:[.!]|$|\n)))"
    r"|\b[Cc]hoose[ \t]+(?:(?i:option|choice|answer)[ \t]+)?\(?(?P<told>[A-J])\)?(?=[ \t]*(?:[.!]|$|\n))"
    r"|\bI(?:'d|[ \t]+would|[ \t]+will)?[ \t]+(?:choose|pick|select|go[ \t]+with)[ \t]+"
    r"(?i:option|choice|answer)?[ \t]*\(?(?P<picked>[A-J])\)?(?![A-Za-z])"
    r"|\b[iI]t(?:'s|[ \t]+is|[ \t]+must[ \t]+be|[ \t]+should[ \t]+be)[ \t]+(?i:option|choice)?[ \t]*"
    r"\(?(?P<it>[A-J])\)?(?=[ \t]*(?:[.!]|$|\n))"
    r"|(?:故|应|因此|所以)?(?:选择?|选项)[ \t]*(?:是|为)?[ \t]*[:：]?[ \t]*\(?(?P<chinese>[A-J](?:[、,，]?[A-J])*)\)?"
)
_LETTER_FIRST = re.compile(r"\s*\(?(?P<letter>[A-J])(?:\)|[.:]|\)[.:])\s+[A-Z][a-z]")
_ADVERB = re.compile(
    r"(?:surely|clearly|definitely|obviously|therefore|simply|thus|indeed|probably|just|exactly|option|choice"
    r"|most likely)\s+",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<answer>(.{0,20000}?)</answer>", re.DOTALL | re.IGNORECASE)
_CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|answer|result|conclude|follows|finally|solution|equals|value)\b", re.IGNORECASE
)
_PLAIN_EQUATION = re.compile(
    r"(?<![\w(\\])([A-Za-z](?:_\w{1,3})?(?:\([a-z]\))?\s*=\s*(?:(?![A-Za-z]{3}|\*\*)[^=,;]){1,80})$"
)
_STRAY_DOLLAR = re.compile(r"^.*\\\$\s*=\s*", re.DOTALL)
_FOR_ALL = re.compile(r"\s*,?\s*\bfor (?:all|every|any)\b.*$")
_MATH = re.compile(
    r"\$\$(?P<display>[^$]{1,2000})\$\$|\\\[(?P<bracket>.{1,2000}?)\\\]"
    r"|\\\((?P<paren>.{1,2000}?)\\\)|(?<![\\$])\$(?P<inline>(?:[^$\n\\]|\\.){1,2000})\$(?![0-9])",
    re.DOTALL,
)
_SENTENCE_END = re.compile(r"(?<=[a-zA-Z0-9)}$%\]*])[.!?](?:\*\*)?(?=\s|$)|\n|。")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.^√])[-−]?√?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:π|√[0-9]+)?(?:/[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?%?"
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


def final_answer(response: str, *, is_cut_off: bool = False) -> Extraction:
    """The final answer of a model's response.

    Args:
        response: the whole response, thinking included.
        is_cut_off: it is known to have ended at the token limit and not by itself.

    Returns:
        The answer; with an empty `text` and a reason in `how` when there is none.
    """
    text = visible_text(response)
    if text is None:
        return Extraction("", how="the thinking never ended")
    if not text.strip():
        return Extraction("", how="the response is empty")
    tagged = _TAGGED.findall(text)
    if tagged and tagged[-1].strip():
        return _in_text(tagged[-1].strip(), whole=True)
    ended = not response.endswith(text)  # a token that ends the turn follows
    return _in_begun(text) if is_cut_off and not ended else _in_text(text, whole=False)


def _in_begun(text: str) -> Extraction:
    """The answer in a text that was cut off: a closed box, or an announcement in a sentence before the last."""
    none = Extraction("", how=CUT_OFF)
    boxes = boxes_of(text)
    if boxes:
        rest = text[boxes[-1].end :].strip()
        more = _BOX_JOIN.fullmatch(rest) or _BOX_BEGINS.search(rest)
        whole = bool(rest) or (boxes[-1].is_closed and text.rstrip().endswith("}"))
        return _from_boxes(text, boxes) if whole and not more else none
    tail = _tail(text)
    ends = [match.end() for match in _SENTENCE_END.finditer(tail) if match.end() < len(tail)]
    announced = _announced(tail[: ends[-1]]) if ends else None
    again = any(match.end() == len(tail) for match in _MARKERS.finditer(tail))
    return none if announced is None or again or announced != _announced(tail) else announced


def _in_text(text: str, *, whole: bool) -> Extraction:
    """The answer in a text; where `whole`, the text is the answer unless it announces one."""
    boxes = boxes_of(text)
    if boxes:
        return _from_boxes(text, boxes)
    tail = _tail(text)
    announced = _announced(tail)
    if announced is not None:
        return announced
    if len(text) <= MAX_BARE_CHARS and (whole or _is_bare(tail.strip())):
        value = tail.strip() if whole else _trim_phrase(tail).removesuffix("$")
        if whole and not _is_bare(value):
            value = _closing_value(value.rstrip(".") + ".") or value
        return Extraction(value, how="bare")
    closing = _closing_value(tail)
    if closing:
        return Extraction(closing, how="closing")
    return Extraction("", how="no final answer in the response")


def _tail(text: str) -> str:
    return _SPECIAL_TOKENS.sub(" ", _SPACES.sub(" ", text[-TAIL_CHARS:])).rstrip()


def _announced(tail: str) -> Extraction | None:
    """The answer that a phrase announces, or the letter that a sentence chooses."""
    marked = _after_marker(tail)
    if marked:
        return Extraction(marked, how="marker")
    chosen = _chosen_letter(tail)
    return Extraction(chosen, how="choice") if chosen else None


def _is_bare(text: str) -> bool:
    """Whether a text is nothing but an answer: one line or formula, with hardly any words."""
    formula = _MATH.fullmatch(text)
    if formula:
        return True
    if "\n" in text or not text:
        return False
    if any(command in text for command in BOX_COMMANDS) or len(re.findall("[\u4e00-\u9fff]", text)) > MAX_BARE_CJK:
        return False
    found = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\text\{[^{}]*\}", "", text))
    if re.search(r"[0-9]|\\[A-Za-z]", text):
        in_front = _WORD_IN_FRONT.match(text) is not None
        derived = any(word.lower() in _DERIVING for word in found)
        return len(found) <= MAX_BARE_WORDS and not in_front and not derived and not _CUT_OFF.search(text)
    if re.fullmatch(r"[*]{0,2}\(?[A-Za-z]\)?[.:]?[*]{0,2}", text):
        return True
    return 0 < len(found) <= 2 and not re.search(r"\bI\b|[.?!:]\s*$", text) and len(text) <= MAX_BARE_TEXT


def _chosen_letter(tail: str) -> str:
    """The letter that a sentence chooses, the last one that does."""
    found = list(_CHOSEN.finditer(tail))
    if found:
        return found[-1].group(found[-1].lastgroup or 0)
    first = _LETTER_FIRST.match(tail)
    return first["letter"] if first and len(tail) <= MAX_BARE_CHARS else ""


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed`` or ``\fbox`` of a worked solution holds, boxes that it joins together; else None."""
    boxes = boxes_of(text)
    if not boxes or not boxes[-1].is_closed:
        return None  # one that never closes was cut off, perhaps in the middle of a number
    return _from_boxes(text, boxes).text or None


def gold_answer(answer: str) -> str:
    """The gold answer itself, from a bare answer or from a worked solution that ends in one.

    Braces that a source has cut off at the end are put back.
    """
    found = _gold_answer(answer)
    missing = len(_OPEN_BRACE.findall(found)) - len(_CLOSED_BRACE.findall(found))
    return found + "}" * missing if 0 < missing <= MAX_MISSING_BRACES else found


def _gold_answer(answer: str) -> str:
    answer = answer.strip()
    boxes = boxes_of(answer)
    if boxes:
        return _from_boxes(answer, boxes).text
    if "####" in answer:
        return answer.rsplit("####", 1)[1].strip()
    if "\n" in answer:
        marked = _after_marker(_SPACES.sub(" ", answer[-TAIL_CHARS:]))
        if marked:
            return marked
    return answer


def _from_boxes(text: str, boxes: list[Box]) -> Extraction:
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
        value = _trim_phrase(_following(tail, match.end()))
        if value.lower() in _NO_ANSWERS:
            continue
        if value and (re.search(r"[0-9]|\\[A-Za-z]|^\(?[A-Za-z]\)?\b", value) or len(value.split()) <= 3):
            return value
    return ""


def _following(tail: str, start: int) -> str:
    """The rest of the line, with the next one: a formula may stand there."""
    rest = tail[start:].lstrip()
    lines = [line for line in rest.lstrip(":：* \n").split("\n") if line.strip()]
    if len(lines) > 1 and all(_LIST_ITEM.match(line) for line in lines[:2]):
        return ""  # a list of several results announces none of them
    if rest.lstrip(":：* \n").startswith(("$$", r"\[")):
        return rest.lstrip(":：* \n")
    line, _, more = rest.partition("\n")
    after = more.lstrip()
    return (
        line
        if line.strip("*_ :") and not line.rstrip().endswith(("$", "("))
        else line + "\n" + after.partition("\n")[0]
    )


def _trim_phrase(phrase: str) -> str:
    """Cut a phrase down to the value that it starts with: a formula, a bold part, else its first sentence."""
    phrase = (
        _ADVERB.sub("", phrase.strip().lstrip(":：*").strip(), count=1) if _ADVERB.match(phrase.strip()) else phrase
    )
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
    sentence = _HEDGE.split(_SENTENCE_END.split(phrase, maxsplit=1)[0], maxsplit=1)[0]
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
    if tail.endswith("?"):
        sentences = sentences[:-1]  # a question claims nothing
    for sentence in reversed(sentences[-CLOSING_SENTENCES:]):
        if _NEGATED.search(sentence) or (_NONE_SUCH.search(sentence) and not _NO_SOLUTION.search(sentence)):
            continue
        if _NUMBER.search(sentence):
            return _value_in_sentence(sentence)
        if _ASKS.match(sentence):
            continue
        nothing = _NO_SOLUTION.search(sentence)
        if nothing:
            return nothing.group()
        if _ENDS_IN_CLAIM.search(sentence) or _CONCLUDES.search(sentence):
            formulas = [match for match in _MATH.finditer(sentence) if match.lastgroup]
            if formulas:
                return formulas[-1].group(formulas[-1].lastgroup or 0).strip()
            equation = _PLAIN_EQUATION.search(_FOR_ALL.sub("", sentence.strip()))
            if equation:
                return equation.group(1).strip()
    return ""


def _value_in_sentence(sentence: str) -> str:
    """The value a sentence claims: what follows its last "is" or equals sign, else its last value."""
    formulas = [match for match in _MATH.finditer(sentence) if match.lastgroup]
    equation = None if formulas else _PLAIN_EQUATION.search(_FOR_ALL.sub("", sentence.strip()))
    if equation and re.search(r"=.*[A-Za-z]", equation.group(1)) and not _PROSE.search(equation.group(1)):
        return equation.group(1).strip()
    covered = [match.span() for match in formulas]

    def outside(match: re.Match[str]) -> bool:
        return not any(start <= match.start() < end for start, end in covered)

    values = sorted([*formulas, *filter(outside, _NUMBER.finditer(sentence))], key=lambda match: match.start())
    claims = [match for match in _LAST_CLAIM.finditer(sentence) if outside(match)]
    after = [value for value in values if claims and value.start() >= claims[-1].end()]
    ends_in_equation = values[-1] in formulas and "=" in values[-1].group()
    chosen = after[0] if after and not ends_in_equation else values[-1]
    qualified = _QUALIFIED.search(sentence[: chosen.start()])
    if qualified or _COMPARED.match(sentence[chosen.end() :]):
        # A bound or a comparison, which says more than its number.
        start = qualified.start() if qualified else chosen.start()
        return sentence[start:].strip()[:MAX_ANSWER_CHARS]
    return _STRAY_DOLLAR.sub("", chosen.group(chosen.lastgroup or 0)).strip()
