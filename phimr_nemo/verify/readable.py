"""Whether an answer can be read by itself, whatever it is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from phimr_nemo.verify.algebra.term import Undecided
from phimr_nemo.verify.read.brackets import Malformed
from phimr_nemo.verify.read.choice import is_choice
from phimr_nemo.verify.read.expression import Symbolic, check_plain
from phimr_nemo.verify.read.nodes import Equation, Leaf, Matrix, Node, Piecewise
from phimr_nemo.verify.read.normalise import canonical, key
from phimr_nemo.verify.read.phrases import is_phrase
from phimr_nemo.verify.read.quantity import parse_number, split_quantity, without_remarks
from phimr_nemo.verify.read.residue import parse_residues
from phimr_nemo.verify.read.structure import parse
from phimr_nemo.verify.relations import ORDER, without_integers
from phimr_nemo.verify.verdict import Unparsable

_CIRCLED = re.compile("[\u2460-\u2473]+")


def is_readable(answer: str, symbolic: Symbolic) -> bool:
    """Whether every part of an answer is a number, a quantity, words, a choice or an expression of a known notation.

    Raises:
        Whatever `symbolic` raises, except :class:`Unparsable` and :class:`Undecided`.
    """
    text = without_integers(without_remarks(canonical(answer)))[0]
    if parse_residues(text):
        return True
    try:
        return all(_is_part(part, symbolic) for part in _parts(parse(text)))
    except Malformed:
        return False


def _parts(node: Node) -> Iterator[str]:
    """The expressions that an answer is made of."""
    if isinstance(node, Leaf):
        yield from (part.strip() for part in ORDER.split(node.text)) if ORDER.search(node.text) else (node.text,)
        return
    if isinstance(node, Equation):
        for side in (node.right, *node.between):
            value = parse(side)
            yield from (side,) if isinstance(value, Equation) else _parts(value)
        return
    if isinstance(node, Matrix | Piecewise):
        inner: Iterator[Node] = (entry for row in node.rows for entry in row)
    else:
        inner = iter(node.items)
    for each in inner:
        yield from _parts(each)


def _is_part(text: str, symbolic: Symbolic) -> bool:
    if not text or text.strip() == r"\emptyset" or is_phrase(text) or is_choice(text) or _CIRCLED.fullmatch(text):
        return True
    cores = split_quantity(text).core.split(":")
    return all(parse_number(key(core)) is not None or _is_expression(core, symbolic) for core in cores)


def _is_expression(text: str, symbolic: Symbolic) -> bool:
    try:
        check_plain("answer", text)
        symbolic.equal(text, "0", None)
    except Unparsable:
        return False
    except Undecided:
        return True
    return True
