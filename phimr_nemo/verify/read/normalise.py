r"""Bring an answer as people and models write it into one plain LaTeX dialect, as text.

Everything here is string work on at most `MAX_ANSWER_CHARS` characters with regular expressions that
cannot backtrack badly; nothing is evaluated. What comes out has no ``\left``/``\right``, no spacing
commands, braces around every argument, ``\text{...}`` for words, and ASCII digits only.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from phimr_nemo.verify.read.determinants import with_values
from phimr_nemo.verify.read.names import FUNCTIONS, GLUABLE, KNOWN, TRIGONOMETRIC
from phimr_nemo.verify.read.numerals import number_of_words

CANONICAL_CACHE: Final = 4096
MAX_INFIX: Final = 16
"""Infix commands of one answer that are read; one with more is no answer that anybody writes."""
_UNICODE: Final = {
    **{ord(a): b for a, b in zip("−–—×·⋅÷≤≥≠≈∞π√∪∩∅∈°％≡→", (
        "-", "-", "-", r"\times ", r"\cdot ", r"\cdot ", r"\div ", r"\leq ", r"\geq ", r"\neq ", r"\approx ",
        r"\infty ", r"\pi ", r"\sqrt", r"\cup ", r"\cap ", r"\emptyset ", r"\in ", r"^\circ ", r"\%",
        r"\equiv ", r"\to ",
    ), strict=True)},
    **{ord(a): b for a, b in zip("αβγδεθλμρσφωτ", (
        r"\alpha ", r"\beta ", r"\gamma ", r"\delta ", r"\epsilon ", r"\theta ", r"\lambda ", r"\mu ",
        r"\rho ", r"\sigma ", r"\phi ", r"\omega ", r"\tau ",
    ), strict=True)},
    **{ord(a): b for a, b in zip("½⅓⅔¼¾", (
        r"\frac{1}{2}", r"\frac{1}{3}", r"\frac{2}{3}", r"\frac{1}{4}", r"\frac{3}{4}",
    ), strict=True)},
    ord("\u00a0"): " ", ord("\u2009"): " ", ord("\u202f"): " ", ord("\u200b"): "",
    **{0xFF01 + offset: chr(0x21 + offset) for offset in range(94) if chr(0x21 + offset) not in "%<>"},
    ord("＜"): "<", ord("＞"): ">", ord("、"): ",", ord("⁄"): "/", ord("∕"): "/", 
    ord("≦"): r"\leq ", ord("≧"): r"\geq ",
    ord("ℝ"): r"\mathbb{R}", ord("‑"): "-", ord("。"): ".", ord("\ufeff"): "", ord("\u2060"): "",
}  # fmt: skip
_SUPERSCRIPTS: Final = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS: Final = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_LETTER_CONSTANTS: Final = frozenset("dei")
_TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|sf|tt)|mbox|hbox|operatorname\*?)"
_TEXT = re.compile(_TEXT_COMMAND + r"\s*\{([^{}]*)\}")
_ROMAN_UNIT = re.compile(r"(?<=[0-9}) ~,])\\(?:mathrm|text|rm)\s*\{((?:[^{}\\]|\\[,; ~]|\\cdot|\{[-0-9]+\}){1,60})\}")
_OLD_FONT = re.compile(r"\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}|\\(?:rm|bf|it)(?![a-zA-Z])")
_SEGMENTS = re.compile(r"(\\text\{[^{}]*\})")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_SIMPLE: Final = (
    (re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:quad|qquad|thinspace|enspace|space)(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:hspace|vspace|hphantom|phantom|label|tag|color)\*?\{[^{}]*\}"), " "),
    (re.compile(r"\\textcolor\s*\{[^{}]*\}\s*\{([^{}]*)\}|\\underline\s*\{([^{}]*)\}"), r"\1\2"),
    (re.compile(r"\\(?:checkmark|blacksquare|qed)(?![a-zA-Z])"), " "),
    (re.compile(r"(?<!\\)\\[!/]"), ""),
    (re.compile(r"(?<!\\)(?:\\[,;:> ]|~)"), " "),
    (re.compile(r"_\s*\{?\s*\\(?:odot|oplus)\s*\}?"), "_{o}"),
    (re.compile(r"\\(?:d|t|c)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:d|t)binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\leq?(?:slant)?(?![a-zA-Z])"), r"\\leq "),
    (re.compile(r"\\geq?(?:slant)?(?![a-zA-Z])"), r"\\geq "),
    (re.compile(r"\\neq?(?![a-zA-Z])"), r"\\neq "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"<="), r"\\leq "),
    (re.compile(r">="), r"\\geq "),
    (re.compile(r"!="), r"\\neq "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![a-zA-Z])"), "["),
    (re.compile(r"\\rbrack(?![a-zA-Z])"), "]"),
    (re.compile(r"\\[lr]?vert(?![a-zA-Z])"), "|"),
    (re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:infinity)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\var(epsilon|theta|phi)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\(?:vec|hat|overrightarrow|mathbf|boldsymbol|bm)\s*\{\s*\\?([ijk])(?:math)?\s*\}"), r"\\hat{\1}"),
    (re.compile(r"\\(?:vec|hat|mathbf)\s*\\([ij])math(?![a-zA-Z])"), r"\\hat{\1}"),
    (re.compile(r"\\(?:vec|overrightarrow|math(?:bf|it|normal|cal)|boldsymbol|bm)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"_\s*\{\s*\\text\{([^{}]*)\}\s*\}"), r"_{\1}"),
    (re.compile(r"_\s*\\text\{([^{}]*)\}"), r"_{\1}"),
    (re.compile(r"(?<=[0-9])\s*\^?\s*\{?\s*\\text\{(?:st|nd|rd|th)\}\s*\}?"), " "),
    (re.compile(r"(?<=[0-9])(?:st|nd|rd|th)(?![A-Za-z])"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<=[0-9A-Za-z)}\]])\s*\*\s*(?=[0-9A-Za-z(\\\[])"), r"\\cdot "),
    (re.compile(r"\^\s*(-\s*[0-9]+|[0-9]{2,})"), r"^{\1}"),
    (re.compile(r"_\s*([0-9]+)"), r"_{\1}"),
    (re.compile(r"\^\s*\(([^()]{1,80})\)"), r"^{\1}"),
)
_BRACED_ARRAY = re.compile(
    r"\\left\s*\\(?:\{|lbrace)\s*\\begin\{(?:array|aligned|matrix|split|align\*?)\}(?:\s*\{[lcr|\s]*\})?([^\0]*?)"
    r"\\end\{(?:array|aligned|matrix|split|align\*?)\}\s*\\right(?:\s*\.|\s*$)"
)
_QUANTIFIED = re.compile(
    r"\s*(?:\\text\{)?\s*,?\s*\bfor (?:all|every|any)(?: real| integers?| positive)?(?:[ }]|\\text\{).{0,60}$"
)
_CJK = re.compile("[\u4e00-\u9fff]")
_MATHEMATICAL = re.compile("[0-9=<>\u2460-\u2473]")
_CIRCLED = re.compile(r"(?<=[\u2460-\u2473])\s*(?=[\u2460-\u2473])")
_CHINESE_OR = re.compile(r"\s*(?:或者?|还是)\s*")
_CHINESE_AND = re.compile(r"\s*(?:和|与|以及|且)\s*")
_CHINESE_TEXT = re.compile(r"\\text\{\s*(或者?|和|与|且|以及)\s*\}")
_FRACTION_FORMS: Final = (
    (re.compile(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9a-zA-Z])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*([0-9a-zA-Z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\sqrt\s*([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\binom\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])"), r"\\binom{\1}{\2}"),
)
_THOUSANDS = re.compile(r"(?<![0-9.])([0-9]{1,3})((?:(?:'|\\[,!;: ]|\{,\}\\?!?|,\\!\s?|~)[0-9]{3})+)(?![0-9])")
_SPACED_MILLIONS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?: [0-9]{3}){2,}(?![0-9])")
_THOUSANDS_GAP = re.compile(r"[^0-9]")
_TIGHT_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_GROUPED = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
_INFIX = re.compile(r"\\(over|choose)(?![a-zA-Z])")
_INFIX_COMMANDS: Final = {"over": r"\frac", "choose": r"\binom"}
_INFINITIES: Final = {
    "infinity": r"\infty ",
    "positive infinity": r"\infty ",
    "negative infinity": r"-\infty ",
    "+infinity": r"\infty ",
    "-infinity": r"-\infty ",
}
_MIXED_PLAIN = re.compile(r"(?<![0-9./])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9])")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]([-+]?[0-9]{1,4})(?![0-9A-Za-z.])")
_REPEATING = re.compile(
    r"(?<![0-9.])([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,20})\}|([0-9]))"
)
_DEGREES = re.compile(r"(?<![0-9.])([0-9]+(?:\.[0-9]+)?)\s*\^\\circ ")
_PLAIN_WORDS: Final = (
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|oo|Infinity)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![\\A-Za-z])(pi|theta|sqrt|sin|cos|tan|cot|ln|log|arcsin|arccos|arctan)(?![A-Za-z])"), r"\\\1 "),
)
_POWER_OF_FUNCTION = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|ln|log))\s*\^\s*\{?\s*([0-9])\s*\}?\s+"
    r"([0-9]+(?:\.[0-9]+)?)(?![0-9.^])"
)
_ROOT_PARENTHESES = re.compile(r"\\sqrt\s*\(([^()]{1,200})\)")
_WRAPPERS: Final = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_TEXT_ALONE = re.compile(r"^\\text\s*\{([^{}]*)\}$")
_LEADING = re.compile(r"^(?:[=:≈]|\\approx|\\therefore)\s*")


@lru_cache(maxsize=CANONICAL_CACHE)
def canonical(answer: str) -> str:
    r"""The answer in the plain dialect, ``"\dfrac12 \,\text{cm}."`` -> ``"\frac{1}{2} \text{cm}"``."""
    text = _unwrap(answer)
    spoken = number_of_words(_TEXT_ALONE.sub(r"\1", text)) if " and " in text else None
    if spoken is not None:
        return str(spoken)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.translate(_UNICODE)
    if "matrix" not in text and "array" not in text and "cases" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", lambda _: "\\", text)
    text = text.replace("\n", " ").replace("\t", " ")
    text = _CIRCLED.sub(",", text)
    if _CJK.search(text) and _MATHEMATICAL.search(text):
        text = _CHINESE_TEXT.sub(r"\1", text)
        text = _CHINESE_AND.sub(r" \\text{and} ", _CHINESE_OR.sub(r" \\text{or} ", text))
    text = _OLD_FONT.sub(lambda m: rf"\text{{{m.group(1)}}}" if m.group(1) else "", text)
    text = _SPACED_MILLIONS.sub(lambda m: m.group().replace(" ", ""), text)
    text = _THOUSANDS.sub(lambda m: m.group(1) + _THOUSANDS_GAP.sub("", m.group(2)), text)
    text = _ROMAN_UNIT.sub(_roman_unit, text)
    text = _TEXT.sub(_text_segment, text)
    text = _BRACED_ARRAY.sub(r"\\begin{cases}\1\\end{cases}", text)
    for pattern, replacement in _SIMPLE:
        text = pattern.sub(replacement, text)
    text = _COMMAND.sub(_unglue, text)
    text = "".join(
        segment if segment.startswith(r"\text{") else _plain_segment(segment) for segment in _SEGMENTS.split(text)
    )
    text = _prefixed(text)
    for pattern, replacement in _FRACTION_FORMS:
        text = pattern.sub(replacement, text)
    text = _ROOT_PARENTHESES.sub(r"\\sqrt{\1}", text)
    text = _POWER_OF_FUNCTION.sub(r"\1^{\2}{\3}", text)
    if any(rf"\{name}" in text for name in TRIGONOMETRIC):
        text = _DEGREES.sub(r"{\\frac{\1\\pi}{180}}", text)
    return with_values(_strip_edges(_QUANTIFIED.sub("", re.sub(r"\s+", " ", text))))


def key(text: str) -> str:
    """A canonical answer without what never carries meaning, for comparison as text."""
    text = re.sub(r"([_^])\{([0-9a-zA-Z])\}", r"\1\2", text)
    text = re.sub(r"(?<=[0-9]) (?=[0-9])", "\0", text)
    return text.replace(" ", "").replace("\0", " ")


def without_grouping(text: str) -> str:
    """A canonical answer whose digits are in no groups: ``10,000\\pi`` -> ``10000\\pi``."""
    return _GROUPED.sub(lambda match: match.group().replace(",", ""), text)


def _prefixed(text: str) -> str:
    r"""TeX's infix commands as LaTeX's: ``{a \over b}`` -> ``{\frac{a}{b}}``, ``n \choose k`` -> ``\binom{n}{k}``."""
    for _ in range(MAX_INFIX):
        match = _INFIX.search(text)
        if match is None:
            break
        start, end = _group_around(text, match.start(), match.end())
        above, below = text[start : match.start()].strip(), text[match.end() : end].strip()
        text = f"{text[:start]}{_INFIX_COMMANDS[match[1]]}{{{above}}}{{{below}}}{text[end:]}"
    return text


def _group_around(text: str, left: int, right: int) -> tuple[int, int]:
    """Where the content of the innermost braces around a place begins and ends; the whole text has none."""
    depth, start = 0, 0
    for at in range(left - 1, -1, -1):
        escaped = at > 0 and text[at - 1] == "\\"
        if text[at] == "}" and not escaped:
            depth += 1
        elif text[at] == "{" and not escaped:
            if depth == 0:
                start = at + 1
                break
            depth -= 1
    depth, end = 0, len(text)
    for at in range(right, len(text)):
        escaped = text[at - 1] == "\\"
        if text[at] == "{" and not escaped:
            depth += 1
        elif text[at] == "}" and not escaped:
            if depth == 0:
                end = at
                break
            depth -= 1
    return start, end


def _unwrap(text: str) -> str:
    """Strip the delimiters and markup around an answer."""
    text = text.strip()
    for _ in range(4):
        before = text
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            enclosed = bool(inner) and text.startswith(opening) and text.endswith(closing)
            if enclosed and opening not in inner and closing not in inner and not inner.endswith("\\"):
                text = inner.strip()
        text = text.rstrip(".,;:").strip() if not text.endswith("\\,") else text[:-2].strip()
        if text == before:
            break
    text = re.sub(r"(?<!\\)\$", "", text) if text.count("$") > 1 else text
    return text


def _strip_edges(text: str) -> str:
    text = text.strip()
    while text.endswith((".", ",", ";", ":", "\\")) and not text.endswith("\\\\"):
        text = text[:-1].rstrip()
    return _LEADING.sub("", text).strip()


def _roman_unit(match: re.Match[str]) -> str:
    """A unit with powers in braces, which then has none: ``m\\,s^{-2}`` -> ``m s^-2``."""
    content = match.group(1)
    if "{" not in content:
        return match.group()
    words = re.sub(r"\\[,; ~]", " ", content).replace("{", "").replace("}", "")
    words = re.sub(r"([A-Za-z]+)\^-([0-9])", r"/\1^\2", words)
    return rf"\text{{{words}}}"


def _text_segment(match: re.Match[str]) -> str:
    content = match.group(1)
    bare = content.strip()
    if bare in FUNCTIONS and not (bare == "min" and re.search(r"[0-9}]\s*$", match.string[: match.start()])):
        return rf"\{bare} "
    if bare.lower() in _INFINITIES:
        return _INFINITIES[bare.lower()]
    if re.fullmatch(r"[-+0-9.,:/()\u2460-\u2473]*", bare) or (
        bare in _LETTER_CONSTANTS and match.group().startswith(r"\mathrm")
    ):
        return bare
    return rf"\text{{{bare}}}"


def _unglue(match: re.Match[str]) -> str:
    r"""Split ``\piG`` into ``\pi G``: sources that strip spaces glue a command to what follows."""
    name = match.group(1)
    if name in KNOWN:
        return match.group()
    for prefix in GLUABLE:
        if name.startswith(prefix):
            return rf"\{prefix} {name[len(prefix) :]}"
    return match.group()


def _plain_segment(text: str) -> str:
    for pattern, replacement in _PLAIN_WORDS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"(?:(?<=,)|\s)(?:and|or|AND|OR)\s", lambda m: rf" \text{{{m.group().strip().lower()}}} ", text)
    text = _MIXED_PLAIN.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _SCIENTIFIC.sub(_scientific, text)
    if re.search(r"[,;]\s", text.strip(" ,;")):
        text = _TIGHT_COMMA.sub("", text)
    return text


def _scientific(match: re.Match[str]) -> str:
    return rf"{match.group(1)}\times 10^{{{int(match.group(2))}}}"


def _repeating_fraction(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` as ``\frac{15}{90}``: (all digits - those before the period) / 99..900..0."""
    whole, fixed, period = match.group(1) or "0", match.group(2), match.group(3) or match.group(4)
    numerator = int(whole + fixed + period) - int(whole + fixed)
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"
