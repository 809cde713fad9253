"""Exact values: rational numbers of bounded size, and remainders modulo a large prime for those that are larger."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final

from phimr_nemo.verify.algebra.term import Inexact, Term, Undefined, has

MAX_BITS: Final = 1 << 17
"""The longest numerator or denominator that is written down, about 39,000 decimal digits."""
MAX_SERIES_TERMS: Final = 20_000
MAX_FACTORIAL: Final = 10_000
MAX_MODULAR_FACTORIAL: Final = 1_000_000
MODULUS_BITS: Final = 127
_SCRAMBLE: Final = (1 << 127) - 1

Point = Mapping[str, Fraction]
_HASH_MULTIPLIER: Final = 0x9E3779B97F4A7C15F39CC0605CEDC835


def bits(value: Fraction) -> int:
    """The length of the longer one of numerator and denominator."""
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def rational(term: Term, point: Point) -> Fraction:
    """The exact value.

    Raises:
        Inexact: it is no rational number, or has more than `MAX_BITS` bits.
        Undefined: there is none.
    """
    operation = _RATIONAL.get(term.op)
    if operation is None:
        raise Inexact(term.op)
    value = operation(term, point)
    if bits(value) > MAX_BITS:
        raise Inexact("too large")
    return value


def _values(term: Term, point: Point) -> list[Fraction]:
    return [rational(argument, point) for argument in term.args]


def _symbol(term: Term, point: Point) -> Fraction:
    if term.name not in point:
        raise Inexact(term.name)
    return point[term.name]


def _add(term: Term, point: Point) -> Fraction:
    left, right = _values(term, point)
    return left + right


def _multiply(term: Term, point: Point) -> Fraction:
    left, right = _values(term, point)
    return left * right


def _divide(term: Term, point: Point) -> Fraction:
    top, bottom = _values(term, point)
    if bottom == 0:
        raise Undefined
    return top / bottom


def _power(term: Term, point: Point) -> Fraction:
    exponent = rational(term.args[1], point)
    base = rational(term.args[0], point)
    if base == 0:
        if exponent <= 0:
            if exponent == 0:
                return Fraction(1)
            raise Undefined
        return Fraction(0)
    if base == 1:
        return base
    if exponent.denominator != 1:
        return _rational_root(base, exponent.denominator) ** exponent.numerator
    if bits(base) > 1 and abs(exponent) * (bits(base) - 1) > MAX_BITS:
        raise Inexact("too large")
    return base ** int(exponent) if abs(base) != 1 else (base if exponent % 2 else Fraction(1))


def _rational_root(value: Fraction, degree: int) -> Fraction:
    """The root where it is rational.

    Raises:
        Inexact: it is not.
    """
    if value < 0 and degree % 2 == 0:
        raise Inexact("a root of a negative number")
    if degree > MAX_BITS:
        raise Inexact("too large")
    top, bottom = integer_root(abs(value.numerator), degree), integer_root(value.denominator, degree)
    if top**degree != abs(value.numerator) or bottom**degree != value.denominator:
        raise Inexact("irrational")
    return Fraction(-top if value < 0 else top, bottom)


def integer_root(value: int, degree: int) -> int:
    """The largest integer whose `degree`-th power is not above `value`, which is not negative."""
    if degree == 2:
        return math.isqrt(value)
    if value < 2 or degree == 1:
        return value
    low, high = 1, 1 << (value.bit_length() // degree + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle)
    return low


def _root(term: Term, point: Point) -> Fraction:
    degree = rational(term.args[1], point)
    if degree.denominator != 1 or degree < 2:
        raise Inexact("a root of that degree")
    return _rational_root(rational(term.args[0], point), int(degree))


def _natural(value: Fraction, limit: int) -> int:
    if value.denominator != 1 or value < 0:
        raise Undefined
    if value > limit:
        raise Inexact("too large")
    return int(value)


def _factorial(term: Term, point: Point) -> Fraction:
    return Fraction(math.factorial(_natural(rational(term.args[0], point), MAX_FACTORIAL)))


def _binomial(term: Term, point: Point) -> Fraction:
    top, chosen = _values(term, point)
    count = _natural(chosen, MAX_FACTORIAL)
    if top.denominator == 1 and top >= 0:
        return Fraction(math.comb(_natural(top, MAX_FACTORIAL), count))
    value = Fraction(1)
    for index in range(min(count, MAX_SERIES_TERMS)):
        value = value * (top - index) / (index + 1)
        if bits(value) > MAX_BITS:
            raise Inexact("too large")
    return value


def _permutations(term: Term, point: Point) -> Fraction:
    top, chosen = (_natural(value, MAX_FACTORIAL) for value in _values(term, point))
    return Fraction(math.perm(top, chosen))


def _of_integers(function: Callable[..., int]) -> Callable[[Term, Point], Fraction]:
    def apply(term: Term, point: Point) -> Fraction:
        values = _values(term, point)
        if any(value.denominator != 1 for value in values):
            raise Undefined
        return Fraction(function(*map(int, values)))

    return apply


def _modulo(term: Term, point: Point) -> Fraction:
    value, modulus = _values(term, point)
    if modulus == 0:
        raise Undefined
    return value - modulus * math.floor(value / modulus)


def _series(term: Term, point: Point) -> Fraction:
    total = Fraction(1 if term.op == "prod" else 0)
    for index in series_range(term, point):
        value = rational(term.args[2], {**point, term.name: Fraction(index)})
        total = total * value if term.op == "prod" else total + value
        if bits(total) > MAX_BITS:
            raise Inexact("too large")
    return total


def series_range(term: Term, point: Point) -> range:
    """The indices of a sum or product.

    Raises:
        Inexact: a limit that is no integer, or too many terms.
    """
    low, high = rational(term.args[0], point), rational(term.args[1], point)
    if low.denominator != 1 or high.denominator != 1:
        raise Undefined
    if high < low:
        raise Undefined  # an empty series: whether it counts depends on the author
    if high - low > MAX_SERIES_TERMS:
        raise Inexact("too many terms")
    return range(int(low), int(high) + 1)


def scrambled(name: str, values: tuple[Fraction, ...]) -> Fraction:
    """A value for a function that is only named: the same for the same arguments, otherwise unrelated."""
    state = int.from_bytes(name.encode("utf-8"), "little") + 1
    for value in values:
        for part in (value.numerator, value.denominator):
            state = (state * _HASH_MULTIPLIER + part) % _SCRAMBLE
    return Fraction(state % 9973 + 3, 11 + state % 5)


def _apply(term: Term, point: Point) -> Fraction:
    return scrambled(term.name, tuple(_values(term, point)))


_RATIONAL: Final[dict[str, Callable[[Term, Point], Fraction]]] = {
    "num": lambda term, _: term.value,
    "sym": _symbol,
    "add": _add,
    "neg": lambda term, point: -rational(term.args[0], point),
    "mul": _multiply,
    "div": _divide,
    "pow": _power,
    "root": _root,
    "factorial": _factorial,
    "binom": _binomial,
    "perm": _permutations,
    "floor": lambda term, point: Fraction(math.floor(rational(term.args[0], point))),
    "ceil": lambda term, point: Fraction(math.ceil(rational(term.args[0], point))),
    "abs": lambda term, point: abs(rational(term.args[0], point)),
    "max": lambda term, point: max(_values(term, point)),
    "min": lambda term, point: min(_values(term, point)),
    "gcd": _of_integers(math.gcd),
    "lcm": _of_integers(math.lcm),
    "mod": _modulo,
    "sum": _series,
    "prod": _series,
    "apply": _apply,
}


# Modulo a prime --------------------------------------------------------------------------------------


def prime_for(*texts: str) -> int:
    """A prime that nobody can know who has not written the texts: no text can hold a multiple of its own prime.

    Two different values agree modulo it with a probability of about 2^-127.
    """
    from sympy import nextprime

    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int(nextprime(int.from_bytes(digest, "little") >> (256 - MODULUS_BITS) | 1 << (MODULUS_BITS - 1)))


def modular(term: Term, point: Mapping[str, int], modulus: int, *, prime: bool = True) -> int:
    """The value modulo a prime, of sums, products, quotients, integer powers, factorials and binomials.

    Args:
        term: the expression.
        point: remainders for its variables.
        modulus: what the remainders are of.
        prime: whether the modulus is one, so that exponents count modulo the prime minus one.

    Raises:
        Inexact: another operation, or an exponent that is not an integer of bounded size.
        Undefined: a division by zero.
    """
    match term.op:
        case "num":
            return _quotient(term.value.numerator, term.value.denominator, modulus)
        case "sym":
            if term.name not in point:
                raise Inexact(term.name)
            return point[term.name] % modulus
        case "add" | "mul" | "div":
            left, right = (modular(argument, point, modulus, prime=prime) for argument in term.args)
            if term.op == "div":
                return _quotient(left, right, modulus)
            return (left + right if term.op == "add" else left * right) % modulus
        case "neg":
            return -modular(term.args[0], point, modulus, prime=prime) % modulus
        case "pow":
            return _modular_power(term, point, modulus, prime=prime)
        case "factorial" | "binom":
            return _modular_factorials(term, modulus)
        case _:
            raise Inexact(term.op)


def _quotient(top: int, bottom: int, modulus: int) -> int:
    if bottom == 1:
        return top % modulus
    if bottom % modulus == 0:
        raise Undefined
    try:
        return top * pow(bottom, -1, modulus) % modulus
    except ValueError:
        raise Inexact("no inverse") from None


def _modular_power(term: Term, point: Mapping[str, int], modulus: int, *, prime: bool) -> int:
    base = modular(term.args[0], point, modulus, prime=prime)
    exponent = term.args[1]
    if base == 0:
        raise Inexact("a power of zero")
    try:
        power = rational(exponent, {})
        if power.denominator != 1:
            raise Inexact("a root")
        reduced = int(power)
    except Inexact:
        if not prime or has(exponent, "div"):
            raise
        # Fermat: the exponent counts modulo the prime minus one.
        reduced = modular(exponent, {}, modulus - 1, prime=False)
    try:
        return pow(base, reduced, modulus)
    except ValueError:
        raise Inexact("no inverse") from None


def _modular_factorials(term: Term, modulus: int) -> int:
    values = [rational(argument, {}) for argument in term.args]
    numbers = [_natural(value, MAX_MODULAR_FACTORIAL) for value in values]
    if term.op == "factorial":
        return _falling(numbers[0], numbers[0], modulus)
    top, chosen = numbers
    if chosen > top:
        return 0
    chosen = min(chosen, top - chosen)
    return _quotient(_falling(top, chosen, modulus), _falling(chosen, chosen, modulus), modulus)


def _falling(top: int, count: int, modulus: int) -> int:
    value = 1
    for factor in range(top - count + 1, top + 1):
        value = value * factor % modulus
    return value
