r"""What stands around a question and is not the question: instructions, answer formats, headings, numbers, points.

By rule: a first or last sentence that tells how to answer ("Let's think step by step and output the final answer
within \boxed{}.", "The last line of your response should be ..."), a heading ("**Problem:**", "### Response:"), a
number ("12.", "Problem 3:") and points ("(5 points)", "[4]"). Learned: what many questions of one source begin or
end with, cut at the end of a sentence, a colon or a line; a source may have several such wrappers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from phimr_nemo.text.turn import last_user_turn

MAX_SEGMENTS: Final = 12
"""Sentences of instructions before, or after, a question."""
MAX_STARTS: Final = 6
"""Where a last sentence may begin: a formula or a bracket may end within it."""
TAIL_CHARS: Final = 700
"""Patterns with a choice of where to end see no more than so many characters at either end: files are untrusted."""
MAX_POINTS_CHARS: Final = 40
LEARNED_SHARE: Final = 0.1
LEARNED_ROWS: Final = 5
LEARNED_WORDS: Final = 4
MAX_LEARNED_WORDS: Final = 80
MAX_LEARNED: Final = 16
BOUNDARY_SHARE: Final = 0.9

# Empty, or with a word for what belongs there.
_BOX: Final = (
    r"\\(?:boxed|fbox)\s*"
    r"(?:\{\s*(?:\.\.\.|…|(?:(?:the|your|final|correct) ){0,3}(?:answer|result|solution|number)?)\s*\})?(?!\s*\{)"
)
_TELLS: Final = (
    r"put|place|present|return|give|write|output|enclos\w*|provide|express|box\w*|state|include|report|wrap\w*"
)
_THING: Final = r"(?:final |correct |numerical )?(?:answer|response|result|solution|output)"
_HOW_TO_ANSWER: Final = re.compile(
    "|".join(
        (
            r"(?:please |now |you should |you must )?(?:let'?s |let us )?(?:think|reason|solve|work|proceed|go)\b"
            r"[^.:]{0,60}\bstep[- ]by[- ]step\b.*",
            r"(?:please |and |then |make sure (?:to|that you) |be sure to |remember to |you (?:should|must) )?"
            rf"(?:{_TELLS})\b.*{_BOX}.*",
            r"(?:(?:and|then|the|your|please|only|final|correct|finally|you|should|must|also|make|sure|that) ){0,6}"
            rf"(?:(?:{_TELLS}) )?(?:(?:the|your|final) ){{0,3}}(?:answer|result|response|solution)\b.*{_BOX}.*",
            rf"[$'\"]*{_BOX}[$'\"]*(?:\.|$).*",
            r"请.*(?:逐步|一步一步|一步步|\\boxed).*",
            r"(?:please |kindly )?(?:carefully )?(?:solve|answer|consider|complete|work out) "
            r"(?:the following|(?:the|this|these|following)(?: following)?(?: \w+){0,3}? "
            r"(?:problems?|questions?|exercises?|tasks?))"
            r"(?: (?:step by step|carefully|below|efficiently and clearly|by reasoning"
            r"|(?:with)?in(?:side)? the (?:\w+ )?tags))*"
            rf"(?:,? and (?:{_TELLS}) (?:the|your) {_THING})?\s*[.:!]?",
            r"(?:the )?(?:last|final) line of (?:your|the) (?:response|answer|reply|output) (?:should|must)\b.*",
            r"'?therefore,? the final answer is\b.*",
            r"i hope it is correct\b.*",
            r"\$?answer\b.{0,40}(?:without quotes|is (?:just )?the (?:final )?answer).*",
            r"where \$?answer is\b.*",
            rf"(?:remember|make sure|be sure|do not forget|don't forget) to (?:{_TELLS}|end|finish)\b.*",
            r"think (?:step by step|carefully|hard)\b.*",
            r"(?:please )?(?:show|explain) (?:all )?(?:your|the) (?:work|working|reasoning|steps)\b.*",
            r"(?:please )?explain (?:step by step|your reasoning)\b.*",
            # In whatever language: an empty box, or tags, in a sentence without a number or an equation.
            rf"(?=[^\W\d_].*{_BOX})(?!.*[\d=+?？]).*",
            r"(?=[^\W\d_].*</?(?:answer|think)>)(?!.*[\d=+?？]).*",
            r"['\"](?:the )?(?:final )?answer:",
            r"\$?\\?(?:boxed)?\{?\w+\}?\$?['\"]? \(without quotes\).*",
            r"(?:can|could|would|will) you (?:please )?(?:help me )?(?:to )?(?:solve|answer|work out)\b[^?]{0,60}"
            r"\b(?:it|this|this one|(?:the |this )?(?:problem|question)|(?:the|this) following[^?]{0,30})\s*[?:]",
            r"(?:i have|here(?: is|'s)|this is|below is|the following is) (?:a|an|the|my|one|your) (?:\w+ ){0,3}?"
            r"(?:problem|question|task|exercise)(?: (?:for you|to solve|below))?\s*[:.]",
            r"as an? (?:\w+[ -]){0,4}(?:assistant|mathematician|expert|tutor|solver|teacher)(?: \w+){0,3}, "
            r"(?:please )?(?:solve|answer|consider)\b[^.:?]{0,60}[.:]",
            r"think for (?:up to |at most |about |exactly )?[\d,]+ (?:tokens|words)\b.*",
            r"a conversation between (?:a )?user and (?:an? )?assistant\b.*",
            r"the (?:user|assistant)\b.{0,40}\b(?:asks a question|thinks about the reasoning process)\b.*",
            r"you are (?:a|an) (?:\w+[ -]){0,4}(?:assistant|mathematician|expert|tutor|solver|teacher)\b.*",
            r"below is an instruction that describes\b.*",
            r"write a response that appropriately completes\b.*",
            r"your role as an assistant\b.*",
        )
    ),
    re.IGNORECASE | re.DOTALL,
)
# Another base, unit or precision is another question.
_ANSWER_FORMAT: Final = re.compile(
    r"(?!.*\b(?:base|nearest|decimals?|round|percent\w*|terms of|units?|cents|inches|feet|the form|modulo|degrees)\b)"
    rf"(?:(?:please )?(?:{_TELLS}|round|leave|simplify) (?:the|your|all) {_THING}s?\b.*"
    rf"|(?:your|the) {_THING} (?:should|must) be\b.*"
    rf"|(?:the )?{_THING} (?:is|will be) an? (?:[\w-]+ )?integer (?:between|from|in)\b.*"
    r"|\((?:\w+ ){0,3}answers? (?:in|as|to)\b[^()]{0,80}\))",
    re.IGNORECASE | re.DOTALL,
)
# Whole questions within a pair of marks.
_WITHIN: Final = re.compile(
    r"\s*(?:<(?P<tag>problem|question|math_problem|query|task|instruction|input|prompt|user|p|div|span)>(?P<tagged>.*)"
    r"</(?P=tag)>|```\w*\n(?P<fenced>.*)\n```|(?P<bold>\*\*|__)(?P<strong>(?:(?!\*\*|__).)*)(?P=bold)"
    r"|(?P<quote>[\"“])(?P<quoted>[^\"“”]*)[\"”])\s*",
    re.IGNORECASE | re.DOTALL,
)
_BREAK: Final = re.compile(r"<br\s*/?>", re.IGNORECASE)
# What turns a model's thinking on or off.
_SWITCH: Final = re.compile(r"\A\s*(?:/(?:no_)?think|detailed thinking (?:on|off))\s|\s/(?:no_)?think\s*\Z")
# Where and when it was asked: "(AIME 2024 Problem 3)".
_ORIGIN: Final = re.compile(
    r"\s*[(\[（【](?=[^()\[\]（）]{0,80}\b(?:19|20)\d\d\b)(?=[^()\[\]（）]{0,80}[^\W\d_]{3})[^()\[\]$\\=（）]{4,80}[)\]）】]\s*"
)
# The question behind the last heading, where examples with their solutions stand before it or an instruction does.
_LABELLED: Final = re.compile(
    r"(?:^|\n)[ \t*_#>]*(?:problem|question|q|题目|问题)[*_]*[ \t]*[:：][*_]*[ \t]*(?=\S|\n)", re.IGNORECASE
)
_LABELLED_ANSWER: Final = re.compile(r"\n[ \t*_#>]*(?:answer|solution|a|答案|解答?)[*_]*[ \t]*[:：]", re.IGNORECASE)
_MARKS: Final = r"[*_#>\s\[\](]*"
_HEADING: Final = re.compile(
    rf"{_MARKS}(?:<\|?(?:im_start|user|begin_of_text|end|system)\|?>\s*(?:user|human)?"
    r"|(?:(?:math(?:ematical|ematics)?|word) )?"
    r"(?:problem|question|exercise|instruction|task|input|prompt|user|human|q)"
    rf"(?:\s*(?:statement|text))?[*_]*\s*[:：])(?:[*_]+(?=\s)|\s)\s*|{_MARKS}(?:题目|问题)[*_]*\s*[:：]\s*",
    re.IGNORECASE,
)
_CLOSING: Final = re.compile(
    r"(?:[*_#>\s]*(?:final |your )?(?:answer|solution|response|assistant|output|note|important|reminder|a)[*_]*"
    r"\s*[:：][*_]*"
    r"|\s*<\|?(?:im_end|end|assistant)\|?>)\s*\Z",
    re.IGNORECASE,
)
_NUMBERED: Final = re.compile(
    r"(?:[*#]{1,4}\s*)?(?:(?:problem|question|exercise|example|task|ex|q|no|#)\.?\s*#?\s*\d{1,4}(?:\.\d{1,3})?[a-z]?"
    r"[*_]*\s*(?:[.:)\]-]|(?=\s*[(\[])|(?=\n))"
    r"|(?-i:[AB]\d|[IVX]{1,5})[.、)](?=\s+(?-i:[A-Z(\[$]))|\d{1,3}\*(?=\s+(?-i:[A-Z(\[$]))"
    r"|(?-i:One|Two|Three|Four|Five|Six|Seven|Eight|Nine|Ten)\s*[,、]\s+(?=(?-i:[A-Z(\[$]))"
    r"|(?:problem|question|exercise|example)\s+\d{1,4}(?:\.\d{1,3})?(?=\s+(?-i:[A-Z(\[$]))"
    r"|(?:例|第)?\s*\d{1,3}\s*[、.．)](?=\s*\S)(?!\d)|\(\d{1,3}\)(?=\s+[^\W\d_]|\s*\$)|\d{1,3}\.\d{1,3}\.(?=\s))(?:\*\*)?\s*",
    re.IGNORECASE,
)
_POINTS: Final = re.compile(
    r"\s*[(\[（【]\s*(?:(?:worth|total)\s+)?\d{1,3}(?:\s*[-–]?\s*(?:points?|pts?|marks?|分))?\s*[)\]）】]\s*",
    re.IGNORECASE,
)
_POINTS_AT_END: Final = re.compile(
    r"\s*[(\[（【]\s*(?:(?:worth|total)\s+)?\d{1,3}\s*[-–]?\s*(?:points?|pts?|marks?|分)\s*[)\]）】]\s*\Z",
    re.IGNORECASE,
)
_FIRST_SEGMENT: Final = re.compile(r"[^\n]{1,700}?(?:(?<=[.!?:。！：])(?:\s+|\Z)|(?=\n))\s*")
# A sentence may follow a question without a full stop.
_SEGMENT_START: Final = re.compile(
    r"(?:(?<=[.!?:。！？$)\]}])[ \t]+|\n"
    r"|(?P<inside>[ \t](?:and[ \t]|then[ \t])?)(?=(?:please|let'?s (?:think|reason|solve)|remember to|make sure"
    r"|(?:put|return|present|give|write|output|provide|enclose|box) (?:the|your)|(?:think|reason) step)\b|请))(?=\S)",
    re.IGNORECASE,
)
_SENTENCE_WITHIN: Final = re.compile(r"[.?!]['\")]*\s+\S|\n")
_WORDS: Final = re.compile(r"\n|[^\s]+")
_ENDS_SEGMENT: Final = re.compile(r"[.!?:。！？：][*_'\")]*\Z")


@dataclass(frozen=True)
class Wrappers:
    """What many questions of one source begin and end with, as their words.

    Attributes:
        prefixes, suffixes: the longest first.
    """

    prefixes: tuple[tuple[str, ...], ...] = ()
    suffixes: tuple[tuple[str, ...], ...] = ()


NO_WRAPPERS: Final = Wrappers()


def without_instructions(text: str) -> str:
    """A question without the sentences around it that tell how to answer, and without its headings.

    What it asks for stays: answer formats, numbers and points are taken off by :func:`bare_question` alone.
    """
    return _stripped(_asked(text), (_HOW_TO_ANSWER,))


def bare_question(text: str, wrappers: Wrappers = NO_WRAPPERS) -> str:
    """A question as it is compared: without anything that only stands around it."""
    bare = _stripped(_without(_BREAK.sub("\n", _asked(text)), wrappers), (_HOW_TO_ANSWER, _ANSWER_FORMAT))
    inner = _unwrapped(bare)
    bare = bare if inner == bare else _stripped(inner, (_HOW_TO_ANSWER, _ANSWER_FORMAT))
    numbered = _NUMBERED.match(bare)
    rest = bare[numbered.end() :] if numbered else bare
    origin = _ORIGIN.match(rest)
    rest = rest[origin.end() :] if origin else rest
    points = _POINTS.match(rest)
    # A bracket with a number alone may be a formula, but not after a number of the problem.
    if points and (numbered or _POINTS_AT_END.match(points[0].rstrip())):
        rest = rest[points.end() :]
    at_end = _POINTS_AT_END.search(rest, max(0, len(rest) - MAX_POINTS_CHARS))
    rest = rest[: at_end.start()] if at_end else rest
    return _stripped(rest, (_HOW_TO_ANSWER, _ANSWER_FORMAT)) if _has_words(rest) else bare


def _asked(text: str) -> str:
    """The question of a prompt: the user's turn of a rendered chat, and of that what follows the examples in it."""
    turn = _SWITCH.sub("", last_user_turn(text)).strip()
    labels = list(_LABELLED.finditer(turn)) if ":" in turn or "：" in turn else []
    if not labels:
        return turn
    first = _FIRST_SEGMENT.match(turn.lstrip())
    instructed = first is not None and _is_wrapping(first[0], (_HOW_TO_ANSWER,))
    exemplified = len(labels) > 1 and _LABELLED_ANSWER.search(turn, labels[0].end(), labels[-1].start())
    rest = turn[labels[-1].end() :]
    return rest if (instructed or exemplified) and _has_words(rest) else turn


def _unwrapped(text: str) -> str:
    """A text without the pair of marks that all of it stands in."""
    found = _WITHIN.fullmatch(text) if text.startswith(tuple('<`*_"“')) else None
    inner = (
        next((found[name] for name in ("tagged", "fenced", "strong", "quoted") if found[name]), "") if found else ""
    )
    return inner.strip() if _has_words(inner) else text


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _stripped(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    """The text without first and last segments that a pattern matches whole; the text itself if nothing is left."""
    left = text.strip()
    for _ in range(MAX_SEGMENTS):
        shorter = _shorter(left, patterns)
        if shorter == left or not _has_words(shorter):
            break
        left = shorter
    return left


def _shorter(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    heading = _HEADING.match(text)
    if heading and heading.end():
        text = text[heading.end() :]
    first = _FIRST_SEGMENT.match(text)
    if first and first.end() < len(text) and _is_wrapping(first[0], patterns):
        return text[first.end() :].strip()
    tail = max(0, len(text) - TAIL_CHARS)
    closing = _CLOSING.search(text, tail)
    if closing and closing.start():
        text = text[: closing.start()].rstrip()
        tail = max(0, len(text) - TAIL_CHARS)
    starts = list(_SEGMENT_START.finditer(text, tail))[-MAX_STARTS:]
    end = len(text)
    for start in reversed(starts):
        segment = text[start.end() :]
        if _SENTENCE_WITHIN.search(segment):
            break
        # What a question asks for ("Simplify and write the result as ...") is wrapping in a sentence of its own only.
        if _is_wrapping(segment, (_HOW_TO_ANSWER,) if start["inside"] else patterns):
            end = start.start()
    return text[:end].strip()


def _is_wrapping(segment: str, patterns: Sequence[re.Pattern[str]]) -> bool:
    plain = segment.strip().strip("*_#> \n")
    return any(pattern.fullmatch(plain) for pattern in patterns)


def learn_wrappers(questions: Sequence[str]) -> Wrappers:
    """What many questions of a source have in common at either end.

    A wrapper has at least `LEARNED_WORDS` words, is in at least `LEARNED_ROWS` questions and a share of
    `LEARNED_SHARE` of them, ends (begins) where a sentence or line does, and is not all of a question.
    """
    words = [_WORDS.findall(question.strip()) for question in questions]
    backwards = [list(reversed(one)) for one in words]
    return Wrappers(_common(words, at_end=False), _common(backwards, at_end=True))


def _common(words: Sequence[list[str]], *, at_end: bool) -> tuple[tuple[str, ...], ...]:
    needed = max(LEARNED_ROWS, LEARNED_SHARE * len(words))
    found: list[tuple[str, ...]] = []
    left = [one for one in words if len(one) > LEARNED_WORDS]
    while len(left) >= needed and len(found) < MAX_LEARNED:
        best = _longest(left, needed, at_end)
        if best is None:
            break
        found.append(best)
        left = [one for one in left if tuple(one[: len(best)]) != best]
    ordered = sorted(found, key=len, reverse=True)
    return tuple(tuple(reversed(one)) for one in ordered) if at_end else tuple(ordered)


def _longest(words: Sequence[list[str]], needed: float, at_end: bool) -> tuple[str, ...] | None:
    """The longest frequent beginning that ends at a boundary."""
    alive = list(words)
    best: tuple[str, ...] | None = None
    for size in range(1, MAX_LEARNED_WORDS + 1):
        # A wrapper leaves something of every question.
        alive = [one for one in alive if len(one) > size]
        counts = Counter(tuple(one[:size]) for one in alive)
        common = {prefix for prefix, count in counts.items() if count >= needed}
        alive = [one for one in alive if tuple(one[:size]) in common]
        if not alive:
            break
        if size >= LEARNED_WORDS:
            fitting = [prefix for prefix in common if _at_boundary(prefix, alive, at_end)]
            best = max(fitting, key=lambda prefix: counts[prefix], default=best)
    return best


def _at_boundary(prefix: tuple[str, ...], words: Sequence[list[str]], at_end: bool) -> bool:
    if sum(word != "\n" for word in prefix) < LEARNED_WORDS:
        return False
    following = [one[len(prefix)] for one in words if tuple(one[: len(prefix)]) == prefix]
    if not at_end:
        ends = _ENDS_SEGMENT.search(prefix[-1]) is not None
        return ends or sum(word == "\n" for word in following) >= BOUNDARY_SHARE * len(following)
    edges = sum(word == "\n" or _ENDS_SEGMENT.search(word.rstrip("$")) is not None for word in following)
    return edges >= BOUNDARY_SHARE * len(following)


def _without(text: str, wrappers: Wrappers) -> str:
    """The text without the learned wrappers."""
    for words, pattern in ((wrappers.prefixes, r"\A\s*{}\s*"), (wrappers.suffixes, r"\s*{}\s*\Z")):
        for one in words:
            found = re.search(pattern.format(r"\s+".join(re.escape(word) for word in one if word != "\n")), text)
            if found and found[0] != text:
                text = text[: found.start()] + text[found.end() :]
                break
    return text
