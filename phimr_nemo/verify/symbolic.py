"""The decisions that need a worker: whether two expressions or two equations are equal. Imported only there."""

from __future__ import annotations

from typing import Final

from phimr_nemo.verify.algebra.equal import decimal_value, equal, proportional
from phimr_nemo.verify.algebra.family import same_family
from phimr_nemo.verify.algebra.formula import read
from phimr_nemo.verify.algebra.term import Term, Undecided, Unreadable, has, number, renamed, symbols
from phimr_nemo.verify.mathverify import read_pair
from phimr_nemo.verify.read.expression import Relation
from phimr_nemo.verify.read.quantity import Number
from phimr_nemo.verify.verdict import Unparsable

ROUNDING_BITS: Final = 256
_CONSTANT_OF_INTEGRATION: Final = ("C", "c")


class Algebra:
    """The symbolic decisions that the comparison asks for; see :mod:`phimr_nemo.verify.compare`."""

    def equal(self, gold: str, predicted: str, rounding: Number | None, *, family: bool = False) -> bool:
        """Whether two canonical expressions are equal.

        Args:
            gold: the gold expression.
            predicted: the response's expression.
            rounding: the gold answer as a decimal that counts as a rounding, if it is one.
            family: whether a parameter of either stands for all integers.

        Raises:
            Unparsable: one of them cannot be read, or is beyond the bounds.
            Undecided: they cannot be told apart within the bounds.
        """
        left, right = _terms(gold, predicted)
        if has(left, "inf") or has(right, "inf"):
            return left == right
        if rounding is not None and _rounds_to(right, rounding):
            return True
        right = _with_constant(left, right)
        if same_family(left, right, marked=family):
            return True
        return _decided(left, right)

    def same_relation(self, gold: Relation, predicted: Relation) -> bool:
        """Whether two equations or inequalities hold at the same points because one is a multiple of the other.

        Of two equations that end in ``= 0`` the multiple must be 1 or -1; of inequalities it must be positive.

        Raises:
            Unparsable: a side cannot be read.
            Undecided: they cannot be told apart within the bounds.
        """
        sides = [_terms(gold[side], predicted[side]) for side in (0, 2)]
        left, right = (Term("add", (sides[0][who], Term("neg", (sides[1][who],)))) for who in (0, 1))
        # "... = 0" is asked for in a normal form: twice that is the same line, but not the answer.
        normal_form = gold[1:] == predicted[1:] == ("=", "0")
        return proportional(left, right, only_sign=normal_form, positive=gold[1] != "=")


def _terms(gold: str, predicted: str) -> tuple[Term, Term]:
    try:
        return read(gold), read(predicted)
    except Unreadable:
        return read_pair(gold, predicted)


def _decided(left: Term, right: Term) -> bool:
    try:
        return equal(left, right)
    except Undecided as error:
        for side, term in (("answer", left), ("response", right)):
            if not symbols(term):
                try:
                    equal(term, number(0))
                except Undecided:
                    raise Unparsable(side, f"a value beyond the bounds ({error})") from error
        raise


def _rounds_to(term: Term, rounding: Number) -> bool:
    value = None if symbols(term) else decimal_value(term, ROUNDING_BITS)
    return value is not None and abs(value - rounding.value) * 2 <= rounding.last_place


def _with_constant(gold: Term, predicted: Term) -> Term:
    """The constant of integration may be C or c: what is added at the end, by whatever case."""
    for name, other in (_CONSTANT_OF_INTEGRATION, _CONSTANT_OF_INTEGRATION[::-1]):
        ours, theirs = symbols(gold), symbols(predicted)
        if name in ours and other in theirs and name not in theirs and other not in ours:
            added = Term("sym", name=name) in _summands(gold) and Term("sym", name=other) in _summands(predicted)
            return renamed(predicted, {other: name}) if added else predicted
    return predicted


def _summands(term: Term) -> list[Term]:
    return [part for side in term.args for part in _summands(side)] if term.op == "add" else [term]
