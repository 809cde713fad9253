"""Equality of two expressions by math-verify and sympy. Imported only in worker processes.

math-verify parses. Decimals become exact fractions first (math-verify compares them after rounding to
six places, which calls 0.1 and 0.1000001, or 1e-9 and 2e-9, equal). Evaluation at a few fixed points with
30 digits settles most pairs quickly and both ways; `math_verify.verify` decides the rest.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, Final

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from phimr_nemo.verify.read.quantity import Number
from phimr_nemo.verify.verdict import Unparsable

PARSE_CACHE: Final = 4096
PRECISION: Final = 30
RELATIVE_TOLERANCE: Final = sympy.Rational(1, 10**18)
NEGLIGIBLE: Final = sympy.Rational(1, 10**25)
MAX_SYMBOLS: Final = 12
PROBES: Final = 4
MIN_PROBES: Final = 2
_EXTRACTION: Final = [
    LatexExtractionConfig(
        # Units are gone already: what looks like one now ("m" in "37m/4") is a variable.
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    )
]
_NUMERATORS: Final = (17, 29, 41, 23, 53, 37, 61, 31, 43, 59, 47, 67)
_DENOMINATORS: Final = (13, 19, 11, 7)
"""Distinct primes: no point is an integer, and no two coordinates of a point are equal."""

logging.getLogger("math_verify").disabled = True
for _name in ("math_verify.parser", "math_verify.grader", "latex2sympy2_extended"):
    logging.getLogger(_name).disabled = True


@lru_cache(maxsize=PARSE_CACHE)
def _parsed(latex: str) -> Any | None:
    """The sympy object that math-verify reads, with exact numbers; None when it reads nothing."""
    found = parse(
        f"${latex}$",
        extraction_config=_EXTRACTION,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=0,
    )
    return _exact(found[0]) if found and not isinstance(found[0], str) else None


def _exact(expression: Any) -> Any:
    if isinstance(expression, sympy.MatrixBase):
        return expression.applyfunc(_exact)
    floats = expression.atoms(sympy.Float)
    return expression.xreplace({value: sympy.Rational(str(value)) for value in floats}) if floats else expression


class MathVerify:
    """The symbolic decisions that the comparison asks for; see :mod:`phimr_nemo.verify.compare`."""

    def equal(self, gold: str, predicted: str, rounding: Number | None) -> bool:
        """Whether two canonical expressions are equal.

        Args:
            gold: the gold expression.
            predicted: the response's expression.
            rounding: the gold answer as a decimal that counts as a rounding, if it is one.

        Raises:
            Unparsable: math-verify cannot read one of them.
        """
        left, right = self._read("answer", gold), self._read("response", predicted)
        if rounding is not None and _is_scalar(right):
            value = right.evalf(PRECISION)
            if value.is_real:
                gap = abs(
                    sympy.Rational(str(value)) - sympy.Rational(rounding.value.numerator, rounding.value.denominator)
                )
                if gap * 2 <= sympy.Rational(rounding.last_place.numerator, rounding.last_place.denominator):
                    return True
        probed = _probe(left, right)
        return probed if probed is not None else bool(verify(left, right, timeout_seconds=0))

    def same_equation(self, gold: tuple[str, str], predicted: tuple[str, str]) -> bool:
        """Whether two equations have the same solutions because one is a constant multiple of the other.

        Of two equations that end in ``= 0`` the multiple must be 1 or -1.

        Raises:
            Unparsable: math-verify cannot read a side.
        """
        left = self._read("answer", gold[0]) - self._read("answer", gold[1])
        right = self._read("response", predicted[0]) - self._read("response", predicted[1])
        if not (_is_scalar(left) and _is_scalar(right)) or not left.free_symbols & right.free_symbols:
            return False
        ratios = []
        for point in _points(left, right):
            top, bottom = _value(left, point), _value(right, point)
            if not (_is_number(top) and _is_number(bottom)) or abs(bottom) < NEGLIGIBLE or abs(top) < NEGLIGIBLE:
                return False
            ratios.append(top / bottom)
        if any(abs(ratio - ratios[0]) > RELATIVE_TOLERANCE * abs(ratios[0]) for ratio in ratios[1:]):
            return False
        # "... = 0" is asked for in a normal form: twice that is the same line, but not the answer.
        normal_form = gold[1].strip() == predicted[1].strip() == "0"
        return not normal_form or abs(abs(ratios[0]) - 1) <= RELATIVE_TOLERANCE

    @staticmethod
    def _read(side: str, latex: str) -> Any:
        try:
            expression = _parsed(latex)
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
        if expression is None:
            raise Unparsable(side, "math-verify cannot read it")
        return expression


def _is_scalar(expression: Any) -> bool:
    return isinstance(expression, sympy.Expr) and not isinstance(expression, sympy.MatrixExpr)


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """The expression at a point with `PRECISION` digits; not a number where sympy cannot evaluate it."""
    try:
        return expression.xreplace(point).evalf(PRECISION)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return sympy.nan


def _is_number(value: Any) -> bool:
    return bool(value.is_number) and value.is_finite is not False and not value.has(sympy.nan, sympy.zoo, sympy.oo)


def _points(left: Any, right: Any) -> list[dict[Any, Any]]:
    """Fixed rational points, the first half positive, the others of mixed sign; one value per name of a symbol."""
    symbols = left.free_symbols | right.free_symbols
    names = sorted({str(symbol) for symbol in symbols})
    points = []
    for probe in range(PROBES):
        signs = [1 if probe < PROBES // 2 or (index + probe) % 2 else -1 for index in range(len(names))]
        values = [
            sign * sympy.Rational(_NUMERATORS[(index + 5 * probe) % len(_NUMERATORS)], _DENOMINATORS[probe])
            for index, sign in enumerate(signs)
        ]
        by_name = dict(zip(names, values, strict=True))
        points.append({symbol: by_name[str(symbol)] for symbol in symbols})
    return points


def _probe(left: Any, right: Any) -> bool | None:
    """Equality at fixed points: False if they differ at a positive one, True if they differ at none, else None."""
    if not (_is_scalar(left) and _is_scalar(right)):
        return None
    if left.is_Rational and right.is_Rational:
        return bool(left == right)
    if len(left.free_symbols | right.free_symbols) > MAX_SYMBOLS:
        return None
    outcomes: list[tuple[bool, bool]] = []
    for index, point in enumerate(_points(left, right)):
        a, b = _value(left, point), _value(right, point)
        if not (_is_number(a) and _is_number(b)):
            continue
        size = max(abs(a), abs(b))
        if size < NEGLIGIBLE:
            continue
        outcomes.append((index < PROBES // 2, bool(abs(a - b) <= RELATIVE_TOLERANCE * size)))
        if not point:
            break
    equal = [outcome for _, outcome in outcomes]
    if (len(equal) < MIN_PROBES and (left.free_symbols or right.free_symbols)) or not equal:
        return None
    if all(equal):
        return True
    return False if any(positive and not outcome for positive, outcome in outcomes) else None
