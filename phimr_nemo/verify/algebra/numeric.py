"""Numeric values with as many digits as asked for, by mpmath, and how many digits a decision needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final

from mpmath import MPContext

from phimr_nemo.verify.algebra.exact import scrambled, series_range
from phimr_nemo.verify.algebra.term import Inexact, NotReal, Term, Undecided, Undefined

MAX_EXPONENT_BITS: Final = 1 << 18
"""A power whose value has more bits than this is not evaluated."""
BITS_OF_E_SQUARED: Final = 3
HYPERBOLIC: Final = frozenset(["sinh", "cosh", "tanh", "coth", "sech", "csch"])
MAX_NUMERIC_FACTORIAL: Final = 100_000
APPLIED_BITS: Final = 60

_CONTEXT: Final = MPContext()


class Evaluation:
    """One evaluation of expressions at a point.

    Args:
        precision: bits of the working precision.
        point: exact values of the variables.
        real: whether a value that is not real ends the evaluation with :class:`NotReal`.

    Attributes:
        largest: the binary exponent of the largest value that was added to another one.
    """

    def __init__(self, precision: int, point: Mapping[str, Fraction], *, real: bool) -> None:
        self.context = _CONTEXT
        self.context.prec = precision
        self.precision = precision
        self._point = point
        self._real = real
        self.largest = 0

    def value(self, term: Term) -> Any:
        """The value of an expression.

        Raises:
            Undefined: there is none (NotReal where it leaves the reals).
            Undecided: it is beyond the bounds.
            Inexact: an operation that has no numeric form.
        """
        operation = _NUMERIC.get(term.op)
        if operation is None:
            raise Inexact(term.op)
        try:
            value = operation(self, term)
        except (ZeroDivisionError, ValueError) as error:
            raise Undefined from error
        except OverflowError as error:
            raise Undecided("a value beyond the bounds") from error
        if isinstance(value, self.context.mpc):
            if value.imag == 0:
                value = value.real
            elif self._real:
                raise NotReal
        if not self.context.isfinite(value):
            raise Undefined
        if value and abs(self.magnitude(value)) > MAX_EXPONENT_BITS:
            raise Undecided("a value beyond the bounds")
        return value

    def values(self, term: Term) -> list[Any]:
        """The values of the operands."""
        return [self.value(argument) for argument in term.args]

    def magnitude(self, value: Any) -> int:
        """The binary exponent of a value other than zero."""
        return int(self.context.mag(value))

    def exact(self, value: Fraction) -> Any:
        """A rational number in the working precision."""
        return self.context.mpf(value.numerator) / value.denominator

    def nearest(self, value: Any) -> int | None:
        """The integer that a value is, as far as the precision tells."""
        if isinstance(value, self.context.mpc):
            return None
        rounded = self.context.nint(value)
        size = max(self.context.mpf(1), abs(value))
        return int(rounded) if abs(value - rounded) <= size * self.context.ldexp(1, -self.precision // 2) else None

    def variable(self, name: str) -> Any:
        """The value of a variable."""
        if name not in self._point:
            raise Inexact(name)
        return self.exact(self._point[name])

    def noted(self, value: Any) -> Any:
        """Record the size of a summand."""
        if value:
            self.largest = max(self.largest, self.magnitude(value))
        return value

    def at(self, name: str, index: int) -> Evaluation:
        """The same evaluation with one more variable."""
        inner = Evaluation(self.precision, {**self._point, name: Fraction(index)}, real=self._real)
        inner.largest = self.largest
        return inner

    @property
    def point(self) -> Mapping[str, Fraction]:
        """The values of the variables."""
        return self._point

    @property
    def real(self) -> bool:
        """Whether values must be real."""
        return self._real


Operation = Callable[[Evaluation, Term], Any]


def _constant(run: Evaluation, term: Term) -> Any:
    match term.name:
        case "pi":
            return +run.context.pi
        case "e":
            return +run.context.e
        case "i":
            return run.context.mpc(0, 1)
        case _:
            raise Undefined


def _add(run: Evaluation, term: Term) -> Any:
    left, right = run.values(term)
    return run.noted(left) + run.noted(right)


def _multiply(run: Evaluation, term: Term) -> Any:
    left, right = run.values(term)
    return left * right


def _divide(run: Evaluation, term: Term) -> Any:
    top, bottom = run.values(term)
    _check_not_zero(run, bottom)
    return top / bottom


def _check_not_zero(run: Evaluation, value: Any) -> None:
    """A divisor that is zero but for rounding."""
    if not value or (run.largest and run.magnitude(value) < run.largest - run.precision + run.precision // 4):
        raise Undefined


def _power(run: Evaluation, term: Term) -> Any:
    base, exponent = run.values(term)
    if not base:
        if not exponent:
            return run.context.mpf(1)
        if isinstance(exponent, run.context.mpc) or exponent < 0:
            raise Undefined
        return base
    whole = run.nearest(exponent)
    size = abs(run.magnitude(base)) + 1
    if abs(exponent) * size > MAX_EXPONENT_BITS:
        raise Undecided("a power beyond the bounds")
    if whole is not None:
        return base**whole
    degree = _odd_degree(term.args[1])
    if degree and not isinstance(base, run.context.mpc) and base < 0 and run.real:
        top = exponent * degree
        return (-((-base) ** (run.context.mpf(1) / degree))) ** (run.nearest(top) or 0)
    return base**exponent


def _odd_degree(exponent: Term) -> int:
    """The odd denominator of an exponent written as a fraction of integers, else 0."""
    sign = exponent.args[0] if exponent.op == "neg" else exponent
    if sign.op == "div" and all(part.op == "num" and part.value.denominator == 1 for part in sign.args):
        value = sign.args[0].value / sign.args[1].value if sign.args[1].value else Fraction(0)
        return value.denominator if value.denominator % 2 and value.denominator > 1 else 0
    return 0


def _root(run: Evaluation, term: Term) -> Any:
    value, degree = run.values(term)
    whole = run.nearest(degree)
    if whole is None or whole < 1:
        return value ** (1 / degree)
    if whole == 2:
        return run.context.sqrt(value)
    if whole % 2 and not isinstance(value, run.context.mpc) and value < 0:
        return -run.context.root(-value, whole)
    return run.context.root(value, whole)


def _logarithm(run: Evaluation, term: Term) -> Any:
    value, base = run.values(term)
    if not value or not base or base == 1:
        raise Undefined
    if term.args[1].op == "const" and term.args[1].name == "e":
        return run.context.log(value)
    return run.context.log(value) / run.context.log(base)


def _one(name: str) -> Operation:
    def apply(run: Evaluation, term: Term) -> Any:
        value = run.value(term.args[0])
        if run.nearest(value) is None and value and run.magnitude(value) > run.precision:
            raise Undecided("an argument beyond the precision")
        if value:
            run.largest = max(run.largest, run.magnitude(value))
        return getattr(run.context, name)(value)

    return apply


def _reciprocal(name: str) -> Operation:
    inner = _one(name)

    def apply(run: Evaluation, term: Term) -> Any:
        value = inner(run, term)
        if not value or run.magnitude(value) < -run.precision // 2:
            raise Undefined
        return 1 / value

    return apply


def _tangent(run: Evaluation, term: Term) -> Any:
    value = run.value(term.args[0])
    below = run.context.cos(value)
    if not below or run.magnitude(below) < -run.precision // 2:
        raise Undefined
    return run.context.sin(value) / below


def _step(up: bool) -> Operation:
    def apply(run: Evaluation, term: Term) -> Any:
        value = run.value(term.args[0])
        if isinstance(value, run.context.mpc):
            raise NotReal
        whole = run.nearest(value)
        if whole is not None:
            return run.context.mpf(whole)
        return run.context.ceil(value) if up else run.context.floor(value)

    return apply


def _factorial(run: Evaluation, term: Term) -> Any:
    value = run.value(term.args[0])
    whole = run.nearest(value)
    if whole is None or whole < 0:
        raise Undefined
    if whole > MAX_NUMERIC_FACTORIAL:
        raise Undecided("a factorial beyond the bounds")
    return run.context.factorial(whole)


def _binomial(run: Evaluation, term: Term) -> Any:
    top, chosen = run.values(term)
    count = run.nearest(chosen)
    if count is None or count < 0:
        raise Undefined
    if count > MAX_NUMERIC_FACTORIAL:
        raise Undecided("a binomial beyond the bounds")
    whole = run.nearest(top)
    return run.context.binomial(whole if whole is not None else top, count)


def _extreme(choose: Callable[[list[Any]], Any]) -> Operation:
    def apply(run: Evaluation, term: Term) -> Any:
        values = run.values(term)
        if any(isinstance(value, run.context.mpc) for value in values):
            raise NotReal
        return choose(values)

    return apply


def _modulo(run: Evaluation, term: Term) -> Any:
    value, modulus = (run.nearest(value) for value in run.values(term))
    if value is None or not modulus:
        raise Undefined
    return run.context.mpf(value % modulus)


def _series(run: Evaluation, term: Term) -> Any:
    total = run.context.mpf(1 if term.op == "prod" else 0)
    for index in series_range(term, run.point):
        inner = run.at(term.name, index)
        value = inner.value(term.args[2])
        run.largest = max(run.largest, inner.largest)
        total = total * value if term.op == "prod" else run.noted(total) + run.noted(value)
    return total


def _apply(run: Evaluation, term: Term) -> Any:
    parts = []
    for value in run.values(term):
        for part in (run.context.re(value), run.context.im(value)):
            parts.append(Fraction(int(run.context.nint(part * (1 << APPLIED_BITS))), 1 << APPLIED_BITS))
    return run.exact(scrambled(term.name, tuple(parts)))


def _part(name: str) -> Operation:
    return lambda run, term: getattr(run.context, name)(run.value(term.args[0]))


_NUMERIC: Final[dict[str, Operation]] = {
    "num": lambda run, term: run.exact(term.value),
    "sym": lambda run, term: run.variable(term.name),
    "const": _constant,
    "add": _add,
    "neg": lambda run, term: -run.value(term.args[0]),
    "mul": _multiply,
    "div": _divide,
    "pow": _power,
    "root": _root,
    "log": _logarithm,
    "factorial": _factorial,
    "binom": _binomial,
    "floor": _step(up=False),
    "ceil": _step(up=True),
    "abs": _part("fabs"),
    "re": _part("re"),
    "im": _part("im"),
    "arg": _part("arg"),
    "max": _extreme(max),
    "min": _extreme(min),
    "mod": _modulo,
    "sum": _series,
    "prod": _series,
    "apply": _apply,
    "tan": _tangent,
    **{name: _one(name) for name in ("sin", "cos", "sinh", "cosh", "tanh")},
    **{f"arc{name}": _one(f"a{name}") for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{f"ar{name}": _one(f"a{name}") for name in ("sinh", "cosh", "tanh")},
    **{
        name: _reciprocal(other) for name, other in (("sec", "cos"), ("csc", "sin"), ("cot", "tan"), ("coth", "tanh"))
    },
    **{name: _reciprocal(other) for name, other in (("sech", "cosh"), ("csch", "sinh"))},
}


def bits_needed(*terms: Term) -> int:
    """Binary digits that tell two expressions apart unless they are equal: grows with all numbers and powers written.

    Raises:
        Undecided: more than `MAX_EXPONENT_BITS`.
    """
    total = 0
    for term in terms:
        for node in term.walk():
            if node.op == "num":
                total += node.value.numerator.bit_length() + node.value.denominator.bit_length()
            elif node.op in ("pow", "factorial", "binom", "prod"):
                total += _bits_of(node)
            elif node.op in HYPERBOLIC:
                total += _bits_of_exponential(node.args[0])
            if total > MAX_EXPONENT_BITS:
                raise Undecided("more digits than the bounds allow")
    return total


def _bits_of_exponential(argument: Term) -> int:
    """The size of e to twice a constant: so near to 1 is its hyperbolic tangent."""
    try:
        value = Evaluation(64, {}, real=False).value(argument)
    except (Inexact, Undefined):
        return 64
    return int(min(abs(value), MAX_EXPONENT_BITS)) * BITS_OF_E_SQUARED


def _bits_of(node: Term) -> int:
    """The size of a power, factorial or binomial of constants, by a rough evaluation."""
    try:
        value = Evaluation(64, {}, real=False).value(node)
    except (Inexact, Undefined):
        return 64
    return abs(int(_CONTEXT.mag(value))) if value else 64
