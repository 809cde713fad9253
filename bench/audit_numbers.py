r"""The audit's classes of single numbers: each makes a gold answer, right answers written otherwise, and wrong ones.

A class draws a value, writes it in several ways, and changes it by as little as can be. What it says is right or wrong
is checked by :mod:`audit_truth`, which reads the text again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import comb, factorial, gcd
from typing import Final

MAX_DIGITS: Final = 400
MAX_POWER: Final = 1_300
"""Of two: 392 digits."""


@dataclass
class Case:
    """A gold answer with answers to it.

    Attributes:
        gold: as a data set writes it.
        right, wrong: (how it was written or changed, text).
    """

    gold: str
    right: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)


def frac(value: Fraction, command: str = r"\frac") -> str:
    """A fraction in LaTeX; a whole number without a bar."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}{command}{{{abs(value.numerator)}}}{{{value.denominator}}}"


def signed(value: int, unit: str = "") -> str:
    """With its sign in front; 1 in front of a unit is not written."""
    size = "" if unit and abs(value) == 1 else str(abs(value))
    return ("-" if value < 0 else "+") + size + unit


def term(value: int, unit: str) -> str:
    """As :func:`signed`, without a plus."""
    return signed(value, unit).removeprefix("+")


def grouped(digits: str, separator: str) -> str:
    """Thousands apart."""
    head = len(digits) % 3
    parts = ([digits[:head]] if head else []) + [digits[i : i + 3] for i in range(head, len(digits), 3)]
    return separator.join(parts)


def other_digit(digits: str, draw: random.Random, *, keep_first: bool = False) -> str:
    """One digit changed; never to a leading zero."""
    place = draw.randrange(1 if keep_first and len(digits) > 1 else 0, len(digits))
    choices = [d for d in "0123456789" if d != digits[place] and (place or d != "0" or len(digits) == 1)]
    return digits[:place] + draw.choice(choices) + digits[place + 1 :]


def size(draw: random.Random) -> int:
    """Digits of an integer: half short, half of any length."""
    return draw.choice([draw.randint(1, 6), draw.randint(1, 25), draw.randint(20, MAX_DIGITS)])


def integers(draw: random.Random) -> Case:
    count = size(draw)
    digits = str(draw.randint(10 ** (count - 1), 10**count - 1))
    value = int(digits)
    sign = draw.choice(["", "", "-"])
    case = Case(sign + digits, [("as it is", sign + digits), ("an assignment", f"x = {sign}{digits}")])
    case.right.append(("a decimal point", f"{sign}{digits}.0"))
    if len(digits) > 3:
        for name, separator in (("comma", ","), ("braced comma", "{,}"), ("thin space", r"\,")):
            case.right.append((f"thousands by {name}", sign + grouped(digits, separator)))
    part = draw.randint(1, value)
    if not sign:
        case.right.append(("a sum", f"{value - part}+{part}"))
    case.wrong = [
        ("+1", f"{sign}{value + 1}"),
        ("-1", f"{sign}{value - 1}" if value > 1 else f"{sign}{value + 2}"),
        ("a digit", sign + other_digit(digits, draw)),
        ("the sign", digits if sign else "-" + digits),
        ("a zero more", sign + digits + "0"),
        ("half a unit more", f"{sign}{digits}.5"),
    ]
    place = draw.randrange(len(digits))
    if len(digits) > 1 and digits[place] != digits[place - 1] and "0" not in (digits[place], digits[place - 1]):
        swapped = list(digits)
        swapped[place], swapped[place - 1] = swapped[place - 1], swapped[place]
        case.wrong.append(("two digits exchanged", sign + "".join(swapped)))
    return case


def powers(draw: random.Random) -> Case:
    kind = draw.choice(["offset", "offset", "tiny", "near one", "scientific"])
    k = draw.choice([draw.randint(5, 70), draw.randint(60, 200), draw.randint(100, MAX_POWER)])
    if kind == "tiny":
        gold = draw.choice([f"2^{{-{k}}}", rf"\frac{{1}}{{2^{{{k}}}}}"])
        right = [("as a fraction", rf"\frac{{1}}{{2^{{{k}}}}}"), ("as a power", f"2^{{-{k}}}")]
        right.append(("of a half", rf"\left(\frac{{1}}{{2}}\right)^{{{k}}}"))
        wrong = [
            ("exponent + 1", f"2^{{-{k + 1}}}"),
            ("exponent - 1", f"2^{{-{k - 1}}}"),
            ("the sign", f"-2^{{-{k}}}"),
        ]
        return Case(gold, right, [*wrong, ("zero", "0"), ("base", f"3^{{-{k}}}"), ("exponent's sign", f"2^{{{k}}}")])
    if kind == "near one":
        gold = rf"1-\frac{{1}}{{2^{{{k}}}}}"
        right = [("one fraction", rf"\frac{{2^{{{k}}}-1}}{{2^{{{k}}}}}"), ("a power", f"1-2^{{-{k}}}")]
        wrong = [
            ("one", "1"),
            ("exponent + 1", rf"1-\frac{{1}}{{2^{{{k + 1}}}}}"),
            ("sign", rf"1+\frac{{1}}{{2^{{{k}}}}}"),
        ]
        return Case(gold, right, wrong)
    if kind == "scientific":
        mantissa, power = draw.randint(11, 99), draw.randint(3, 60) * draw.choice([1, -1])
        gold = rf"{mantissa / 10} \times 10^{{{power}}}"
        right = [
            ("another mantissa", rf"{mantissa} \times 10^{{{power - 1}}}"),
            ("a dot", rf"{mantissa / 10} \cdot 10^{{{power}}}"),
        ]
        wrong = [
            ("exponent + 1", rf"{mantissa / 10} \times 10^{{{power + 1}}}"),
            ("exponent's sign", rf"{mantissa / 10} \times 10^{{{-power}}}"),
        ]
        return Case(
            gold,
            right,
            [*wrong, ("mantissa", rf"{(mantissa + 1) / 10} \times 10^{{{power}}}"), ("no power", f"{mantissa / 10}")],
        )
    base, offset = draw.choice([2, 2, 3, 5, 7, 10]), draw.choice([-1, 1, -2, 3, 7])
    k = int(k / {2: 1, 3: 1.6, 5: 2.4, 7: 2.9, 10: 3.4}[base]) + 1
    value = base**k + offset
    case = Case(f"{base}^{{{k}}}{signed(offset)}")
    case.right = [
        ("the digits", str(value)),
        ("reordered", f"{offset}+{base}^{{{k}}}"),
        ("a power less", rf"{base} \cdot {base}^{{{k - 1}}}{signed(offset)}"),
    ]
    if k % 2 == 0:
        case.right.append(("of the square", f"{base * base}^{{{k // 2}}}{signed(offset)}"))
        if offset == -1:
            case.right.append(("two factors", rf"({base}^{{{k // 2}}}-1)({base}^{{{k // 2}}}+1)"))
    case.wrong = [
        ("no offset", f"{base}^{{{k}}}"),
        ("offset's sign", f"{base}^{{{k}}}{signed(-offset)}"),
        ("offset + 1", f"{base}^{{{k}}}{signed(offset + 1)}" if offset != -1 else f"{base}^{{{k}}}-2"),
        ("exponent + 1", f"{base}^{{{k + 1}}}{signed(offset)}"),
        ("exponent - 1", f"{base}^{{{k - 1}}}{signed(offset)}"),
        ("the digits + 1", str(value + 1)),
        ("a digit", other_digit(str(value), draw)),
    ]
    return case


def rationals(draw: random.Random) -> Case:
    bound = draw.choice([12, 100, 10_000, 10**12])
    value = Fraction(draw.randint(1, bound), draw.randint(2, bound)) * draw.choice([1, 1, -1])
    if value.denominator == 1:
        value += Fraction(1, 3)
    p, q = value.numerator, value.denominator
    factor = draw.randint(2, 9)
    case = Case(frac(value))
    case.right = [
        ("display style", frac(value, r"\dfrac")),
        ("a slash", f"{p}/{q}"),
        ("not reduced", rf"\frac{{{p * factor}}}{{{q * factor}}}"),
        ("a difference", f"{frac(value + 1)}-1"),
        ("the sign above", rf"\frac{{{p}}}{{{q}}}"),
    ]
    whole, rest = divmod(abs(p), q)
    if whole:
        case.right.append(("a mixed number", f"{'-' if p < 0 else ''}{whole}\\frac{{{rest}}}{{{q}}}"))
    places = next((n for n in range(1, 6) if 10**n % q == 0), 0)
    if places:
        case.right.append(
            ("a decimal", f"{'-' if p < 0 else ''}{abs(p) // q}.{abs(p) % q * 10**places // q:0{places}d}")
        )
    elif q <= 10**4:
        case.wrong.append(("rounded", f"{p / q:.3f}"))
    if p > 0 and q in (3, 9, 11, 33, 99):
        case.right.append(
            ("a repeating decimal", f"{'-' if p < 0 else ''}{whole}.\\overline{{{rest * 99 // q:02d}}}")
        )
    case.wrong += [
        ("numerator + 1", frac(Fraction(p + 1, q))),
        ("denominator + 1", frac(Fraction(p, q + 1))),
        ("the sign", frac(-value)),
        ("upside down", frac(1 / value)) if abs(p) != q else ("doubled", frac(2 * value)),
        ("one more", frac(value + 1)),
        ("no denominator", str(p)),
    ]
    return case


def decimals(draw: random.Random) -> Case:
    places = draw.randint(1, 4)
    value = draw.randint(1, 10 ** draw.randint(1, 5) - 1)  # six digits and more are a rounding by the policy
    if value % 10 == 0:
        value += 1
    sign = draw.choice(["", "", "-"])

    def written(number: int, digits: int) -> str:
        return f"{sign}{number // 10**digits}.{number % 10**digits:0{digits}d}"

    gold = written(value, places)
    case = Case(gold)
    case.right = [("a zero behind", gold + "0"), ("a fraction", frac(Fraction(gold))), ("an assignment", f"x={gold}")]
    if abs(Fraction(gold)) < 1:
        case.right.append(("no zero in front", gold.replace("0.", ".", 1)))
    case.wrong = [
        ("last digit + 1", written(value + 1, places)),
        ("a digit more", gold + str(draw.randint(1, 9))),
        ("zeros and a one behind", gold + "0001"),
        ("the point to the left", written(value, places + 1)),
        ("the sign", gold[1:] if sign else "-" + gold),
        ("no point", f"{sign}{value}"),
    ]
    return case


def surds(draw: random.Random) -> Case:
    radicand = draw.choice([2, 3, 5, 6, 7, 10, 11, 13, 14, 15, 17, 19, 21, 22, 23])
    a, b, d = (
        draw.randint(-20, 20),
        draw.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 12]),
        draw.choice([1, 1, 2, 3, 4, 7]),
    )
    root = rf"\sqrt{{{radicand}}}"
    if a == 0 or draw.random() < 0.3:
        gold = term(b, root)
        case = Case(gold)
        inner = rf"\sqrt{{{b * b * radicand}}}"
        case.right = [
            ("inside the root", ("-" if b < 0 else "") + inner),
            (
                "a power",
                term(b, rf"\cdot {radicand}^{{\frac{{1}}{{2}}}}").replace(
                    r"\cdot", r"1 \cdot" if abs(b) == 1 else r"\cdot"
                ),
            ),
            ("over the root", rf"\frac{{{b * radicand}}}{{{root}}}"),
        ]
        case.wrong = [
            ("radicand + 1", term(b, rf"\sqrt{{{radicand + 1}}}")),
            ("factor", term(b + 1 if b != -1 else 2, root)),
            ("the sign", term(-b, root)),
            ("no root", str(b * radicand)),
            ("a cube root", term(b, rf"\sqrt[3]{{{radicand}}}")),
            ("rounded", f"{b * radicand**0.5:.4f}"),
        ]
        return case

    def whole(x: int, y: int, z: int, under: str = root) -> str:
        return rf"\frac{{{x}{signed(y, under)}}}{{{z}}}" if z != 1 else f"{x}{signed(y, under)}"

    case = Case(whole(a, b, d))
    parts = f"{frac(Fraction(a, d))}{'+' if b > 0 else '-'}{frac(Fraction(abs(b), d))}{root}"
    case.right = [
        ("reordered", rf"\frac{{{term(b, root)}{signed(a)}}}{{{d}}}" if d != 1 else f"{term(b, root)}{signed(a)}"),
        ("in parts", parts),
        ("not reduced", whole(2 * a, 2 * b, 2 * d)),
        ("minus outside", rf"-{whole(-a, -b, d)}" if d != 1 else f"-({whole(-a, -b, d)})"),
    ]
    case.wrong = [
        ("first + 1", whole(a + 1, b, d)),
        ("conjugate", whole(a, -b, d)),
        ("the sign", whole(-a, -b, d)),
        ("radicand + 1", whole(a, b, d, rf"\sqrt{{{radicand + 1}}}")),
        ("denominator + 1", whole(a, b, d + 1)),
        ("factor", whole(a, b + 1 if b != -1 else 1, d)),
        ("rounded", f"{(a + b * radicand**0.5) / d:.4f}"),
    ]
    return case


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
        tail = signed(offset) if offset else ""
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
