r"""The audit's classes of constants: logarithms, trigonometric values, complex numbers, counting; two candidates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from math import comb, factorial, gcd
from typing import Final

from audit_write import Case, frac, other_digit, signed, term


def logs(draw: random.Random) -> Case:
    a, b, n = draw.randint(2, 12), draw.randint(2, 60), draw.randint(2, 6)
    kind = draw.choice(["base", "sum", "power", "exponential", "pi"])
    if kind == "base":
        while b == a:
            b += 1
        right = [
            ("natural", rf"\frac{{\ln {b}}}{{\ln {a}}}"),
            ("of a power", rf"\frac{{1}}{{{n}}}\log_{{{a}}} {b**n}"),
            ("upside down", rf"\frac{{1}}{{\log_{{{b}}} {a}}}"),
        ]
        wrong = [
            ("argument + 1", rf"\log_{{{a}}} {b + 1}"),
            ("base + 1", rf"\log_{{{a + 1}}} {b}"),
            ("exchanged", rf"\log_{{{b}}} {a}"),
            ("natural", rf"\ln {b}"),
            ("sign", rf"-\log_{{{a}}} {b}"),
        ]
        return Case(rf"\log_{{{a}}} {b}", right, wrong)
    if kind == "sum":
        right = [("a sum", rf"\ln {a} + \ln {b}"), ("a difference", rf"\ln {a * b * n} - \ln {n}")]
        wrong = [
            ("argument + 1", rf"\ln {a * b + 1}"),
            ("a product", rf"\ln {a} \cdot \ln {b}"),
            ("one more", rf"\ln {a * b} + 1"),
            ("base ten", rf"\log_{{10}} {a * b}"),
            ("a sum inside", rf"\ln {a * b + a}"),
        ]
        return Case(rf"\ln {a * b}", right, wrong)
    if kind == "power":
        right = [("a factor", rf"{n} \ln {a}"), ("of the inverse", rf"-\ln \frac{{1}}{{{a**n}}}")]
        wrong = [
            ("factor + 1", rf"{n + 1} \ln {a}"),
            ("argument + 1", rf"{n} \ln {a + 1}"),
            ("sign", rf"-{n} \ln {a}"),
            ("a power of it", rf"(\ln {a})^{{{n}}}"),
        ]
        return Case(rf"\ln {a**n}", right, wrong)
    if kind == "pi":
        value = Fraction(a, n)
        right = [("in front", f"{frac(value)}\\pi"), ("not reduced", rf"\frac{{{2 * a}\pi}}{{{2 * n}}}")]
        wrong = [
            ("numerator + 1", rf"\frac{{{a + 1}\pi}}{{{n}}}"),
            ("sign", rf"-\frac{{{a}\pi}}{{{n}}}"),
            ("square", rf"\frac{{{a}\pi^2}}{{{n}}}"),
            ("no pi", frac(value)),
            ("rounded", f"{a * 3.14159265 / n:.3f}"),
        ]
        return Case(rf"\frac{{{a}\pi}}{{{n}}}", right, wrong)
    right = [
        ("a product", rf"e^{{{n - 1}}} \cdot e + {b}"),
        ("reordered", rf"{b} + e^{{{n}}}"),
        ("as exp", rf"\exp({n}) + {b}"),
    ]
    wrong = [
        ("exponent + 1", rf"e^{{{n + 1}}} + {b}"),
        ("one more", rf"e^{{{n}}} + {b + 1}"),
        ("sign", rf"e^{{-{n}}} + {b}"),
        ("factor", rf"{n} e + {b}"),
    ]
    return Case(rf"e^{{{n}}} + {b}", right, wrong)


EXACT_ANGLES: Final[Sequence[tuple[str, str]]] = (
    (r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt{5}}{4}"),
    (r"\cos\frac{2\pi}{5}", r"\frac{\sqrt{5}-1}{4}"),
    (r"\sin\frac{\pi}{12}", r"\frac{\sqrt{6}-\sqrt{2}}{4}"),
    (r"\cos\frac{\pi}{12}", r"\frac{\sqrt{6}+\sqrt{2}}{4}"),
    (r"\tan\frac{\pi}{12}", r"2-\sqrt{3}"),
    (r"\tan\frac{\pi}{8}", r"\sqrt{2}-1"),
    (r"\sin\frac{\pi}{3}", r"\frac{\sqrt{3}}{2}"),
    (r"\cos\frac{\pi}{4}", r"\frac{\sqrt{2}}{2}"),
    (r"\tan\frac{\pi}{3}", r"\sqrt{3}"),
    (r"\sin\frac{\pi}{6}", r"\frac{1}{2}"),
    (r"\sin^2\frac{\pi}{8}", r"\frac{2-\sqrt{2}}{4}"),
    (r"\cos\frac{\pi}{8}", r"\frac{\sqrt{2+\sqrt{2}}}{2}"),
    (r"\arctan\frac{1}{2}+\arctan\frac{1}{3}", r"\frac{\pi}{4}"),
    (r"\arcsin\frac{1}{2}", r"\frac{\pi}{6}"),
)


def trigonometric(draw: random.Random) -> Case:
    multiple, offset = draw.randint(1, 9), draw.choice([0, 0, -3, 1, 2])
    if draw.random() < 0.5:
        angle, exact = draw.choice(EXACT_ANGLES)
        factor = "" if multiple == 1 else rf"{multiple} \cdot "
        tail = signed(offset) if offset and exact != r"\frac{1}{2}" else ""  # nothing has no other sign
        left, right = f"{factor}\\left({angle}\\right){tail}", f"{factor}\\left({exact}\\right){tail}"
        gold, other = draw.choice([(left, right), (right, left)])
        wrong = [
            ("one more", f"{other}+1"),
            ("the sign", f"-\\left({other}\\right)"),
            ("doubled", f"2 \\cdot \\left({other}\\right)"),
        ]
        wrong.append(("a trifle more", f"{other}+\\frac{{1}}{{10^{{9}}}}"))
        return Case(gold, [("the exact value", other), ("as it is", gold)], wrong)
    n, k = draw.choice([7, 9, 10, 11, 13, 14, 15, 18, 20, 24]), draw.randint(1, 2)
    name, cofunction = draw.choice([(r"\sin", r"\cos"), (r"\cos", r"\sin")])
    gold = rf"{name} \frac{{{k}\pi}}{{{n}}}"
    rest = Fraction(1, 2) - Fraction(k, n)
    case = Case(gold)
    case.right = [
        ("the cofunction", rf"{cofunction} \left({frac(rest)}\pi\right)"),
        ("a turn more", rf"{name} \frac{{{k + 2 * n}\pi}}{{{n}}}"),
    ]
    if 180 * k % n == 0:
        case.right.append(("in degrees", rf"{name} {180 * k // n}^\circ"))
    case.wrong = [
        ("another multiple", rf"{name} \frac{{{k + 1}\pi}}{{{n}}}"),
        ("another denominator", rf"{name} \frac{{{k}\pi}}{{{n + 1}}}"),
        ("the cofunction of it", rf"{cofunction} \frac{{{k}\pi}}{{{n}}}"),
        ("the sign", rf"-{name} \frac{{{k}\pi}}{{{n}}}"),
        ("half a turn more", rf"{name} \frac{{{k + n}\pi}}{{{n}}}"),
    ]
    return case


def complexes(draw: random.Random) -> Case:
    a, b = draw.choice([-9, -4, -3, -2, -1, 1, 2, 3, 5, 8]), draw.choice([-7, -5, -3, -2, -1, 1, 2, 4, 6, 9])
    norm = a * a + b * b
    gold = f"{a}{signed(b, 'i')}"
    case = Case(gold)
    case.right = [
        ("reordered", f"{term(b, 'i')}{signed(a)}"),
        ("one over", rf"\frac{{{norm}}}{{{a}{signed(-b, 'i')}}}"),
        ("times i", f"i({b}{signed(-a, 'i')})"),
        ("i cubed", f"{a}{signed(-b, 'i^3')}"),
    ]
    case.wrong = [
        ("conjugate", f"{a}{signed(-b, 'i')}"),
        ("the sign", f"{-a}{signed(-b, 'i')}"),
        ("real part + 1", f"{a + 1}{signed(b, 'i')}"),
        ("imaginary part + 1", f"{a}{signed(b + 1 if b != -1 else 1, 'i')}"),
        ("no i", str(a + b)),
        ("real part only", str(a)),
        ("i squared", f"{a}{signed(b, 'i^2')}"),
    ]
    if a != b:
        case.wrong.append(("exchanged", f"{b}{signed(a, 'i')}"))
    return case


def counting(draw: random.Random) -> Case:
    if draw.random() < 0.3:
        n = draw.randint(4, 60)
        value = factorial(n)
        right = [("the digits", str(value)), ("a factor out", rf"{n} \cdot {n - 1}!")]
        wrong = [
            ("n + 1", f"{n + 1}!"),
            ("n - 1", f"{n - 1}!"),
            ("the digits + 1", str(value + 1)),
            ("halved", rf"\frac{{{n}!}}{{2}}"),
        ]
        return Case(f"{n}!", right, wrong)
    n = draw.randint(6, 120)
    k = draw.randint(2, n - 2)
    value, gold = comb(n, k), rf"\binom{{{n}}}{{{k}}}"
    case = Case(gold)
    case.right = [
        ("the digits", str(value)),
        ("the complement", rf"\binom{{{n}}}{{{n - k}}}"),
        ("by factorials", rf"\frac{{{n}!}}{{{k}!{n - k}!}}"),
        ("Pascal's rule", rf"\binom{{{n - 1}}}{{{k - 1}}}+\binom{{{n - 1}}}{{{k}}}"),
    ]
    case.wrong = [
        ("n + 1", rf"\binom{{{n + 1}}}{{{k}}}"),
        ("the digits + 1", str(value + 1)),
        ("a digit", other_digit(str(value), draw)),
        ("ordered", rf"\frac{{{n}!}}{{{n - k}!}}"),
        ("upside down", rf"\frac{{1}}{{{gold}}}"),
    ]
    if 2 * k + 1 != n:
        case.wrong.append(("k + 1", rf"\binom{{{n}}}{{{k + 1}}}"))
    return case


def two_candidates(draw: random.Random) -> Case:
    """A wrong number beside the right one, in every disguise."""
    value = draw.randint(2, 999)
    other = value + draw.choice([-1, 1, 2, 10])
    gold = (
        str(value) if draw.random() < 0.7 else frac(Fraction(value, value + 1 if gcd(value, value + 1) == 1 else 1))
    )
    wrong_value = str(other)
    first, second = draw.choice([(gold, wrong_value), (wrong_value, gold)])
    forms = {
        "or": rf"{first} \text{{ or }} {second}",
        "and": rf"{first} \text{{ and }} {second}",
        "comma": f"{first}, {second}",
        "equals": f"{first} = {second}",
        "a chain": f"x = {first} = {second}",
        "approximately": rf"{first} \approx {second}",
        "semicolon": f"{first}; {second}",
        "plus-minus one": rf"{gold} \pm 1",
    }
    return Case(gold, [("alone", gold)], list(forms.items()))
