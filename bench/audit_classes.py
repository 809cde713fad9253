r"""The audit's classes of functions and structured answers, the table of all classes, and the pairs that they make."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import audit_numbers as numbers
import audit_shapes as shapes
from audit_numbers import Case, frac, signed, term
from audit_truth import same_function, same_number

FRAMES: Final = (
    r"Therefore the answer is $\boxed{%s}$.",
    r"\[ \boxed{%s} \]",
    r"So we get $\boxed{%s}$, which is the final answer.",
)
MAX_DRAWS: Final = 20
"""Cases drawn in a row without a new pair before a class is taken to be exhausted."""


def poly(coefficients: list[int], variable: str = "x") -> str:
    """Coefficients from the highest power down; zeros are left out."""
    degree = len(coefficients) - 1
    text = ""
    for place, value in enumerate(coefficients):
        exponent = degree - place
        unit = (
            ""
            if exponent == 0
            else variable
            if exponent == 1
            else f"{variable}^{{{exponent}}}"
            if exponent > 9
            else f"{variable}^{exponent}"
        )
        if value:
            text += signed(value, unit) if unit else signed(value)
    return (text or "0").removeprefix("+")


def times(a: list[int], b: list[int]) -> list[int]:
    """Product of two polynomials."""
    out = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return out


def polynomials(draw: random.Random) -> Case:
    roots = [draw.choice([-7, -5, -4, -3, -2, -1, 1, 2, 3, 4, 6, 8]) for _ in range(draw.randint(2, 4))]
    lead = draw.choice([1, 1, 2, -3])
    full = [lead]
    for root in roots:
        full = times(full, [1, -root])
    factored = ("" if lead == 1 else str(lead)) + "".join(f"(x{signed(-root)})" for root in roots)
    expanded = poly(full)
    gold, other = draw.choice([(expanded, factored), (factored, expanded)])
    case = Case(gold, [("factored or expanded", other)])
    ascending = [(value, degree) for degree, value in enumerate(reversed(full)) if value]
    case.right.append(
        (
            "ascending",
            "".join(signed(v, "" if d == 0 else "x" if d == 1 else f"x^{d}") for v, d in ascending).removeprefix("+"),
        )
    )
    half = [roots[0], roots[1]]
    rest = [lead]
    for root in roots[2:]:
        rest = times(rest, [1, -root])
    case.right.append(("half factored", f"({poly(times([1, -half[0]], [1, -half[1]]))})({poly(rest)})"))
    place = draw.randrange(len(full))
    changed = list(full)
    changed[place] += draw.choice([1, -1])
    case.wrong = [
        ("a coefficient", poly(changed)),
        ("the sign", poly([-value for value in full])),
        ("one more", f"{expanded}+1"),
        (
            "another root",
            factored.replace(f"(x{signed(-roots[0])})", f"(x{signed(-roots[0] - 1) if roots[0] != -1 else '-2'})", 1),
        ),
        ("a power more", poly([*full, 0])),
        ("another name", expanded.replace("x", "y")),
    ]
    if full[place] != 0:
        flipped = list(full)
        flipped[place] = -flipped[place]
        case.wrong.append(("a sign", poly(flipped)))
    return case


def sparse(draw: random.Random) -> Case:
    """High powers, where values at small points hide a low term."""
    n, c = draw.choice([draw.randint(10, 40), draw.randint(100, 2100)]), draw.randint(1, 9)
    gold = f"x^{{{n}}}+{c}"
    right = [("reordered", f"{c}+x^{{{n}}}"), ("a product", f"x \\cdot x^{{{n - 1}}}+{c}")]
    wrong = [
        ("no low term", f"x^{{{n}}}"),
        ("low term + 1", f"x^{{{n}}}+{c + 1}"),
        ("a term more", f"x^{{{n}}}+x+{c}"),
        ("exponent + 1", f"x^{{{n + 1}}}+{c}"),
        ("sign", f"x^{{{n}}}-{c}"),
    ]
    return Case(gold, right, wrong)


def identities(draw: random.Random) -> Case:
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    kinds: list[tuple[str, list[str], list[str]]] = [
        (r"\cos 2x", [r"1-2\sin^2 x", r"2\cos^2 x-1", r"\cos^2 x-\sin^2 x"], [r"1-2\cos^2 x", r"1+2\sin^2 x", r"\cos x", r"\sin 2x", r"2\cos x"]),
        (rf"{a}\sin 2x", [rf"{2 * a}\sin x\cos x", rf"{2 * a}\cos(x)\sin(x)"], [rf"{a}\sin x\cos x", rf"{2 * a}\sin x", rf"-{a}\sin 2x", rf"{a + 1}\sin 2x", rf"{a}\cos 2x"]),
        (rf"\frac{{1}}{{x}}-\frac{{1}}{{x+{a}}}", [rf"\frac{{{a}}}{{x(x+{a})}}", rf"\frac{{{a}}}{{x^2+{a}x}}"], [rf"\frac{{{a + 1}}}{{x(x+{a})}}", rf"\frac{{{a}}}{{x(x-{a})}}", rf"\frac{{{a}}}{{x^2+{a}}}", rf"\frac{{1}}{{x}}+\frac{{1}}{{x+{a}}}"]),
        (rf"(x+{a})^2-{b}", [rf"x^2+{2 * a}x+{a * a}-{b}", rf"-{b}+({a}+x)^2"], [rf"(x-{a})^2-{b}", rf"(x+{a})^2+{b}", rf"x^2+{a}x+{a * a - b}", rf"x^2+{a * a}-{b}"]),
        (rf"e^{{{2 * a}x}}", [rf"(e^{{{a}x}})^2", rf"e^{{{a}x}} \cdot e^{{{a}x}}"], [rf"e^{{{a}x}}", rf"e^{{{2 * a + 1}x}}", rf"2e^{{{a}x}}", rf"e^{{-{2 * a}x}}", rf"e^{{{a}x^2}}"]),
        (r"|x|", [r"\sqrt{x^2}", r"|-x|"], ["x", "-x", r"|x|+1", r"x^2"]),
        (rf"\frac{{x^2-{a * a}}}{{x+{a}}}", [rf"x-{a}"], [rf"x+{a}", rf"x-{a + 1}", rf"{a}-x"]),
        (rf"\frac{{{a}x+{b}}}{{2}}", [rf"{frac(Fraction(a, 2))}x+{frac(Fraction(b, 2))}", rf"\frac{{1}}{{2}}({a}x+{b})"], [rf"{a}x+{frac(Fraction(b, 2))}", rf"\frac{{{a}x-{b}}}{{2}}", rf"\frac{{{a}x+{b + 1}}}{{2}}", rf"\frac{{{a}x+{b}}}{{3}}"]),
    ]  # fmt: skip
    gold, right, wrong = draw.choice(kinds)
    return Case(gold, [("an identity", text) for text in right], [("a near identity", text) for text in wrong])


def floors(draw: random.Random) -> Case:
    """Functions of an integer n with floors, ceilings and parity; and floors of numbers."""
    d, a = draw.randint(2, 9), draw.randint(0, 9)
    tail = f"+{a}" if a else ""
    down, up = r"\left\lfloor\frac{%s}{%d}\right\rfloor", r"\left\lceil\frac{%s}{%d}\right\rceil"
    kind = draw.choice(["floor", "ceiling", "parity", "number"])
    if kind == "number":
        p, q = draw.randint(20, 999), draw.randint(2, 19)
        gold = str(p // q)
        right = [
            ("of a fraction", r"\lfloor \frac{%d}{%d} \rfloor" % (p, q)),
            ("of one more", r"\lfloor \frac{%d}{%d} \rfloor - 1" % (p + q, q)),
        ]
        wrong = [
            ("of one more", r"\lfloor \frac{%d}{%d} \rfloor" % (p + q, q)),
            ("one less", r"\lfloor \frac{%d}{%d} \rfloor - 1" % (p, q)),
        ]
        if p % q:
            wrong += [("ceiling", r"\lceil \frac{%d}{%d} \rceil" % (p, q)), ("not rounded", rf"\frac{{{p}}}{{{q}}}")]
        return Case(gold, right, wrong)
    if kind == "parity":
        gold = r"\left\lfloor\frac{n}{2}\right\rfloor" + tail
        right = [
            ("by a power", r"\frac{2n-1+(-1)^n}{4}" + tail),
            ("by the ceiling", r"n-\left\lceil\frac{n}{2}\right\rceil" + tail),
            ("a ceiling", r"\left\lceil\frac{n-1}{2}\right\rceil" + tail),
        ]
        wrong = [
            ("parity exchanged", r"\frac{2n+1-(-1)^n}{4}" + tail),
            ("ceiling", r"\left\lceil\frac{n}{2}\right\rceil" + tail),
            ("no floor", r"\frac{n}{2}" + tail),
            ("of odd only", r"\frac{n-1}{2}" + tail),
            ("one more", rf"\left\lfloor\frac{{n}}{{2}}\right\rfloor+{a + 1}"),
        ]
        return Case(gold, right, wrong)
    one, other = (down, up) if kind == "floor" else (up, down)
    shift = -(d - 1) if kind == "floor" else d - 1
    gold = one % ("n", d) + tail
    right = [
        ("the other one", other % (f"n{signed(shift)}", d) + tail),
        ("a whole inside", one % (f"n+{d}", d) + signed(a - 1)),
        ("plain brackets", gold.replace(r"\left", "").replace(r"\right", "")),
    ]
    wrong = [
        ("the other one", other % ("n", d) + tail),
        ("n + 1", one % ("n+1", d) + tail),
        ("divisor + 1", one % ("n", d + 1) + tail),
        ("one more", one % ("n", d) + f"+{a + 1}"),
        ("not rounded", rf"\frac{{n}}{{{d}}}" + tail),
        ("a step further", other % (f"n{signed(shift + (1 if shift < 0 else -1))}", d) + tail),
    ]
    return Case(gold, right, [w for w in wrong if w[1] != gold])


def residues(draw: random.Random) -> Case:
    m = draw.randint(3, 40)
    a = draw.randint(1, m - 1)
    right = [("an equivalence", rf"x \equiv {a} \pmod{{{m}}}"), ("as it is", rf"{a} \pmod{{{m}}}")]
    wrong = [
        ("residue + 1", rf"{a + 1} \pmod{{{m}}}"),
        ("modulus + 1", rf"{a} \pmod{{{m + 1}}}"),
        ("equivalence + 1", rf"x \equiv {a + 1} \pmod{{{m}}}"),
    ]
    if 2 * a != m:
        wrong.append(("the sign", rf"-{a} \pmod{{{m}}}"))
    return Case(rf"{a} \pmod{{{m}}}", right, wrong)


def entry(draw: random.Random) -> tuple[str, str, str]:
    """A number, the same written otherwise, and another number."""
    kind = draw.choice(["integer", "integer", "fraction", "root", "pi"])
    value = draw.randint(-20, 60)
    if kind == "integer":
        return (
            str(value),
            draw.choice([str(value), f"{value}.0", rf"\frac{{{2 * value}}}{{2}}"]),
            str(value + draw.choice([-1, 1])),
        )
    if kind == "fraction":
        part = Fraction(2 * value + 1, draw.choice([2, 4, 8]))
        return (
            frac(part),
            draw.choice([str(float(part)), frac(part, r"\dfrac")]),
            frac(part + draw.choice([-1, 1, Fraction(1, 8)])),
        )
    c, k = draw.choice([2, 3, 5, 7]), draw.randint(2, 9)
    if kind == "root":
        return term(k, rf"\sqrt{{{c}}}"), rf"\sqrt{{{c * k * k}}}", term(k + 1, rf"\sqrt{{{c}}}")
    return rf"\frac{{{k}\pi}}{{{c * 11}}}", rf"\frac{{{k}}}{{{c * 11}}}\pi", rf"\frac{{{k + 1}\pi}}{{{c * 11}}}"


def tuples(draw: random.Random) -> Case:
    entries = [entry(draw) for _ in range(draw.randint(2, 4))]
    plain = [e[0] for e in entries]
    place = draw.randrange(len(entries))

    def written(items: list[str]) -> str:
        return f"({', '.join(items)})"

    case = Case(written(plain))
    case.right = [
        ("entries written otherwise", written([e[1] for e in entries])),
        ("sized brackets", rf"\left({','.join(plain)}\right)"),
    ]
    if len(entries) <= 3:
        case.right.append(("assignments", ", ".join(f"{n}={e}" for n, e in zip("xyz", plain, strict=False))))
    case.wrong = [
        ("an entry", written([*plain[:place], entries[place][2], *plain[place + 1 :]])),
        ("an entry missing", written(plain[:place] + plain[place + 1 :])) if len(plain) > 2 else ("an entry more", written([*plain, "1"])),
        ("an entry more", written([*plain, plain[0]])),
        ("a sign", written([*plain[:place], f"-{plain[place]}", *plain[place + 1 :]])),
        ("first and last exchanged", written([plain[-1], *plain[1:-1], plain[0]])),
    ]  # fmt: skip
    if plain[place].startswith("-") or plain[place] == "0":
        case.wrong = [w for w in case.wrong if w[0] != "a sign"]
    if same_number(plain[0], plain[-1]):
        case.wrong = [w for w in case.wrong if "exchanged" not in w[0]]
    return case


def sets(draw: random.Random) -> Case:
    entries: list[tuple[str, str, str]] = []
    while len(entries) < draw.randint(2, 5):
        new = entry(draw)
        if not any(same_number(new[0], old[0]) or same_number(new[2], old[0]) for old in entries):
            entries.append(new)
    plain = [e[0] for e in entries]
    braces = draw.random() < 0.5
    shuffled = draw.sample(entries, len(entries))
    place = draw.randrange(len(entries))

    def written(items: list[str]) -> str:
        return rf"\{{{', '.join(items)}\}}" if braces else ", ".join(items)

    case = Case(written(plain))
    case.right = [
        ("in another order", written([e[0] for e in shuffled])),
        ("items written otherwise", written([e[1] for e in shuffled])),
    ]
    if not braces:
        case.right.append(("and", ", ".join(plain[:-1]) + rf"\text{{ and }}{plain[-1]}"))
        case.right.append(("in braces", rf"\{{{', '.join(plain)}\}}"))
    replaced = [*plain[:place], entries[place][2], *plain[place + 1 :]]
    case.wrong = [
        ("an item", written(replaced)),
        ("an item missing", written(plain[:place] + plain[place + 1 :])),
        ("an item more", written([*plain, "61"])),
    ]
    case.wrong.append(("an item twice for another", written([*plain[:place], plain[place - 1], *plain[place + 1 :]])))
    return case


def intervals(draw: random.Random) -> Case:
    a = draw.randint(-20, 10)
    b = a + draw.randint(1, 15)
    low, high = draw.choice(["(", "["]), draw.choice([")", "]"])
    other_low, other_high = "([".replace(low, ""), ")]".replace(high, "")
    less, more = (r"\le" if low == "[" else "<"), (r"\le" if high == "]" else "<")
    greater = r"\ge" if low == "[" else ">"
    kind = draw.choice(["bounded", "bounded", "ray", "union"])
    if kind == "bounded":
        gold = f"{low}{a},{b}{high}"
        right = [
            ("an inequality", f"{a} {less} x {more} {b}"),
            ("sized brackets", rf"\left{low}{a}, {b}\right{high}"),
            ("an end written otherwise", f"{low}{a}, \\frac{{{2 * b}}}{{2}}{high}"),
        ]
        wrong = [
            ("lower bracket", f"{other_low}{a},{b}{high}"),
            ("upper bracket", f"{low}{a},{b}{other_high}"),
            ("lower end", f"{low}{a - 1},{b}{high}"),
            ("upper end", f"{low}{a},{b + 1}{high}"),
            ("inequality's end", f"{a} {less} x {more} {b + 1}"),
            ("inequality's sign", f"{a} {'<' if less != '<' else chr(92) + 'le'} x {more} {b}"),
        ]
        return Case(gold, right, wrong)
    if kind == "ray":
        gold = rf"{low}{a},\infty)"
        right = [
            ("an inequality", f"x {greater} {a}"),
            ("a plus", rf"{low}{a},+\infty)"),
            ("sized brackets", rf"\left{low}{a},\infty\right)"),
        ]
        wrong = [
            ("bracket", rf"{other_low}{a},\infty)"),
            ("end", rf"{low}{a + 1},\infty)"),
            ("the other way", rf"(-\infty,{a})"),
            ("bounded", rf"{low}{a},{abs(a) + 1000})"),
            ("inequality's end", f"x {greater} {a - 1}"),
        ]
        return Case(gold, right, wrong)
    first, second = rf"(-\infty,{a}{high}", rf"{low}{b},\infty)"
    lesser = r"\le" if high == "]" else "<"
    right = [
        ("in another order", rf"{second}\cup {first}"),
        ("inequalities", rf"x {lesser} {a} \text{{ or }} x {greater} {b}"),
    ]
    wrong = [
        ("a part missing", second),
        ("an end", rf"{first}\cup {low}{b + 1},\infty)"),
        ("a bracket", rf"(-\infty,{a}{other_high}\cup {second}"),
        ("between", f"({a},{b})"),
        ("inequality's end", rf"x {lesser} {a - 1} \text{{ or }} x {greater} {b}"),
    ]
    return Case(rf"{first}\cup {second}", right, wrong)


def matrices(draw: random.Random) -> Case:
    rows, columns = draw.choice([(2, 2), (2, 2), (3, 3), (2, 3), (3, 1)])
    cells = [[entry(draw) for _ in range(columns)] for _ in range(rows)]

    def written(which: list[list[str]], brackets: str = "pmatrix") -> str:
        body = r" \\ ".join(" & ".join(row) for row in which)
        return rf"\begin{{{brackets}}} {body} \end{{{brackets}}}"

    plain = [[cell[0] for cell in row] for row in cells]
    i, j = draw.randrange(rows), draw.randrange(columns)
    changed = [list(row) for row in plain]
    changed[i][j] = cells[i][j][2]
    case = Case(written(plain))
    case.right = [
        ("other brackets", written(plain, "bmatrix")),
        ("entries written otherwise", written([[cell[1] for cell in row] for row in cells])),
    ]
    case.wrong = [("an entry", written(changed)), ("a row missing", written(plain[:-1]))]
    if not shapes.same_matrix(written(plain), written(plain[::-1])):
        case.wrong.append(("rows exchanged", written(plain[::-1])))
    transposed = [list(row) for row in zip(*plain, strict=True)]
    if rows == columns and not shapes.same_matrix(written(plain), written(transposed)):
        case.wrong.append(("transposed", written(transposed)))
    return case


CONVERSIONS: Final = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("kg", "g", 1000),
    ("hours", "minutes", 60),
    ("L", "mL", 1000),
    ("minutes", "seconds", 60),
)
OTHER_UNITS: Final = {"km": "m", "m": "m^2", "kg": "g", "hours": "minutes", "L": "mL", "minutes": "hours", "m/s": "km/h", "cm^2": "cm", "m/s^2": "m/s", "m^2": "cm^2"}  # fmt: skip


def units(draw: random.Random) -> Case:
    value = draw.randint(2, 400)
    if draw.random() < 0.6:
        unit, smaller, factor = draw.choice(CONVERSIONS)
        gold = rf"{value}\text{{ {unit}}}"
        right = [
            ("converted", rf"{value * factor}\text{{ {smaller}}}"),
            ("roman", rf"{value}\ \mathrm{{{unit}}}".replace(r"\ ", r"\,")),
        ]
        wrong = [
            ("another unit", rf"{value}\text{{ {smaller}}}"),
            ("converted + 1", rf"{value * factor + 1}\text{{ {smaller}}}"),
            ("converted the wrong way", rf"{frac(Fraction(value, factor))}\text{{ {smaller}}}"),
        ]
    else:
        unit = draw.choice(["m/s", "cm^2", "m/s^2", "m^2"])
        gold = rf"{value}\text{{ {unit}}}" if "/" in unit else rf"{value}\text{{ {unit[:-2]}}}^2"
        right = [("as it is", gold), ("braced", gold.replace("}^2", "}^{2}"))]
        other = OTHER_UNITS[unit]
        wrong = [
            (
                "another unit",
                rf"{value}\text{{ {other}}}" if "^" not in other else rf"{value}\text{{ {other[:-2]}}}^2",
            )
        ]
        wrong.append(
            (
                "the cube" if "^2" in gold else "squared",
                gold.replace("}^2", "}^3")
                if "^2" in gold and "/" not in unit
                else rf"{value}\text{{ m/s^2}}"
                if unit == "m/s"
                else rf"{value}\text{{ m/s}}",
            )
        )
        wrong = [w for w in wrong if "^3" not in w[1]]
    wrong += [
        ("one more", gold.replace(str(value), str(value + 1), 1)),
        ("a digit more", gold.replace(str(value), f"{value}0", 1)),
        ("the sign", "-" + gold),
    ]
    return Case(gold, right, wrong)


def percents(draw: random.Random) -> Case:
    if draw.random() < 0.5:
        value = draw.randint(1, 99)
        gold = rf"{value}\%"
        right = [
            ("in words", rf"{value}\text{{ percent}}"),
            ("a fraction", frac(Fraction(value, 100))),
            ("a decimal", f"{value / 100:.2f}"),
            ("a zero behind", rf"{value}.0\%"),
        ]
        wrong = [
            ("one more", rf"{value + 1}\%"),
            ("a tenth", rf"{value / 10:.1f}\%"),
            ("decimal + 0.01", f"{value / 100 + 0.01:.2f}"),
            ("a fraction of it", rf"{value / 100:.2f}\%"),
            ("a thousandth", f"{value / 1000:.3f}"),
            ("the sign", rf"-{value}\%"),
        ]
        return Case(gold, right, wrong)
    value, (word, factor) = draw.randint(2, 90), draw.choice(list(shapes.SCALES.items()))
    gold = rf"{value}\text{{ {word}}}"
    written = numbers.grouped(str(value * factor), ",")
    if draw.random() < 0.5:
        gold, right = written, [("in words", gold)]
    else:
        right = [("the digits", str(value * factor)), ("with commas", written)]
    other = draw.choice([name for name in shapes.SCALES if name != word])
    wrong = [
        ("another scale", rf"{value}\text{{ {other}}}"),
        ("no scale", str(value)),
        ("one more", rf"{value + 1}\text{{ {word}}}"),
        ("a zero more", f"{value * factor}0"),
    ]
    return Case(gold, right, wrong)


def bases(draw: random.Random) -> Case:
    base = draw.choice([2, 2, 3, 5, 7, 8])
    digits = str(draw.randint(1, base - 1)) + "".join(str(draw.randrange(base)) for _ in range(draw.randint(2, 10)))
    place = draw.randrange(1, len(digits))
    changed = digits[:place] + str((int(digits[place]) + 1) % base) + digits[place + 1 :]
    words = {number: word for word, number in shapes.BASE_WORDS.items()}
    right = [("braced", f"{digits}_{{{base}}}"), ("in brackets", f"({digits})_{{{base}}}")]
    if base in words:
        right.append(("in words", rf"{digits}_{{\text{{{words[base]}}}}}"))
    wrong = [
        ("a digit", f"{changed}_{{{base}}}"),
        ("base + 1", f"{digits}_{{{base + 1}}}"),
        ("a zero more", f"{digits}0_{{{base}}}"),
        ("a one in front", f"1{digits}_{{{base}}}"),
    ]
    return Case(f"{digits}_{base}" if base < 10 else f"{digits}_{{{base}}}", right, wrong)


def choices(draw: random.Random) -> Case:
    letter, other = draw.sample("ABCDE", 2)
    right = [
        ("text", rf"\text{{{letter}}}"),
        ("brackets", f"({letter})"),
        ("bold", rf"\textbf{{({letter})}}"),
        ("roman", rf"\mathrm{{{letter}}}"),
        ("text in brackets", rf"\text{{({letter})}}"),
    ]
    wrong = [
        ("another", other),
        ("another in text", rf"\text{{({other})}}"),
        ("two", f"{letter}, {other}"),
        ("or", rf"\text{{{letter} or {other}}}"),
        ("two in text", rf"\text{{{other} and {letter}}}"),
        ("another in bold", rf"\textbf{{({other})}}"),
    ]
    return Case(letter, right, wrong)


def equations(draw: random.Random) -> Case:
    a, b, k = draw.choice([-5, -3, -2, 2, 3, 4, 7]), draw.choice([-9, -4, -1, 1, 2, 5, 8]), draw.randint(2, 4)
    right = [
        ("the right side", f"{a}x{signed(b)}"),
        ("reordered", f"y={b}{signed(a, 'x')}"),
        ("all on one side", f"{term(a, 'x')}-y{signed(b)}=0"),
        ("a multiple", f"{k}y={k * a}x{signed(k * b)}"),
    ]
    wrong = [
        ("slope + 1", f"y={term(a + 1, 'x')}{signed(b)}"),
        ("constant", f"y={a}x{signed(b + 1) if b != -1 else '-2'}"),
        ("sign", f"y=-({a}x{signed(b)})"),
        ("side's sign", f"{term(a, 'x')}+y{signed(b)}=0"),
        ("exchanged", f"x={a}y{signed(b)}"),
    ]
    return Case(f"y={a}x{signed(b)}", right, wrong)


Same = Callable[[str, str], bool]
CLASSES: Final[dict[str, tuple[Callable[[random.Random], Case], Same]]] = {
    "integers": (numbers.integers, same_number),
    "powers and tiny numbers": (numbers.powers, same_number),
    "rationals": (numbers.rationals, same_number),
    "decimals": (numbers.decimals, same_number),
    "surds": (numbers.surds, same_number),
    "logarithms, e and pi": (numbers.logs, same_number),
    "trigonometric values": (numbers.trigonometric, same_number),
    "complex numbers": (numbers.complexes, same_number),
    "factorials and binomials": (numbers.counting, same_number),
    "polynomials": (polynomials, same_function),
    "high powers of x": (sparse, same_function),
    "identities": (identities, same_function),
    "floors and parity": (floors, same_function),
    "residues": (residues, shapes.same_residue),
    "equations": (equations, shapes.same_equation),
    "tuples": (tuples, shapes.same_tuple),
    "sets and lists": (sets, shapes.same_set),
    "intervals": (intervals, shapes.same_intervals),
    "matrices": (matrices, shapes.same_matrix),
    "units": (units, shapes.same_quantity),
    "percents and scale words": (percents, shapes.same_amount),
    "bases": (bases, shapes.same_based),
    "choices": (choices, shapes.same_choice),
    "two candidates": (numbers.two_candidates, shapes.same_alone),
}
"""Class -> what makes it, and what reads the truth from the text."""


@dataclass(frozen=True)
class Pair:
    """A gold answer and a response with a truth.

    Attributes:
        kind: its class.
        change: how a right answer is written, or what was changed in a wrong one.
        gold: the gold answer.
        answer: the final answer.
        response: a response that ends in it.
        correct: the truth.
    """

    kind: str
    change: str
    gold: str
    answer: str
    response: str
    correct: bool


class WrongTruth(Exception):
    """A generator says another thing about a pair than the independent reader."""


def make_pairs(kind: str, count: int, seed: int) -> Iterator[Pair]:
    """Distinct pairs of a class, each with its truth read again from the text.

    Args:
        kind: of `CLASSES`.
        count: at most so many; a small class is exhausted before.
        seed: of the drawing.

    Raises:
        WrongTruth: the generator errs.
    """
    generate, same = CLASSES[kind]
    draw = random.Random(f"{kind} {seed}")
    seen: set[tuple[str, str]] = set()
    idle = 0
    while len(seen) < count and idle < MAX_DRAWS:
        before = len(seen)
        case = generate(draw)
        for correct, written in ((True, case.right), (False, case.wrong)):
            for change, text in written:
                if (case.gold, text) in seen or len(seen) >= count:
                    continue
                seen.add((case.gold, text))
                yield checked(Pair(kind, change, case.gold, text, draw.choice(FRAMES) % text, correct), same)
        idle = idle + 1 if len(seen) == before else 0


def checked(pair: Pair, same: Same) -> Pair:
    """The pair, when the independent reader agrees about it.

    Raises:
        WrongTruth: it does not.
    """
    if same(pair.gold, pair.answer) != pair.correct:
        raise WrongTruth(
            f"{pair.kind}, {pair.change}: {pair.answer} is not {'right' if pair.correct else 'wrong'} for {pair.gold}"
        )
    return pair
