"""The words of the expression language: tokens, and the commands by what they do."""

from __future__ import annotations

import re
from typing import Final

from phimr_nemo.verify.algebra.term import Unreadable
from phimr_nemo.verify.read.names import GREEK, words

_TOKEN = re.compile(
    r"\s*(?P<token>\\[A-Za-z]+\*?|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]"
    r"|_\{[^{}]{0,40}\}|_[A-Za-z0-9]|[^\s])"
)
SIDE_BY_SIDE = re.compile(r"[0-9.]\s+[0-9.]")
INDEX_NAMES: Final = frozenset("nkmijlt")
SIMPLE: Final = {
    name: name
    for name in words(
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc "
        "sinh cosh tanh coth sech csch arsinh arcosh artanh"
    )
}
STARTS_FUNCTION: Final = frozenset(rf"\{name}" for name in (*SIMPLE, "ln", "log", "lg", "exp", "sum", "prod"))
INVERSE: Final = {
    **{name: f"arc{name}" for name in words("sin cos tan cot sec csc")},
    "sinh": "arsinh",
    "cosh": "arcosh",
    "tanh": "artanh",
}
MANY: Final = {name: name for name in words("gcd lcm max min")}
APPLIED: Final = frozenset("fgFGP")
LETTERS: Final = frozenset(GREEK) - {"pi"}
ACCENTS: Final = frozenset(
    words("overline bar hat tilde dot ddot vec mathbb mathcal overrightarrow widehat underline")
)
SYMBOLS: Final = frozenset(words("ell hbar angle triangle prime star partial nabla"))
CLOSING: Final = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
STOPS: Final = frozenset([")", "]", "}", r"\}", r"\rfloor", r"\rceil", ",", "|", "=", "&", r"\mid"])
TIMES: Final = frozenset([r"\cdot", r"\times", "*", r"\ast"])
MAX_TOKENS: Final = 1500
MODS: Final = frozenset([r"\bmod"])
"""The operation; ``\\mod`` and ``\\pmod`` name a class of remainders."""
OPERATORS: Final = TIMES | MODS | {"+", "-", "/", r"\div", "^", "!", ":", "<", ">"}


def tokens_of(text: str) -> list[str]:
    """The tokens of a canonical text."""
    return [match["token"] for match in _TOKEN.finditer(text)]


def is_number(token: str) -> bool:
    """Whether a token is a number."""
    return bool(token) and (token[0].isdigit() or (token[0] == "." and token[1:].isdigit())) and token.isascii()


class Cursor:
    """A place in a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too long")
        self._tokens = tokens
        self._at = 0

    def here(self, ahead: int = 0) -> str:
        """The token at this place; nothing at the end."""
        place = self._at + ahead
        return self._tokens[place] if place < len(self._tokens) else ""

    def _take(self) -> str:
        token = self.here()
        if not token:
            raise Unreadable("it ends too early")
        self._at += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise Unreadable(f"{token} is missing")

    def _primes(self) -> int:
        """How many tokens after a ``^`` are a prime."""
        if self.here(1) == r"\prime":
            return 1
        return 3 if self.here(1) == "{" and self.here(2) == r"\prime" and self.here(3) == "}" else 0

    def _plain_fraction(self) -> bool:
        """Whether a fraction of two plain integers follows."""
        tokens = [self.here(ahead) for ahead in range(1, 7)]
        return tokens[0::3] == ["{", "{"] and tokens[2::3] == ["}", "}"] and all(t.isdigit() for t in tokens[1::3])
