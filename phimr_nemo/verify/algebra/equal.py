r"""Whether two expressions are equal: exactly where they are rational, else by values with enough digits.

Constants: rational numbers are compared exactly, very large ones modulo a prime that depends on the texts; all others
by their difference, with a precision that grows with the numbers written and with the size of the summands, until the
difference has settled. Functions: rational ones modulo a prime at random points (Schwartz-Zippel), all others at
points of both signs, small and large, around the numbers that they contain, and at integers of all residues where a
variable is an integer by its notation. A point without a (real) value says nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from phimr_nemo.verify.algebra.exact import modular, prime_for, rational
from phimr_nemo.verify.algebra.numeric import Evaluation, bits_needed
from phimr_nemo.verify.algebra.term import Inexact, Term, Undecided, Undefined, has, symbols

ROUGH_BITS: Final = 64
GUARD_BITS: Final = 128
CONSTANT_FACTOR: Final = 4
"""Half of the digits may be lost, and a function such as the cosine squares what is small."""
POINT_FACTOR: Final = 2
LOST_BITS: Final = 32
"""What rounding may eat of the digits of a sum."""
MAX_PRECISION: Final = 1 << 19
MAX_POINT_PRECISION: Final = 1 << 13
MIN_POINTS: Final = 3
MAX_SYMBOLS: Final = 16
MAX_CONSTANTS: Final = 6
MAX_CONSTANT_BITS: Final = 256
MAX_RESIDUES: Final = 24
POLYNOMIAL_OPS: Final = frozenset(["num", "sym", "add", "neg", "mul", "div", "pow"])
INTEGER_NAMES: Final = frozenset("nmkNMKjl")
_PRIMES: Final = (17, 29, 41, 23, 53, 37, 61, 31, 43, 59, 47, 67)
_REALS: Final = tuple(
    Fraction(*pair)
    for pair in (
        *((1, 7), (17, 13), (29, 11), (-13, 17), (-31, 9), (3, 11), (-2, 7), (101, 3), (-97, 5), (1009, 7)),
        *((1, 97), (-1, 89), (100_003, 13), (7, 19), (-70_001, 11)),
    )
)
_ON_STEPS: Final = tuple(
    sorted({Fraction(n, d) for d in (1, 2, 3, 4, 5, 6, 8, 10) for n in range(-2 * d, 2 * d + 1)})
)
"""Where a floor or a ceiling of a real variable jumps: only there does one differ from the other less one."""
_INTEGERS: Final = (
    *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18, 20, 24, 25, 26, 30, 35, 36, 37),
    *(
        48,
        49,
        50,
        63,
        64,
        65,
        97,
        99,
        100,
        101,
        119,
        120,
        121,
        -1,
        -2,
        -3,
        -4,
        -5,
        -6,
        -7,
        -11,
        -12,
        -24,
        -25,
        1000,
        1001,
    ),
)
_STEPS: Final = ("floor", "ceil", "mod", "gcd", "lcm")
_COUNTING: Final = (*_STEPS, "factorial", "binom", "perm")


def equal(gold: Term, predicted: Term) -> bool:
    """Whether two expressions are equal.

    Raises:
        Undecided: the bounds on digits do not allow a decision.
    """
    if gold == predicted:
        return True
    names = sorted(symbols(gold) | symbols(predicted))
    if len(names) > MAX_SYMBOLS:
        raise Undecided(f"more than {MAX_SYMBOLS} variables")
    if not names:
        return _same_constants(gold, predicted)
    if all(node.op in POLYNOMIAL_OPS for term in (gold, predicted) for node in term.walk()):
        try:
            return _same_rational_functions(gold, predicted, names)
        except Inexact:
            pass
    return _same_functions(gold, predicted, names)


def _same_constants(gold: Term, predicted: Term) -> bool:
    try:
        decided = _exactly(gold, predicted, {})
    except Undefined:
        return False
    if decided is not None:
        return decided
    try:
        prime = prime_for(repr(gold), repr(predicted))
        return modular(gold, {}, prime) == modular(predicted, {}, prime)
    except (Inexact, Undefined):
        pass
    try:
        return _numerically(gold, predicted, {}, real=False)
    except Undefined:
        return False
    except Inexact as error:
        raise Undecided(f"{error} of constants") from error


def _exactly(gold: Term, predicted: Term, point: Mapping[str, Fraction]) -> bool | None:
    """Equality of rational values; None where one is not rational."""
    try:
        return rational(gold, point) == rational(predicted, point)
    except Inexact:
        return None


def _numerically(gold: Term, predicted: Term, point: Mapping[str, Fraction], *, real: bool) -> bool:
    """Equality by the difference of the values, with growing precision.

    Raises:
        Undecided: it takes more digits than the bounds allow; of functions, than a point is worth.
    """
    rough = Evaluation(ROUGH_BITS, point, real=real)
    for term in (gold, predicted):
        rough.noted(rough.value(term))
    sizes = sum(value.numerator.bit_length() + value.denominator.bit_length() for value in point.values())
    factor = POINT_FACTOR if point else CONSTANT_FACTOR
    enough = GUARD_BITS + max(0, rough.largest) + factor * (bits_needed(gold, predicted) + sizes)
    precision = GUARD_BITS + max(0, rough.largest)
    if enough > (MAX_POINT_PRECISION if point else MAX_PRECISION):
        raise Undecided("more digits than the bounds allow")
    before = _gap(gold, predicted, point, precision, real=real)
    while True:
        precision = min(2 * precision, max(enough, precision + GUARD_BITS))
        gap = _gap(gold, predicted, point, precision, real=real)
        if _settled(before, gap):
            return False
        if precision >= enough:
            difference, size, _ = gap
            if not difference or difference * (1 << (precision // 2)) <= size:
                return True
            # Both sides are nothing but rounding: it is small beside the summands, and shrinks as digits are added.
            shrinks = not before[0] or difference * (1 << GUARD_BITS // 2) <= before[0]
            return bool(shrinks and difference * (1 << (precision - LOST_BITS)) <= 1 << max(0, rough.largest))
        before = gap


def _gap(
    gold: Term, predicted: Term, point: Mapping[str, Fraction], precision: int, *, real: bool
) -> tuple[Any, Any, int]:
    """The size of the difference, that of the values, and the precision."""
    run = Evaluation(precision, point, real=real)
    left, right = run.value(gold), run.value(predicted)
    return abs(left - right), max(abs(left), abs(right)), precision


def _settled(before: tuple[Any, Any, int], now: tuple[Any, Any, int]) -> bool:
    """Whether the difference is there to stay: far above the rounding at both precisions, and the same."""
    for difference, size, precision in (before, now):
        if not difference or difference * (1 << (precision // 2)) < size:
            return False
    return bool(abs(before[0] - now[0]) * (1 << 16) <= now[0])


# Functions -------------------------------------------------------------------------------------------


def _same_rational_functions(gold: Term, predicted: Term, names: Sequence[str]) -> bool:
    texts = repr(gold), repr(predicted)
    prime = prime_for(*texts)
    for attempt in range(MIN_POINTS):
        point = {name: _random(prime, attempt, name, *texts) for name in names}
        try:
            if modular(gold, point, prime) != modular(predicted, point, prime):
                return False
        except Undefined:
            return False
    return True


def _random(prime: int, attempt: int, name: str, *texts: str) -> int:
    digest = hashlib.sha256("\0".join([str(attempt), name, *texts]).encode("utf-8")).digest()
    return int.from_bytes(digest, "little") % prime


def _same_functions(gold: Term, predicted: Term, names: Sequence[str]) -> bool:
    compared = 0
    complex_values = has(gold, "i") or has(predicted, "i")
    for point in points(gold, predicted, names):
        try:
            same = _exactly(gold, predicted, point)
            if same is None:
                same = _numerically(gold, predicted, point, real=not complex_values)
        except (Undefined, Undecided):
            continue
        except Inexact as error:
            raise Undecided(f"{error} of functions") from error
        if not same:
            return False
        compared += 1
    if compared < MIN_POINTS:
        raise Undecided("too few points where both have a value")
    return True


def integers_by_notation(*terms: Term) -> frozenset[str]:
    """The variables that are integers by the notation: below a step, a factorial, a binomial, or as a power of -1.

    A floor of the bare variable (plus a number) says the opposite: nobody rounds an integer.
    """
    found: set[str] = set()
    counted: set[str] = set()
    rounded: set[str] = set()
    for term in terms:
        for node in term.walk():
            if node.op in _COUNTING:
                below = symbols(node)
                (found if node.op in ("floor", "ceil") else counted).update(below)
                if node.op in ("floor", "ceil"):
                    rounded |= {name for name in below if _is_redundant(node.args[0], name)}
            elif node.op == "pow" and node.args[0] in _MINUS_ONE:
                found |= symbols(node.args[1])
            elif node.op in ("sum", "prod"):
                found |= symbols(node.args[0]) | symbols(node.args[1])
    return frozenset(name for name in found - rounded if name[0] in INTEGER_NAMES) | counted


_MINUS_ONE: Final = (Term("neg", (Term("num", value=Fraction(1)),)), Term("num", value=Fraction(-1)))


def _is_redundant(argument: Term, name: str) -> bool:
    """Whether a rounded argument is one integer multiple of the variable plus a number."""
    if symbols(argument) != {name} or any(
        node.op not in ("num", "sym", "add", "neg", "mul", "div") for node in argument.walk()
    ):
        return False
    try:
        at = [rational(argument, {name: Fraction(value)}) for value in (0, 1, 2)]
    except (Inexact, Undefined):
        return False
    step = at[1] - at[0]
    return step == at[2] - at[1] and step.denominator == 1


def points(gold: Term, predicted: Term, names: Sequence[str]) -> Iterator[dict[str, Fraction]]:
    """Points to compare two functions at."""
    integers = integers_by_notation(gold, predicted)
    constants = _constants(gold, predicted)
    steps = has(gold, *_STEPS) or has(predicted, *_STEPS)
    reals = [*_REALS, *(c + Fraction(d, 7) for c in constants for d in (-1, 1))]
    if steps:
        reals += [c + Fraction(d, 1000) for c in (*range(-3, 8), *constants) for d in (-1, 1)]
        reals += _ON_STEPS
    whole = [*_INTEGERS, *(math.floor(c) + d for c in constants for d in (-1, 0, 1))]
    if steps:
        whole += [1000 + residue for residue in range(MAX_RESIDUES)]
    whole = list(dict.fromkeys(whole))
    # Powers with a variable exponent: integers as well as reals.
    mixed = whole if not integers and any(_variable_power(term) for term in (gold, predicted)) else []
    count = len(whole) if len(integers) == len(names) else max(len(reals), len(whole) if integers else 0)
    for number in range(count):
        yield {
            name: Fraction(whole[(number + 7 * place) % len(whole)])
            if name in integers
            else reals[(number + 4 * place) % len(reals)]
            for place, name in enumerate(names)
        }
    for number in range(min(len(mixed), MAX_RESIDUES)):
        yield {name: Fraction(mixed[(number + 7 * place) % len(mixed)]) for place, name in enumerate(names)}


def _variable_power(term: Term) -> bool:
    return any(node.op == "pow" and symbols(node.args[1]) for node in term.walk())


def _constants(*terms: Term) -> list[Fraction]:
    """The larger numbers and powers that occur, with both signs: a case distinction may lie at one of them."""
    found = {value for term in terms for node in term.walk() if (value := _constant(node)) is not None}
    kept = sorted(found, key=abs, reverse=True)[:MAX_CONSTANTS]
    return [value for number in kept for value in (number, -number)]


def _constant(node: Term) -> Fraction | None:
    if node.op == "num":
        return node.value
    if node.op != "pow" or symbols(node):
        return None
    try:
        value = rational(node, {})
    except (Inexact, Undefined):
        return None
    return value if value.numerator.bit_length() + value.denominator.bit_length() <= MAX_CONSTANT_BITS else None


def proportional(gold: Term, predicted: Term, *, only_sign: bool, positive: bool = False) -> bool:
    """Whether one function is a constant multiple of the other, other than zero.

    Args:
        gold: a function.
        predicted: another one.
        only_sign: whether the multiple must be 1 or -1.
        positive: whether it must be positive.

    Raises:
        Undecided: as :func:`equal`.
    """
    names = sorted(symbols(gold) | symbols(predicted))
    if not symbols(gold) & symbols(predicted):
        return False
    if only_sign:
        return equal(gold, predicted) or equal(gold, Term("neg", (predicted,)))
    for number in range(len(_PRIMES)):
        point = {
            name: Fraction(_PRIMES[(number + place) % len(_PRIMES)], 1 + place) for place, name in enumerate(names)
        }
        factor = _ratio(gold, predicted, point)
        if factor is None:
            continue
        value = decimal_value(factor, ROUGH_BITS) if positive else Fraction(1)
        return value is not None and value > 0 and equal(gold, Term("mul", (factor, predicted)))
    raise Undecided("no point where both sides have a value")


def _ratio(gold: Term, predicted: Term, point: Mapping[str, Fraction]) -> Term | None:
    """The quotient at a point, as a constant expression; None where there is none."""
    bottom = substituted(predicted, point)
    top = substituted(gold, point)
    zero = Term("num")
    try:
        if equal(bottom, zero) or equal(top, zero):
            return None
    except Undecided:
        return None
    return Term("div", (top, bottom))


def substituted(term: Term, point: Mapping[str, Fraction]) -> Term:
    """The expression with numbers for its variables."""
    if term.op == "sym" and term.name in point:
        return Term("num", value=point[term.name])
    if not term.args:
        return term
    inner = {name: value for name, value in point.items() if not (term.op in ("sum", "prod") and name == term.name)}
    arguments = tuple(substituted(argument, inner) for argument in term.args)
    return Term(term.op, arguments, term.value, term.name)


def decimal_value(term: Term, bits: int) -> Fraction | None:
    """A real constant as a fraction that is right to about `bits` binary digits; None for others."""
    try:
        return rational(term, {})
    except (Inexact, Undefined):
        pass
    try:
        run = Evaluation(2 * bits, {}, real=True)
        value = run.value(term)
    except (Inexact, Undefined, Undecided):
        return None
    sign, mantissa, exponent, _ = value._mpf_
    number = Fraction(int(mantissa)) * Fraction(2) ** exponent
    return -number if sign else number
