"""Exact arithmetic where it can be exact, else with many digits: what the audit's reader of LaTeX computes with."""

from __future__ import annotations

from fractions import Fraction
from math import factorial
from typing import Any, Final

from mpmath import MPContext

mp: Final[Any] = MPContext()
Value = Any
"""A Fraction where the value is exact, else an mpmath number."""
DIGITS: Final = 60
"""Of inexact arithmetic; what must be told apart differs by far more than `CLOSE` of its size, or is exact."""
mp.dps = DIGITS
CLOSE: Final = mp.mpf(10) ** -40
ZERO: Final = mp.mpf(10) ** -50
"""What rounding leaves of nothing; the generators' inexact values are below a million."""
MAX_EXACT_BITS: Final = 100_000
MAX_FACTORIAL: Final = 2_000


class CannotRead(Exception):
    """Text outside the generators' forms, or a value outside the bounds."""


class Undefined(Exception):
    """No value at this point."""


def to_mp(value: Value) -> Value:
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _both(a: Value, b: Value) -> tuple[Value, Value]:
    return (a, b) if isinstance(a, Fraction) and isinstance(b, Fraction) else (to_mp(a), to_mp(b))


def add(a: Value, b: Value) -> Value:
    a, b = _both(a, b)
    return a + b


def multiply(a: Value, b: Value) -> Value:
    a, b = _both(a, b)
    return a * b


def divide(a: Value, b: Value) -> Value:
    if b == 0:
        raise Undefined
    a, b = _both(a, b)
    return a / b


def modulo(a: Value, b: Value) -> Value:
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)) or b == 0:
        raise CannotRead("a remainder of what is not exact")
    return a % b


def floor(value: Value) -> Fraction:
    if isinstance(value, Fraction):
        return Fraction(value.numerator // value.denominator)
    nearest = mp.nint(value)
    if abs(value - nearest) < CLOSE:
        raise CannotRead("a floor too close to an integer")
    return Fraction(int(mp.floor(value)))


def fact(value: Value) -> Fraction:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise CannotRead("a factorial out of bounds")
    return Fraction(factorial(int(value)))


def choose(n: Value, k: Value) -> Fraction:
    if not (isinstance(n, Fraction) and isinstance(k, Fraction)) or k < 0 or k.denominator != 1:
        raise CannotRead("a binomial out of bounds")
    value = Fraction(1)
    for index in range(int(k)):
        value = value * (n - index) / (index + 1)
    return value


def power(base: Value, exponent: Value) -> Value:
    if base == 0 and (isinstance(exponent, Fraction) and exponent <= 0):
        raise Undefined
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(int(exponent))
        if bits > MAX_EXACT_BITS:
            raise CannotRead("a power out of bounds")
        return base ** int(exponent)
    if isinstance(exponent, Fraction) and exponent.numerator == 1 and exponent.denominator > 1:
        return root(base, Fraction(exponent.denominator))
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return to_mp(base) ** int(exponent)
    return mp.power(to_mp(base), to_mp(exponent))


def root(value: Value, degree: Value) -> Value:
    """The principal root; of a negative number the real one where the degree is odd."""
    if not isinstance(degree, Fraction) or degree.denominator != 1:
        raise CannotRead("the degree of a root")
    order = int(degree)
    if isinstance(value, Fraction) and value >= 0:
        top, bottom = _exact_root(value.numerator, order), _exact_root(value.denominator, order)
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
    plain = to_mp(value)
    if order % 2 and isinstance(plain, mp.mpf) and plain < 0:
        return -mp.root(-plain, order)
    return mp.sqrt(plain) if order == 2 else mp.root(plain, order)


def _exact_root(value: int, order: int) -> int | None:
    low, high = 0, 1 << (value.bit_length() // order + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**order <= value else (low, middle - 1)
    return low if low**order == value else None


def same_value(a: Value, b: Value) -> bool:
    """Exactly, where both are exact; else to `CLOSE` of their size, or to `ZERO` where they cancel to nothing."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = to_mp(a), to_mp(b)
    return bool(abs(a - b) <= max(CLOSE * max(abs(a), abs(b)), ZERO))
