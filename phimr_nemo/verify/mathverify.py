r"""What the project's own reader does not know (integrals, limits, derivatives, infinite sums), read by math-verify.

Imported only in worker processes. math-verify folds case, drops primes and knows no bounds, so names are kept apart
and expressions beyond the bounds are refused before it sees them. What it reads is turned into a
:class:`~phimr_nemo.verify.algebra.term.Term` and compared like everything else: its own comparison rounds.
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse

from phimr_nemo.verify.algebra.formula import read
from phimr_nemo.verify.algebra.term import Term, Unreadable, number
from phimr_nemo.verify.read.names import words
from phimr_nemo.verify.verdict import Unparsable

MAX_EXPRESSION_CHARS: Final = 600
"""The longest single expression that math-verify is asked to read."""
MAX_POWER_DIGITS: Final = 5
"""An exponent with more digits than this, written out or as a power of its own, is refused."""
MAX_FACTORIAL_DIGITS: Final = 4
PARSE_CACHE: Final = 4096
_EXTRACTION: Final = [
    LatexExtractionConfig(
        # Units are gone already: what looks like one now ("m" in "37m/4") is a variable.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    )
]

logging.getLogger("math_verify").disabled = True
for _name in ("math_verify.parser", "math_verify.grader", "latex2sympy2_extended"):
    logging.getLogger(_name).disabled = True


def read_pair(gold: str, predicted: str) -> tuple[Term, Term]:
    """Two expressions as terms, by math-verify.

    Raises:
        Unparsable: it cannot read one of them, or one is beyond the bounds.
    """
    for side, text in (("answer", gold), ("response", predicted)):
        if not _CALCULUS_NOTATION.search(text) and not _readable(text):
            raise Unparsable(side, "it is no expression of a known notation")
    check_expression("answer", gold)
    check_expression("response", predicted)
    left, right = for_math_verify(gold, predicted)
    return _read("answer", left), _read("response", right)


_CALCULUS_NOTATION = re.compile(
    r"\\(?:int|iint|iiint|oint|lim|sum|prod|partial|infty)(?![A-Za-z])|\\frac\s*\{\s*d|\\dot|'|\\prime"
)


def _readable(text: str) -> bool:
    """Whether the project's own reader reads it, so that math-verify is needed for the other side only."""
    try:
        read(text)
    except Unreadable:
        return False
    return True


def _read(side: str, latex: str) -> Term:
    try:
        return _parsed(latex)
    except Unreadable as error:
        raise Unparsable(side, str(error)) from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise Unparsable(side, f"math-verify failed on it ({type(error).__name__})") from error


@lru_cache(maxsize=PARSE_CACHE)
def _parsed(latex: str) -> Term:
    found = parse(
        f"${latex}$",
        extraction_config=_EXTRACTION,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=0,
    )
    if not found or isinstance(found[0], str):
        raise Unreadable("math-verify cannot read it")
    return _term(found[0])


_FUNCTIONS: Final[dict[str, str]] = {
    **{
        name: name for name in words("sin cos tan cot sec csc sinh cosh tanh coth sech csch floor factorial binomial")
    },
    **{f"a{name}": f"arc{name}" for name in words("sin cos tan cot sec csc")},
    **{f"a{name}": f"ar{name}" for name in words("sinh cosh tanh")},
    "ceiling": "ceil",
    "Abs": "abs",
    "Max": "max",
    "Min": "min",
    "binomial": "binom",
    "re": "re",
    "im": "im",
}
_CALCULUS: Final = (sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Sum, sympy.Product)


def _term(expression: Any) -> Term:
    """A sympy expression as a term.

    Raises:
        Unreadable: it holds something that has no value, such as an integral that sympy cannot do.
    """
    if isinstance(expression, (sympy.Rational, sympy.Float)):
        exact = sympy.Rational(str(expression)) if isinstance(expression, sympy.Float) else expression
        return number(Fraction(int(exact.p), int(exact.q)))
    for constant, name in ((sympy.pi, "pi"), (sympy.E, "e"), (sympy.I, "i"), (sympy.oo, "inf")):
        if expression == constant:
            return Term("const", name=name)
    if isinstance(expression, sympy.Symbol):
        return Term("sym", name=expression.name)
    if isinstance(expression, (sympy.Add, sympy.Mul)):
        parts = [_term(part) for part in expression.args]
        total = parts[0]
        for part in parts[1:]:
            total = Term("add" if isinstance(expression, sympy.Add) else "mul", (total, part))
        return total
    if isinstance(expression, sympy.Pow):
        return Term("pow", tuple(_term(part) for part in expression.args))
    if isinstance(expression, sympy.exp):
        return Term("pow", (Term("const", name="e"), _term(expression.args[0])))
    if isinstance(expression, sympy.log):
        base = _term(expression.args[1]) if len(expression.args) > 1 else Term("const", name="e")
        return Term("log", (_term(expression.args[0]), base))
    function = _FUNCTIONS.get(type(expression).__name__)
    if function:
        return Term(function, tuple(_term(part) for part in expression.args))
    if isinstance(expression, _CALCULUS):
        done = expression.doit()
        if not done.has(*_CALCULUS):
            return _term(done)
    raise Unreadable(f"a {type(expression).__name__} that is not understood")


_COMMAND_OR_SUBSCRIPT = re.compile(r"(\\[A-Za-z]+|_\s*\{[^{}]*\}|_\s*[A-Za-z0-9])")
_SHORT_RUN_WITH_I = re.compile(r"(?<![A-Za-z])([A-Za-z]{0,2})i([A-Za-z]{0,2})(?![A-Za-z])")
_INDEX_I = re.compile(r"_\s*\{\s*i\s*=")
_DERIVATIVE = re.compile(
    r"\\frac\s*\{\s*d\s*(?P<over>\\?[A-Za-z]+)(?:\s*\([A-Za-z]\))?\s*\}\s*\{\s*d\s*[A-Za-z]\s*\}"
    r"|\\dot\s*\{\s*(?P<dotted>\\?[A-Za-z]+)\s*\}"
)
_PRIMES = re.compile(r"(?P<name>\\?[A-Za-z]+)\s*(?:\^\s*\{?\s*(?P<command>(?:\\prime\s*)+)\}?|(?P<quotes>'+))")
_UPPER = re.compile(r"\\(?:Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)(?![A-Za-z])|[A-Z]")
_FREE_SYMBOLS: Final = tuple(rf"\{name} " for name in words("kappa chi xi nu zeta upsilon iota psi eta"))
_ALWAYS_RENAMED: Final = frozenset("EI")
"""math-verify reads I as the imaginary unit and cannot read E with a subscript."""
_CONSTANT_OF_INTEGRATION: Final = "C"


def for_math_verify(*texts: str) -> tuple[str, ...]:
    r"""Write expressions so that math-verify, which folds case and drops primes, keeps different names apart.

    A capital letter that also occurs as a small one becomes a Greek letter that occurs nowhere. The constant of
    integration is exempt: ``C`` and ``c`` are told apart only within one expression. Derivatives by dot, prime or
    quotient become one name. The letter i, except as the index of a sum, becomes the imaginary unit.
    """
    prepared = []
    for text in texts:
        text = _DERIVATIVE.sub(lambda m: f"{m['over'] or m['dotted']}_{{p}} ", text)
        text = _PRIMES.sub(_primed_name, text)
        prepared.append(text)
    together = " ".join(prepared)
    free = iter([name for name in _FREE_SYMBOLS if name.strip() not in together])
    for name in sorted(set(_UPPER.findall(together))):
        small = name.lower()
        folded = [small in _names(text) and name in _names(text) for text in prepared]
        both = any(folded) if name == _CONSTANT_OF_INTEGRATION else small in _names(together)
        if both or name in _ALWAYS_RENAMED:
            replacement = next(free, None)
            if replacement is None:
                raise Unparsable("response", "too many names that differ in case alone")
            prepared = [_rename(text, name, replacement) for text in prepared]
    return tuple(prepared) if _INDEX_I.search(together) else tuple(map(_imaginary_unit, prepared))


def _imaginary_unit(text: str) -> str:
    """The letter i as the capital that math-verify takes for the imaginary unit."""
    segments = _COMMAND_OR_SUBSCRIPT.split(text)
    segments[::2] = [_SHORT_RUN_WITH_I.sub(r"\1 I \2", segment) for segment in segments[::2]]
    return "".join(segments)


def _primed_name(match: re.Match[str]) -> str:
    count = match["command"].count("prime") if match["command"] else len(match["quotes"])
    return f"{match['name']}_{{{'p' * count}}} "


def _names(text: str) -> frozenset[str]:
    """Single letters and commands that occur in an expression, subscripts aside."""
    commands = re.findall(r"\\[A-Za-z]+", text)
    letters = re.sub(r"\\[A-Za-z]+|_\s*\{[^{}]*\}|_\s*[A-Za-z0-9]", " ", text)
    return frozenset([*commands, *letters])


def _rename(text: str, name: str, replacement: str) -> str:
    if name.startswith("\\"):
        return re.sub(re.escape(name) + r"(?![A-Za-z])", lambda _: replacement, text)
    segments = _COMMAND_OR_SUBSCRIPT.split(text)
    segments[::2] = [segment.replace(name, replacement) for segment in segments[::2]]
    return "".join(segments)


_SIDE_BY_SIDE = re.compile(r"[0-9]\s+[0-9]")
_POWER_OF_POWER = re.compile(r"\^\s*\{?\s*\(?\s*([0-9]{1,20})\s*\^\s*\{?\s*([0-9]{1,20})")
_BIG_POWER = re.compile(rf"\^\s*\{{?\s*\(?\s*[-+]?\s*[0-9]{{{MAX_POWER_DIGITS + 1},}}")
_BIG_FACTORIAL = re.compile(
    rf"[0-9]{{{MAX_FACTORIAL_DIGITS + 1},}}\s*[)}}]*\s*!|[\^!][^+\-*/]{{0,40}}[)}}]\s*!|!\s*!"
)
_BIG_BINOMIAL = re.compile(rf"\\binom\s*\{{[^{{}}]*(?:\^|[0-9]{{{MAX_POWER_DIGITS + 1},}})")


def check_expression(side: str, text: str) -> None:
    """Refuse what math-verify must not be given.

    Raises:
        Unparsable: words, a percent or currency sign, or an expression beyond the bounds on its length, exponents
            and factorials.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        raise Unparsable(side, f"an expression of more than {MAX_EXPRESSION_CHARS} characters")
    if r"\text{" in text or "%" in text or "$" in text:
        raise Unparsable(side, "words or signs within an expression")
    if _SIDE_BY_SIDE.search(text) or re.search(r"[0-9]\s*'", text):
        raise Unparsable(side, "two numbers side by side")
    if len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}\s", text)) > 1:
        raise Unparsable(side, "prose instead of an expression")
    if _BIG_POWER.search(text) or _BIG_FACTORIAL.search(text) or _BIG_BINOMIAL.search(text):
        raise Unparsable(side, "a power, factorial or binomial beyond the bounds")
    for base, power in _POWER_OF_POWER.findall(text):
        if int(power) * math.log10(max(int(base), 2)) > MAX_POWER_DIGITS:
            raise Unparsable(side, "a power tower beyond the bounds")
