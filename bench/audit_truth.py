r"""The truth about two written answers, found without any grader: an independent reader and exact or long arithmetic.

The audit's generators know which of their answers are right because they made them; this module reads the LaTeX that
came out and decides again, so that a generator that errs is found. It reads only the forms that the generators write
and raises :class:`CannotRead` on anything else; it is no grader.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Final

from audit_arithmetic import (
    CannotRead,
    Undefined,
    Value,
    add,
    choose,
    divide,
    fact,
    floor,
    modulo,
    mp,
    multiply,
    power,
    root,
    same_value,
    to_mp,
)

Names = Mapping[str, Value]

POINTS: Final = 12
FEWEST_POINTS: Final = 4
"""Of the points at which both functions are defined."""
INTEGERS: Final = range(-7, 18)
"""Every residue of the small moduli, of both signs."""
_TOKEN = re.compile(
    r"\s*(?P<number>\d+(?:(?:,|\{,\}|\\,|\\!)\d{3})*(?:\.\d+|\.(?=\\overline))?(?:\\overline\{\d+\})?|\.\d+)"
    r"|\s*(?P<name>\\[A-Za-z]+|[A-Za-z])|\s*(?P<sign>[-+*/^_(){}\[\]|!,=<>&;:.])"
)
FUNCTIONS: Final[dict[str, Callable[..., Value]]] = {
    r"\sin": mp.sin, r"\cos": mp.cos, r"\tan": mp.tan, r"\cot": mp.cot, r"\sec": mp.sec, r"\csc": mp.csc,
    r"\arctan": mp.atan, r"\arcsin": mp.asin, r"\arccos": mp.acos,
    r"\ln": mp.log, r"\log": mp.log, r"\exp": mp.exp,
}  # fmt: skip


def number(text: str) -> Fraction:
    r"""A numeral: separators of thousands, a decimal part, digits under ``\overline`` that repeat."""
    plain = re.sub(r",|\{,\}|\\,|\\!", "", text)
    plain, _, repeating = plain.partition(r"\overline{")
    value = Fraction(plain + "0" if plain.endswith(".") else plain)
    if repeating:
        digits = repeating[:-1]
        places = len(plain.partition(".")[2])
        value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    return value


class Reader:
    """Recursive descent over one expression; evaluates as it reads.

    Args:
        text: LaTeX without spaces that matter.
        names: variable -> value.
    """

    def __init__(self, text: str, names: Names) -> None:
        text = re.sub(r"\\left|\\right|\\displaystyle|\\;|\\:|\\ |~|\$", " ", text)
        text = re.sub(r"\\[dt]frac", r"\\frac", text).replace(r"\operatorname", "").replace("**", "^")
        self.tokens: list[str] = []
        place = 0
        text = text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise CannotRead(text[place : place + 20])
            self.tokens.append(match.group().strip())
            place = match.end()
        self.at = 0
        self.names = names

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise CannotRead(f"{expected or 'something'} expected, {token or 'nothing'} found")
        self.at += 1
        return token

    def whole(self) -> Value:
        value = self.sum()
        if self.peek():
            raise CannotRead(f"{self.peek()} is left over")
        return value

    def sum(self) -> Value:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            other = self.product()
            value = add(value, other if sign == "+" else -other)
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            token = self.peek()
            if token in (r"\cdot", r"\times", "*"):
                self.take()
                value = multiply(value, self.signed())
            elif token in ("/", r"\div"):
                self.take()
                value = divide(value, self.signed())
            elif token in (r"\bmod", r"\mod"):
                self.take()
                value = modulo(value, self.signed())
            elif self._begins_factor(token):
                value = multiply(value, self.power())
            else:
                return value

    @staticmethod
    def _begins_factor(token: str) -> bool:
        if token in ("(", "[", r"\lfloor", r"\lceil", r"\{"):
            return True
        closers = (
            r"\cdot",
            r"\times",
            r"\div",
            r"\bmod",
            r"\mod",
            r"\rfloor",
            r"\rceil",
            r"\pmod",
            r"\text",
            r"\cup",
            r"\le",
            r"\ge",
            r"\leq",
            r"\geq",
            r"\in",
            r"\}",
        )
        return bool(token) and (token[0].isdigit() or token[0].isalpha() or token[0] == "\\") and token not in closers

    def signed(self) -> Value:
        if self.peek() in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> Value:
        value = self.atom()
        while self.peek() in ("^", "!"):
            if self.take() == "!":
                value = fact(value)
            elif self.peek() == r"\circ":
                self.take()
                value = mp.mpf(to_mp(value)) * mp.pi / 180
            elif self.peek() == "{" and self.tokens[self.at + 1 : self.at + 3] == [r"\circ", "}"]:
                self.at += 3
                value = to_mp(value) * mp.pi / 180
            else:
                value = power(value, self.argument())
        return value

    def argument(self) -> Value:
        """What stands after a command or a caret: a group, or one token."""
        if self.peek() == "{":
            return self.group("{", "}")
        token = self.peek()
        if token and token[0].isdigit():
            self.tokens[self.at : self.at + 1] = [token[1:]] if len(token) > 1 else []
            return Fraction(token[0])
        return self.atom()

    def group(self, opening: str, closing: str) -> Value:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def atom(self) -> Value:
        token = self.peek()
        if not token:
            raise CannotRead("nothing where a value was expected")
        if token[0].isdigit() or token[0] == ".":
            self.take()
            value = number(token)
            if self.peek() == r"\frac" and value.denominator == 1:  # a mixed number
                value += self.atom()
            return value
        pairs = {"(": ")", "{": "}", "[": "]", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
        if token in pairs:
            value = self.group(token, pairs[token])
            if token == r"\lfloor":
                return floor(value)
            if token == r"\lceil":
                return -floor(-value)
            return abs(value) if token == "|" else value
        self.take()
        return self.named(token)

    def named(self, token: str) -> Value:
        if token in self.names:
            return self.names[token]
        match token:
            case r"\pi":
                return +mp.pi
            case "e":
                return mp.e()
            case "i":
                return mp.mpc(0, 1)
            case r"\frac":
                return divide(self.argument(), self.argument())
            case r"\binom":
                return choose(self.argument(), self.argument())
            case r"\sqrt":
                degree = self.group("[", "]") if self.peek() == "[" else Fraction(2)
                return root(self.argument(), degree)
            case _ if token in FUNCTIONS:
                return self.function(token)
        raise CannotRead(f"the name {token}")

    def function(self, token: str) -> Value:
        base = exponent = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                exponent = self.argument()
            else:
                base = self.argument()
        if self.peek() in ("(", "{"):
            inner = self.atom()
        else:
            inner = self.power()
            while self._begins_factor(self.peek()) and self.peek() not in FUNCTIONS:
                inner = multiply(inner, self.power())
        inner = to_mp(inner)
        if token in (r"\ln", r"\log") and inner == 0:
            raise Undefined
        try:
            value = FUNCTIONS[token](inner)
        except (ValueError, ZeroDivisionError) as error:
            raise Undefined from error
        if base is not None:
            value = value / mp.log(to_mp(base))
        elif token == r"\log":
            value = value / mp.log(10)
        return value if exponent is None else power(value, exponent)


def evaluate(text: str, names: Names | None = None) -> Value:
    """The value of an expression.

    Raises:
        CannotRead: outside the forms or the bounds.
        Undefined: it has no value here.
    """
    return Reader(text, names or {}).whole()


def value_of(text: str) -> str:
    """The right side of an assignment to a variable; other text as it is."""
    return re.sub(r"^[a-z]\s*=(?!=)\s*", "", text)


def same_number(left: str, right: str) -> bool:
    """Whether two expressions without variables have one value; ``x = 3`` says 3."""
    return same_value(evaluate(value_of(left)), evaluate(value_of(right)))


def same_function(left: str, right: str) -> bool:
    """Whether two expressions agree at points of both signs; `n`, `k` and `m` stand for integers."""
    used = set(re.findall(r"(?<![A-Za-z\\])[a-zA-Z](?![A-Za-z])", re.sub(r"\\[A-Za-z]+", " ", left + " " + right)))
    variables = sorted(used - {"e", "i"})
    if variables and set(variables) <= {"n", "k", "m"}:
        points = [dict.fromkeys(variables, Fraction(value)) for value in INTEGERS]
    else:
        draw = random.Random(left + right)
        points = [
            {name: Fraction(draw.randint(-9000, 9000), 1009) for name in variables} for _ in range(POINTS)
        ]  # fmt: skip
    compared = 0
    for point in points:
        try:
            a, b = evaluate(left, point), evaluate(right, point)
        except Undefined:
            continue
        compared += 1
        if not same_value(a, b):
            return False
    if compared < FEWEST_POINTS:
        raise CannotRead("too few points")
    return True


def same_items(
    left: Sequence[str], right: Sequence[str], *, ordered: bool, same: Callable[[str, str], bool] = same_number
) -> bool:
    """Whether two lists have the same items, in order or as multisets."""
    if len(left) != len(right):
        return False
    if ordered:
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    rest = list(right)
    for item in left:
        found = next((other for other in rest if same(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return True
