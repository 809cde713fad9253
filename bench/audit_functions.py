r"""The audit's classes of functions: polynomials, identities, floors and parity, residues, equations."""

from __future__ import annotations

import random
from fractions import Fraction

from audit_write import Case, frac, signed, term


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
        (
            r"\cos 2x",
            [r"1-2\sin^2 x", r"2\cos^2 x-1", r"\cos^2 x-\sin^2 x"],
            [r"1-2\cos^2 x", r"1+2\sin^2 x", r"\cos x", r"\sin 2x", r"2\cos x"],
        ),
        (
            rf"{a}\sin 2x",
            [rf"{2 * a}\sin x\cos x", rf"{2 * a}\cos(x)\sin(x)"],
            [rf"{a}\sin x\cos x", rf"{2 * a}\sin x", rf"-{a}\sin 2x", rf"{a + 1}\sin 2x", rf"{a}\cos 2x"],
        ),
        (
            rf"\frac{{1}}{{x}}-\frac{{1}}{{x+{a}}}",
            [rf"\frac{{{a}}}{{x(x+{a})}}", rf"\frac{{{a}}}{{x^2+{a}x}}"],
            [
                rf"\frac{{{a + 1}}}{{x(x+{a})}}",
                rf"\frac{{{a}}}{{x(x-{a})}}",
                rf"\frac{{{a}}}{{x^2+{a}}}",
                rf"\frac{{1}}{{x}}+\frac{{1}}{{x+{a}}}",
            ],
        ),
        (
            rf"(x+{a})^2-{b}",
            [rf"x^2+{2 * a}x+{a * a}-{b}", rf"-{b}+({a}+x)^2"],
            [rf"(x-{a})^2-{b}", rf"(x+{a})^2+{b}", rf"x^2+{a}x+{a * a - b}", rf"x^2+{a * a}-{b}"],
        ),
        (
            rf"e^{{{2 * a}x}}",
            [rf"(e^{{{a}x}})^2", rf"e^{{{a}x}} \cdot e^{{{a}x}}"],
            [rf"e^{{{a}x}}", rf"e^{{{2 * a + 1}x}}", rf"2e^{{{a}x}}", rf"e^{{-{2 * a}x}}", rf"e^{{{a}x^2}}"],
        ),
        (r"|x|", [r"\sqrt{x^2}", r"|-x|"], ["x", "-x", r"|x|+1", r"x^2"]),
        (rf"\frac{{x^2-{a * a}}}{{x+{a}}}", [rf"x-{a}"], [rf"x+{a}", rf"x-{a + 1}", rf"{a}-x"]),
        (
            rf"\frac{{{a}x+{b}}}{{2}}",
            [rf"{frac(Fraction(a, 2))}x+{frac(Fraction(b, 2))}", rf"\frac{{1}}{{2}}({a}x+{b})"],
            [
                rf"{a}x+{frac(Fraction(b, 2))}",
                rf"\frac{{{a}x-{b}}}{{2}}",
                rf"\frac{{{a}x+{b + 1}}}{{2}}",
                rf"\frac{{{a}x+{b}}}{{3}}",
            ],
        ),
    ]
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
            ("of a fraction", rf"\lfloor \frac{{{p}}}{{{q}}} \rfloor"),
            ("of one more", rf"\lfloor \frac{{{p + q}}}{{{q}}} \rfloor - 1"),
        ]
        wrong = [
            ("of one more", rf"\lfloor \frac{{{p + q}}}{{{q}}} \rfloor"),
            ("one less", rf"\lfloor \frac{{{p}}}{{{q}}} \rfloor - 1"),
        ]
        if p % q:
            wrong += [("ceiling", rf"\lceil \frac{{{p}}}{{{q}}} \rceil"), ("not rounded", rf"\frac{{{p}}}{{{q}}}")]
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


def circles(draw: random.Random) -> Case:
    a, b = draw.sample([-7, -5, -4, -2, -1, 1, 2, 3, 5, 6], 2)
    r = draw.randint(2, 9)

    def around(a: int, b: int, square: int | str) -> str:
        return f"(x{signed(-a)})^2+(y{signed(-b)})^2={square}"

    linear = f"{signed(-2 * a, 'x')}{signed(-2 * b, 'y')}"
    constant = a * a + b * b - r * r
    right = [
        ("the radius squared", around(a, b, f"{r}^2")),
        ("expanded", f"x^2+y^2{linear}={-constant}"),
        ("the sides exchanged", f"{r * r}=(y{signed(-b)})^2+(x{signed(-a)})^2"),
        ("a multiple", f"2x^2+2y^2{signed(-4 * a, 'x')}{signed(-4 * b, 'y')}={-2 * constant}"),
    ]
    wrong = [
        ("the centre's signs", around(-a, -b, r * r)),
        ("a centre's sign", around(-a, b, r * r)),
        ("the centre exchanged", around(b, a, r * r)),
        ("centre + 1", around(a + 1, b, r * r)),
        ("radius for its square", around(a, b, r)),
        ("square + 1", around(a, b, r * r + 1)),
        ("the square alone", str(r * r)),
        ("a hyperbola", f"(x{signed(-a)})^2-(y{signed(-b)})^2={r * r}"),
    ]
    return Case(around(a, b, r * r), right, wrong)
