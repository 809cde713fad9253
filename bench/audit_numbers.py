r"""The audit's classes of single numbers: each makes a gold answer, right answers written otherwise, and wrong ones.

A class draws a value, writes it in several ways, and changes it by as little as can be. What it says is right or
wrong is checked by :mod:`audit_truth`, which reads the text again.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Final

from audit_write import Case, frac, grouped, other_digit, signed, term

MAX_DIGITS: Final = 400
MAX_POWER: Final = 1_300
"""Of two: 392 digits."""


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
