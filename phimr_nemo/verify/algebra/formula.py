r"""Read an expression in the plain LaTeX dialect into a :class:`Term`, in one pass of bounded depth.

Juxtaposition multiplies and binds tighter than a slash (``1/2x`` with two plain numbers is one half of x); a function
without parentheses takes the product that follows it; ``3\frac{1}{2}`` is a mixed number.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Final

from phimr_nemo.verify.algebra.term import Term, Unreadable, has, number
from phimr_nemo.verify.algebra.tokens import (
    ACCENTS,
    APPLIED,
    CLOSING,
    INDEX_NAMES,
    INVERSE,
    LETTERS,
    MANY,
    MODS,
    OPERATORS,
    SIDE_BY_SIDE,
    SIMPLE,
    STARTS_FUNCTION,
    STOPS,
    SYMBOLS,
    TIMES,
    Cursor,
    is_number,
    tokens_of,
)

MAX_DEPTH: Final = 60
READ_CACHE: Final = 4096


@lru_cache(maxsize=READ_CACHE)
def read(text: str) -> Term:
    """The expression that a canonical text is.

    Raises:
        Unreadable: the text is no expression, or one of a notation that this reader does not know.
    """
    if SIDE_BY_SIDE.search(text):
        raise Unreadable("two numbers side by side")
    text = text.replace("{}_", "_").replace("{}^", "^")
    reader = _Reader(tokens_of(text))
    term = reader.expression()
    if reader.here():
        raise Unreadable(f"{reader.here()!r} is not understood")
    return term


class _Reader(Cursor):
    """A recursive-descent parser over tokens."""

    def __init__(self, tokens: list[str]) -> None:
        super().__init__(tokens)
        self._depth = 0
        self._bars = 0
        self._bound: list[str] = []

    # Sums, products, signs --------------------------------------------------------------------------

    def expression(self) -> Term:
        """A sum of products."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH}")
        total = self._product()
        while self.here() in ("+", "-"):
            sign = self._take()
            part = self._product()
            total = Term("add", (total, part if sign == "+" else Term("neg", (part,))))
        self._depth -= 1
        return total

    def _product(self) -> Term:
        left = self._signed()
        while True:
            token = self.here()
            if token in TIMES:
                self._take()
                left = Term("mul", (left, self._signed()))
            elif token in ("/", r"\div"):
                self._take()
                left = self._quotient(left)
            elif token in MODS:
                self._take()
                left = Term("mod", (left, self._signed()))
            elif token in (":",):
                raise Unreadable("a ratio within an expression")
            elif self._starts_factor(token):
                left = Term("mul", (left, self._run()))
            else:
                return left

    def _quotient(self, left: Term) -> Term:
        if left.op == "num" and is_number(self.here()) and self.here(1) != "!":
            # 1/2x is one half of x.
            return Term("div", (left, self._power()))
        return Term("div", (left, self._signed()))

    def _signed(self) -> Term:
        negative = False
        while self.here() in ("+", "-"):
            negative ^= self._take() == "-"
        factor = self._run()
        return Term("neg", (factor,)) if negative else factor

    def _run(self) -> Term:
        """Factors that stand side by side."""
        factor = self._power()
        mixed = factor.op == "num" and factor.value.denominator == 1 and self.here() == r"\frac"
        if mixed and self._plain_fraction():
            factor = Term("add", (factor, self._power()))
        while self._starts_factor(self.here()):
            if is_number(self.here()) and is_number(self.here(-1)):
                raise Unreadable("two numbers side by side")
            factor = Term("mul", (factor, self._power()))
        return factor

    def _starts_factor(self, token: str) -> bool:
        if not token or token in STOPS:
            return token == "|" and not self._bars
        return token not in OPERATORS

    # Powers and atoms -------------------------------------------------------------------------------

    def _power(self) -> Term:
        base = self._postfix(self._atom())
        while self.here() == "^":
            self._take()
            if self.here() == r"\circ":
                self._take()
                base = Term("mul", (base, Term("div", (Term("const", name="pi"), number(180)))))
                continue
            base = self._postfix(Term("pow", (base, self._argument())))
        return base

    def _postfix(self, base: Term) -> Term:
        while self.here() == "!":
            self._take()
            if self.here() == "!":
                raise Unreadable("a double factorial")
            base = Term("factorial", (base,))
        return base

    def _argument(self) -> Term:
        """What a command or an exponent takes: a group in braces, or one token."""
        if self.here() == "{":
            return self._group()
        token = self.here()
        if is_number(token) and len(token) > 1 and token.isdigit():
            # ^23 has been given braces; here a command takes one digit: \frac12.
            self._tokens[self._at : self._at + 1] = [token[0], token[1:]]
        if token in ("+", "-"):
            self._take()
            inner = self._argument()
            return Term("neg", (inner,)) if token == "-" else inner
        return self._atom()

    def _group(self) -> Term:
        opening = self._take()
        bars, self._bars = self._bars, 0
        inner = self.expression()
        self._expect(CLOSING[opening])
        self._bars = bars
        return inner

    def _atom(self) -> Term:
        token = self._take()
        if is_number(token):
            return number(Fraction(token))
        if token in ("(", "[", "{", r"\{"):
            self._at -= 1
            return self._group()
        if token == "|":
            self._bars += 1
            inner = self.expression()
            self._expect("|")
            self._bars -= 1
            return Term("abs", (inner,))
        if token in (r"\lfloor", r"\lceil"):
            self._at -= 1
            return Term("floor" if token == r"\lfloor" else "ceil", (self._group(),))
        if token.startswith("\\"):
            return self._command(token[1:])
        if len(token) == 1 and token.isalpha() and token.isascii():
            return self._letter(token)
        if token.startswith("_") and self.here() in ("C", "P"):
            return self._chosen(token)
        raise Unreadable(f"{token!r} is not understood")

    def _letter(self, letter: str) -> Term:
        subscript = self.here()
        if letter in "CPA" and subscript.startswith("_") and self.here(1) == "^":
            chosen = self._combination(letter)
            if chosen is not None:
                return chosen
        if letter in "CP" and self.here() == "(":
            pair = self._pair(letter)
            if pair is not None:
                return pair
        if letter == "e" and not subscript.startswith("_") and "e" not in self._bound:
            return Term("const", name="e")
        if letter == "i" and not subscript.startswith("_") and "i" not in self._bound:
            return Term("const", name="i")
        return self._name(letter)

    def _name(self, name: str) -> Term:
        """A variable with its subscript and primes, or a function of the letter's name applied to its arguments."""
        index: Term | None = None
        while self.here().startswith("_") or self.here() == "'" or (self.here() == "^" and self._primes()):
            token = self._take()
            if token == "^":
                self._at += self._primes()
                name += "'"
            elif token == "'":
                name += "'"
            elif token == "_":
                index = self._argument()
            else:
                inner = token[1:].strip("{}")
                if self._is_index(inner):
                    index = read(inner) if not self._bound else _Reader(tokens_of(inner))._within(self._bound)
                else:
                    name += "_" + inner.replace(" ", "")
        if index is not None:
            return Term("apply", (index,), name=name + "_")
        if name[0] in APPLIED and self.here() == "(":
            return Term("apply", tuple(self._arguments()), name=name)
        return Term("sym", name=name)

    def _within(self, bound: list[str]) -> Term:
        self._bound = list(bound)
        term = self.expression()
        if self.here():
            raise Unreadable("an index that is not understood")
        return term

    def _is_index(self, inner: str) -> bool:
        plain = inner.strip()
        if plain in self._bound or plain in INDEX_NAMES:
            return True
        return bool(re.fullmatch(r"[0-9a-zA-Z+\-* ]+", plain)) and bool(re.search(r"[+\-*]", plain))

    # Commands ---------------------------------------------------------------------------------------

    def _command(self, name: str) -> Term:
        name = name.rstrip("*")
        if name == "frac":
            return self._fraction()
        if name == "sqrt":
            return self._root()
        if name == "pi":
            return Term("const", name="pi")
        if name in SIMPLE:
            return self._function(name)
        if name in ("ln", "log", "lg", "exp"):
            return self._logarithm(name)
        if name in MANY:
            return Term(name, tuple(self._arguments()))
        if name == "binom":
            return Term("binom", (self._argument(), self._argument()))
        if name in ("sum", "prod"):
            return self._series(name)
        if name == "infty":
            return Term("const", name="inf")
        if name in LETTERS or name in SYMBOLS:
            return self._name("\\" + name)
        if name in ACCENTS:
            return self._accent(name)
        if name in ("Re", "Im", "arg"):
            return Term(name.lower(), (self._operand(),))
        raise Unreadable(f"\\{name} is not understood")

    def _fraction(self) -> Term:
        start = self._at
        top, bottom = self._argument(), self._argument()
        spelled = self._tokens[start : self._at]
        if spelled[:2] == ["{", "d"] and "d" in spelled[3:]:
            raise Unreadable("a derivative")
        return Term("div", (top, bottom))

    def _root(self) -> Term:
        if self.here() != "[":
            return Term("root", (self._argument(), number(2)))
        index = self._group()
        return Term("root", (self._argument(), index))

    def _function(self, name: str) -> Term:
        power: Term | None = None
        if self.here() == "^":
            self._take()
            power = self._argument()
            if power == Term("neg", (number(1),)) and name in INVERSE:
                name, power = INVERSE[name], None
        value = Term(SIMPLE[name], (self._operand(),))
        return Term("pow", (value, power)) if power is not None else value

    def _logarithm(self, name: str) -> Term:
        base = number(10) if name in ("log", "lg") else Term("const", name="e")
        if self.here().startswith("_"):
            token = self._take()
            base = self._argument() if token == "_" else _Reader(tokens_of(token[1:].strip("{}"))).expression()
        power: Term | None = None
        if self.here() == "^":
            self._take()
            power = self._argument()
        operand = self._operand()
        value = Term("pow", (base, operand)) if name == "exp" else Term("log", (operand, base))
        return Term("pow", (value, power)) if power is not None else value

    def _operand(self) -> Term:
        """The argument of a function: what stands in brackets, else the product up to the next function."""
        if self.here() in ("(", "[", "{", "|", r"\lfloor", r"\lceil"):
            return self._power()
        negative = False
        while self.here() in ("+", "-"):
            negative ^= self._take() == "-"
        factor = self._power()
        while self._starts_factor(self.here()) and self.here() not in STARTS_FUNCTION and self.here() != "(":
            factor = Term("mul", (factor, self._power()))
        if self.here() == "/" and is_number(self.here(1)):
            # \sin \pi/6
            self._take()
            factor = Term("div", (factor, self._power()))
        return Term("neg", (factor,)) if negative else factor

    def _arguments(self) -> list[Term]:
        """``(a, b, ...)`` or ``\\{a, b\\}``."""
        opening = self._take()
        if opening not in ("(", r"\{", "{", "["):
            raise Unreadable("a function of several arguments without brackets")
        found = [self.expression()]
        while self.here() == ",":
            self._take()
            found.append(self.expression())
        self._expect(CLOSING[opening])
        return found

    def _series(self, name: str) -> Term:
        lower = self._take()
        inner = _Reader(tokens_of(lower[1:].strip("{}"))) if lower.startswith("_{") else None
        if inner is None or len(inner._tokens) < 3 or inner.here(1) != "=":
            raise Unreadable(f"a {name} without an index")
        variable = inner._take()
        inner._take()
        low = inner.expression()
        self._expect("^")
        high = self._argument()
        if has(low, "inf") or has(high, "inf"):
            raise Unreadable("an infinite series")
        self._bound.append(variable)
        body = self._product()
        self._bound.pop()
        return Term(name, (low, high, body), name=variable)

    def _accent(self, name: str) -> Term:
        start = self._at
        self._argument()
        spelled = "".join(self._tokens[start : self._at]).strip("{}")
        return self._name(f"\\{name}{{{spelled}}}")

    # Combinations -----------------------------------------------------------------------------------

    def _combination(self, letter: str) -> Term | None:
        """``C_n^2`` and ``A_5^3`` where the lower index is a natural number or n: n at the bottom, k on top."""
        start = self._at
        lower = self._take()[1:].strip("{}")
        self._take()
        if self._primes() or not (lower.isdigit() or lower in ("n", "m", "2n", "n+1")):
            self._at = start
            return None
        upper = self._argument()
        if lower.isdigit() and not (upper.op == "num" and 0 <= upper.value <= int(lower) and int(lower) > 1):
            self._at = start
            return None
        return Term("binom" if letter == "C" else "perm", (read(lower), upper))

    def _pair(self, letter: str) -> Term | None:
        tokens = [self.here(ahead) for ahead in range(5)]
        if not (tokens[0::4] == ["(", ")"] and tokens[2] == "," and tokens[1].isdigit() and tokens[3].isdigit()):
            return None
        self._at += 5
        return Term("binom" if letter == "C" else "perm", (number(int(tokens[1])), number(int(tokens[3]))))

    def _chosen(self, lower: str) -> Term:
        """``_5C_2``."""
        letter = self._take()
        upper = self._take()
        if not upper.startswith("_"):
            raise Unreadable("a subscript without a name")
        both = read(lower[1:].strip("{}")), read(upper[1:].strip("{}"))
        return Term("binom" if letter == "C" else "perm", both)
