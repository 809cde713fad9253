r"""Two forms of a question: the one that is stored, and the one that is compared.

Stored text is only cleaned (NFC, line ends, invisible characters): NFKC would turn x² into x2 and ½ into 1/2 for
the model to read. Compared text is NFKC, lower case, without LaTeX's spacing and dollar signs, as tokens with one
space between them, so that `\dfrac{1}{2}\,x` and `\frac12 x` of two sources are one question.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

NUMBER_MASK: Final = "#"

# Zero-width characters, soft hyphens, direction marks, byte order marks, fillers and tags: nobody sees them.
_INVISIBLE: Final = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\U000e0000-\U000e0fff]"
)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LINE_END: Final = re.compile(r"\r\n?|[\u2028\u2029]")
_SPACES: Final = " \t\u00a0"
_BLANK_LINES: Final = re.compile(r"\n{3,}")

# Commands that only move or size what they stand before.
_LATEX_LAYOUT: Final = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|nolimits|qquad|quad|bigl|bigr|Bigl|Bigr|big|Big|hfill|noindent)"
    r"(?![A-Za-z])|\\[,;:! ()\[\]]|(?<!\\)~|(?<!\\)\$"
)
_SIZED: Final = re.compile(r"\\[dtc](frac|binom)(?![A-Za-z])")
_DIGIT_PAIR: Final = re.compile(r"(\\(?:frac|binom))(\d)(\d)")
# MATH's 10,\!000 among them.
_THOUSANDS: Final = re.compile(r"(?<=\d)(?:,\\!|\\,|,|\{,\})(?=\d{3}(?!\d))")
_SINGLE_IN_BRACES: Final = re.compile(r"\{\s*([A-Za-z]|\d+(?:\.\d+)?|\\[A-Za-z]+)\s*\}")
# Commands that only choose a typeface.
_FACE: Final = (
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:bb|bf|cal|frak|it|rm|sf|scr|tt|normal)|mbox|emph|operatorname\*?"
    r"|boldsymbol|bm)(?![A-Za-z])"
)
_FACED: Final = re.compile(_FACE + r"\s*\{([^{}]*)\}")
_BARE_FACE: Final = re.compile(_FACE)
_ESCAPED: Final = re.compile(r"(?<!\\)\\([%&#_{}])")
_FUNCTION: Final = re.compile(
    r"\\(arc(?:sin|cos|tan)|(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|gcd|lcm|max|min|det|dim|deg)(?![A-Za-z])"
)
# A LaTeX command, a number, a word of an alphabet, or one other sign (a Chinese character is a sign).
_TOKEN: Final = re.compile(r"\\[a-z]+|\d+(?:\.\d+)?|[^\W\d_\u2e80-\u9fff\uac00-\ud7af]+|[^\s]")
_LAST_SIGNS: Final = frozenset(".?!:;。？！")
# fmt: off
_NUMBER_WORDS: Final = frozenset((
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty",
    "sixty", "seventy", "eighty", "ninety", "hundred", "thousand",
))
# fmt: on


_SUPERSCRIPT: Final = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPT: Final = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢ", "0123456789+-=()ni", strict=True))
_RAISED: Final = re.compile(f"[{''.join(_SUPERSCRIPT)}]+")
_LOWERED: Final = re.compile(f"[{''.join(_SUBSCRIPT)}]+")
# ½ and its like: NFKC writes 1⁄2, and 2½ would become 21/2.
_VULGAR_FRACTION: Final = re.compile("[¼-¾⅐-⅞↉]")


# Signs of text and LaTeX's commands for them: the first of each line is what the others are compared as.
_SIGNS: Final = {
    "-": "−–—‐‑‒﹣－",
    "'": "’‘′",
    '"': "“”″",
    "...": "…",
    "\\times": "×⨯",
    "\\cdot": "·⋅∙",
    "\\div": "÷",
    "\\le": "≤⩽≦",
    "\\ge": "≥⩾≧",
    "\\ne": "≠",
    "\\pm": "±",
    "\\infty": "∞",
    "\\sqrt": "√",
    "\\angle": "∠",
    "\\triangle": "△",
    "\\in": "∈",
    "\\cup": "∪",
    "\\cap": "∩",
    "^\\circ": "°",
    "\\pi": "π",
    "\\alpha": "α",
    "\\beta": "β",
    "\\gamma": "γ",
    "\\theta": "θ",
    "\\lambda": "λ",
    "\\omega": "ω",
    "\\delta": "δ",
    "\\Delta": "Δ",
    "\\epsilon": "εϵ",
    "\\zeta": "ζ",
    "\\eta": "η",
    "\\mu": "μµ",
    "\\nu": "ν",
    "\\rho": "ρ",
    "\\sigma": "σ",
    "\\Sigma": "Σ",
    "\\tau": "τ",
    "\\phi": "φϕ",
    "\\Phi": "Φ",
    "\\psi": "ψ",
    "\\chi": "χ",
    "\\Gamma": "Γ",
    "\\Omega": "Ω",
    "\\sum": "∑",
    "\\prod": "∏",
    "\\int": "∫",
    "\\equiv": "≡",
    "\\approx": "≈",
    "\\perp": "⊥",
    "\\parallel": "∥",
    "\\to": "→⟶",
    "\\lfloor": "⌊",
    "\\rfloor": "⌋",
    "\\lceil": "⌈",
    "\\rceil": "⌉",
    "\\subset": "⊂",
    "\\subseteq": "⊆",
}
_SIGN: Final = str.maketrans({sign: f" {said} " for said, signs in _SIGNS.items() for sign in signs})
_LONG_RELATION: Final = re.compile(r"\\(?:(l|g)eq(?:slant)?|neq)(?![A-Za-z])")
# LaTeX's own second names.
_OTHER_NAMES: Final = {
    r"\\(?:[lc]?dots|dots[cbmi])": "...",
    r"\\(?:rightarrow|longrightarrow)": r"\\to ",
    r"\\(?:[lr]?vert|mid)": "|",
    r"\\var(epsilon|phi|theta|rho|sigma)": r"\\\1",
}
_OTHER_NAME: Final = tuple((re.compile(f"{name}(?![A-Za-z])"), said) for name, said in _OTHER_NAMES.items())
_OTHER_DIGIT: Final = re.compile(r"(?![0-9])\d")


def spelled_out(text: str) -> str:
    """The text with superscripts as powers, subscripts as indices, and fractions of one sign as fractions.

    Unicode's compatibility form makes 102 of 10², x1 of x₁ and 21/2 of 2½.
    """
    text = _RAISED.sub(lambda found: f"^{{{''.join(_SUPERSCRIPT[one] for one in found[0])}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{''.join(_SUBSCRIPT[one] for one in found[0])}}}", text)
    return _VULGAR_FRACTION.sub(_as_fraction, text)


def _as_fraction(found: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    return f" \\frac{{{above}}}{{{below}}} "


def clean(text: str) -> str:
    """A question or answer as it is stored: NFC, newlines, no invisible or control characters, no stray spaces."""
    text = unicodedata.normalize("NFC", storable(text))
    text = _CONTROL.sub("", _INVISIBLE.sub("", _LINE_END.sub("\n", text)))
    lines = "\n".join(line.rstrip(_SPACES) for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", lines).strip()


def storable(text: str) -> str:
    """A text as it is, but for halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def comparison_tokens(text: str) -> list[str]:
    """The tokens by which questions are compared; final punctuation does not count.

    The result does not depend on letter case, on Unicode's compatibility forms, on spaces (LaTeX's among them), on
    dollar signs and `\\left`, on `\\dfrac` and `\\frac12` for `\\frac`, on signs for LaTeX's commands (≤ for `\\le`),
    on typefaces (`\\text`, `\\mathrm`), on the digits of other scripts, on braces around one letter,
    number or command, or on thousands separators.
    """
    return tokens_and_lines(text)[0]


def tokens_and_lines(text: str) -> tuple[list[str], frozenset[int]]:
    """:func:`comparison_tokens`, and the places among them at which a line of the text begins."""
    visible = spelled_out(_INVISIBLE.sub("", text))
    if not visible.isascii():
        visible = unicodedata.normalize("NFKC", visible.translate(_SIGN))
        visible = _OTHER_DIGIT.sub(lambda found: str(unicodedata.digit(found[0])), visible)
    visible = _LONG_RELATION.sub(lambda found: f"\\{found[1] or 'n'}e", visible)
    plain = _one_spelling(_LATEX_LAYOUT.sub(" ", _THOUSANDS.sub("", visible)))
    tokens: list[str] = []
    starts = []
    for line in plain.casefold().split("\n"):
        starts.append(len(tokens))
        tokens += _TOKEN.findall(line)
    while tokens and tokens[-1] in _LAST_SIGNS:
        tokens.pop()
    return tokens, frozenset(starts)


def _one_spelling(text: str) -> str:
    """LaTeX in one of its spellings: no typefaces, sizes, second names, or braces around what is one anyway."""
    if "\\" in text:
        text = _BARE_FACE.sub(" ", _FACED.sub(r" \1 ", text))
        for name, said in _OTHER_NAME:
            text = name.sub(said, text)
        text = _DIGIT_PAIR.sub(r"\1 \2 \3 ", _SIZED.sub(r"\\\1", _FUNCTION.sub(r" \1 ", text)))
    return _ESCAPED.sub(r"\1", _SINGLE_IN_BRACES.sub(r" \1 ", text))


def comparison_key(text: str) -> str:
    """The compared form as one text: equal for questions that differ only in what does not count."""
    return " ".join(comparison_tokens(text))


def mask_numbers(tokens: list[str]) -> list[str]:
    """The tokens with `NUMBER_MASK` for every number, in digits or English words."""
    return [NUMBER_MASK if token[0].isdigit() or token in _NUMBER_WORDS else token for token in tokens]


def numbers(tokens: list[str]) -> list[str]:
    """The numbers among the tokens, in digits, in order of size as text."""
    return sorted(token for token in tokens if token[0].isdigit())
