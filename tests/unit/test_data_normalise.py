"""What does not count when questions are compared, what does, and what is stored."""

from __future__ import annotations

import pytest

from phimr_nemo.data.sources.normalise import clean, comparison_key, comparison_tokens, mask_numbers, numbers

SAME = [
    ("What is  $2+2$?", "what is 2 + 2"),
    ("$\\dfrac{1}{2}\\,x$", "\\(\\frac12 x\\)".replace("\\frac12", "\\frac{1}{2}")),
    ("$x^{2}$ and $y_{1}$", "x^2 and y_1"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("costs $1,000$ dollars", "costs 1000 dollars"),
    ("\\[a = b\\]", "$$a=b$$"),
    ("x² + ½", "x^{2} + \\frac{1}{2}"),
    ("10²⁵ and a₁₂", "10^{25} and a_{12}"),
    ("2⁻¹", "2^{-1}"),
    ("\ufeffA\u200bB\u00a0C", "ab c"),
    ("Find n.", "find n"),
    ("数论 问题。", "数论问题"),
    ("x − 3 ≤ 2π", "$x-3 \\leq 2\\pi$"),
    ("3×5 ≠ √2", "3 \\times 5 \\neq \\sqrt 2"),
    ("an angle of 90° at A’s “end”", 'an angle of $90^\\circ$ at A\'s "end"'),
    ("٣ + १२", "3 + 12"),
    ("$\\frac12 x + \\dfrac 3{10}$", "\\frac{1}{2}x+\\tfrac{3}{10}"),
    ("$\\tbinom52$", "\\binom{5}{2}"),
    ("$x^{10}$, $90^{\\circ}$, $\\sqrt{10}$", "x¹⁰, 90°, √10"),
    ("x^10", "x^{10}"),
    ("10,\\!000 and 1\\,000", "10000 and 1{,}000"),
    ("$5\\%$ of $\\{1,2\\}$", "5% of {1,2}"),
    ("3 $\\text{ cm}$, $\\mathbf{v}$, $\\operatorname{lcm}(4,6)$", "3 cm, v, lcm(4,6)"),
    ("$x \\in \\mathbb{R}$, $\\mathbb Z$", "x ∈ ℝ, ℤ"),
    ("$1,\\ldots,n$, $1+\\cdots+n$", "1,…,n, 1+...+n"),
    ("$\\lvert x\\rvert \\to \\varphi$", "|x| → φ"),
    ("$\\lfloor \\sigma\\rfloor \\equiv \\sum \\Delta$", "⌊σ⌋ ≡ ∑ Δ"),
    ("$\\sin{x} + \\log_{2}8$", "sin x + log_2 8"),
    ("\u2067a\u2069\u061c b\ufe0f\U000e0041\u3164", "a b"),
]
DIFFERENT = [
    ("2+2", "2-2"),
    ("x^{12}", "x^1 2"),
    ("f(1, 2)", "f(12)"),
    ("\\frac{1}{2}", "\\sqrt{1}{2}"),
    ("1.5", "15"),
    ("10²", "102"),
    ("2⁵", "25"),
    ("x₁", "x1"),
    ("2½", "21/2"),
    ("at least 3", "at most 3"),
    ("x ≤ 3", "x ≥ 3"),
    ("2 · 3", "2.3"),
    ("\\frac{12}{3}", "\\frac{1}{23}"),
    ("\\frac{1}{2}", "\\binom{1}{2}"),
    ("f(10, 000)", "f(10000)"),
    ("\\lfloor x \\rfloor", "\\lceil x \\rceil"),
    ("\\sin x", "\\cos x"),
    ("5\\%", "5"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_questions_have_one_key(one: str, other: str) -> None:
    assert comparison_key(one) == comparison_key(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_questions_have_two_keys(one: str, other: str) -> None:
    assert comparison_key(one) != comparison_key(other)


@pytest.mark.parametrize("text", [text for pair in SAME + DIFFERENT for text in pair])
def test_a_key_is_its_own_key_and_cleaning_is_idempotent(text: str) -> None:
    assert comparison_key(comparison_key(text)) == comparison_key(text)
    assert clean(clean(text)) == clean(text)
    assert comparison_key(clean(text)) == comparison_key(text)


def test_stored_text_keeps_what_has_meaning() -> None:
    assert clean(" a\r\nb\x00 \t\n\n\n\nx² ½\u200b ") == "a\nb\n\nx² ½"
    assert clean("e\u0301") == "\u00e9"
    assert clean("half a pair \ud835") == "half a pair ?"


def test_numbers_and_their_mask() -> None:
    tokens = comparison_tokens("Tom has twelve apples, 3.5 kg and $1{,}200$ pears")
    assert mask_numbers(tokens) == ["tom", "has", "#", "apples", ",", "#", "kg", "and", "#", "pears"]
    assert numbers(tokens) == ["1200", "3.5"]
