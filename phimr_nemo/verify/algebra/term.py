"""Expressions as trees, and what may go wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

CONSTANTS: Final = frozenset(["pi", "e", "i"])


class Unreadable(ValueError):
    """A text that is no expression of the supported notation."""


class Inexact(Exception):
    """A value that the exact evaluation cannot have: it is no rational number, or too large to write down."""


class Undefined(Exception):
    """An expression without a value at a point: a pole, a factorial of a negative number."""


class NotReal(Undefined):
    """A real expression that leaves the real numbers at a point."""


class Undecided(Exception):
    """Two expressions that cannot be told apart within the bounds on digits and work."""


@dataclass(frozen=True, slots=True)
class Term:
    """One node of an expression.

    Attributes:
        op: "num", "sym", "const", an operation ("add", "mul", "div", "neg", "pow", "root"), or a function's name.
        args: the operands.
        value: the value of a "num".
        name: the name of a "sym" or a "const", the variable of a "sum" or "prod", the function of an "apply".
    """

    op: str
    args: tuple[Term, ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""

    def walk(self) -> Iterator[Term]:
        """The node and everything below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.args)


def number(value: Fraction | int) -> Term:
    """A rational number."""
    return Term("num", value=Fraction(value))


def symbols(term: Term) -> frozenset[str]:
    """The free variables of an expression."""
    found: set[str] = set()
    _collect(term, frozenset(), found)
    return frozenset(found)


def _collect(term: Term, bound: frozenset[str], found: set[str]) -> None:
    if term.op == "sym" and term.name not in bound:
        found.add(term.name)
    inner = bound | {term.name} if term.op in ("sum", "prod") else bound
    for index, argument in enumerate(term.args):
        # The last argument of a sum is its body; the variable is not bound in the limits before it.
        _collect(argument, inner if index == len(term.args) - 1 else bound, found)


def has(term: Term, *ops: str) -> bool:
    """Whether an operation, or a constant by its name, occurs in an expression."""
    return any(node.op in ops or (node.op == "const" and node.name in ops) for node in term.walk())


def renamed(term: Term, names: dict[str, str]) -> Term:
    """The expression with its variables renamed."""
    if term.op == "sym":
        return replace(term, name=names.get(term.name, term.name))
    return replace(term, args=tuple(renamed(argument, names) for argument in term.args)) if term.args else term
