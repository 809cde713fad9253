r"""The audit's classes of structured answers: lists, intervals, matrices, quantities, numerals of a base, letters."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Final

import audit_shapes as shapes
from audit_truth import same_number
from audit_write import Case, frac, grouped, term

CONVERSIONS: Final = (
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("kg", "g", 1000),
    ("hours", "minutes", 60),
    ("L", "mL", 1000),
    ("minutes", "seconds", 60),
)
OTHER_UNITS: Final = {
    "km": "m",
    "m": "m^2",
    "kg": "g",
    "hours": "minutes",
    "L": "mL",
    "minutes": "hours",
    "m/s": "km/h",
    "cm^2": "cm",
    "m/s^2": "m/s",
    "m^2": "cm^2",
}


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
            frac(part + draw.choice([Fraction(-1), Fraction(1), Fraction(1, 8)])),
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
        ("an entry missing", written(plain[:place] + plain[place + 1 :]))
        if len(plain) > 2
        else ("an entry more", written([*plain, "1"])),
        ("an entry more", written([*plain, plain[0]])),
        ("a sign", written([*plain[:place], f"-{plain[place]}", *plain[place + 1 :]])),
        ("first and last exchanged", written([plain[-1], *plain[1:-1], plain[0]])),
    ]
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
    written = grouped(str(value * factor), ",")
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
