r"""Whether a response's final answer equals the gold answer: the grading policy.

One set of rules, run twice: in the parent with a `Symbolic` that refuses (so that text, numbers, lists of
numbers, letters and words are settled without a worker), and in a worker with math-verify behind it.
docs/verification.md lists the rules with examples; each example is a test.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Many
from fractions import Fraction
from typing import Final

from phimr_nemo.verify.algebra.term import Undecided
from phimr_nemo.verify.extract import Extraction
from phimr_nemo.verify.read.brackets import Malformed, check_balance
from phimr_nemo.verify.read.choice import same_choice, same_letters, without_choice_label
from phimr_nemo.verify.read.expression import Symbolic, check_plain, same_expression
from phimr_nemo.verify.read.nodes import Equation, Items, Leaf, Matrix, Node, Piecewise, Sequence, SetOf, Union
from phimr_nemo.verify.read.normalise import canonical, key, without_grouping
from phimr_nemo.verify.read.phrases import same_phrase
from phimr_nemo.verify.read.quantity import Number, parse_number, split_quantity, without_remarks
from phimr_nemo.verify.read.residue import parse_residues
from phimr_nemo.verify.read.structure import is_label, is_tuple_of_names, parse
from phimr_nemo.verify.readable import is_readable
from phimr_nemo.verify.relations import ORDER, Family, same_inequality, without_integers
from phimr_nemo.verify.verdict import Unparsable, Verdict

MAX_UNORDERED_COMPARISONS: Final = 64
_EMPTY_SET: Final = Leaf(r"\emptyset")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def judge(gold: str, extraction: Extraction, symbolic: Symbolic) -> Verdict:
    """Grade an extracted answer.

    Args:
        gold: the gold answer itself, not empty.
        extraction: what the response answered, not empty.
        symbolic: where undecided expressions go.

    Raises:
        Whatever `symbolic` raises, except :class:`Unparsable`.
    """
    text = extraction.text
    try:
        if equivalent(gold, text, symbolic):
            return Verdict("correct", text, "equal to the answer")
        if len(extraction.parts) > 1 and all(equivalent(gold, part, symbolic) for part in extraction.parts):
            return Verdict("correct", text, "every joined box is equal to the answer")
        parts = _answer_in_parts(gold, extraction)
        if parts and equivalent(gold, parts, symbolic):
            return Verdict("correct", parts, "the boxes together are equal to the answer")
    except Unparsable as error:
        if error.side == "answer" and not is_readable(gold, symbolic):
            return Verdict("gold_unreadable", text, f"the gold answer: {error.problem}")
        if error.side == "answer" and is_readable(text, symbolic):
            return Verdict("wrong", text, "of another form than the answer")
        problem = error.problem if error.side == "response" else "it is no expression of a known notation"
        return Verdict("unparsable", text, f"the response's final answer: {problem}")
    except Undecided as error:
        return Verdict("timeout", text, f"not decided within the bounds: {error}")
    return Verdict("wrong", text, "not equal to the answer")


def _answer_in_parts(gold: str, extraction: Extraction) -> str:
    """The boxes of a response that answers a question of several parts with one box each."""
    if len(extraction.boxes) < 2 or len(extraction.parts) != 1:
        return ""
    node = _parse("answer", canonical(gold))
    expected = len(node.items) if isinstance(node, Items) else 0
    return ", ".join(extraction.boxes) if expected == len(extraction.boxes) else ""


def equivalent(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    """Whether two answers, as written, mean the same under the policy.

    Raises:
        Unparsable: one of them is no mathematics within the bounds.
    """
    if _PLAIN_INTEGER.fullmatch(gold) and _PLAIN_INTEGER.fullmatch(predicted):
        return _plain_digits(gold) == _plain_digits(predicted)
    if _CONTROL.search(predicted):
        raise Unparsable("response", "it holds a control character")
    left, right = canonical(_open_text(gold)), canonical(_open_text(predicted))
    if not right:
        raise Unparsable("response", "nothing but markup")
    if key(left) == key(right):
        _check("response", right)
        return True
    if same_letters(left, right) or same_phrase(left, right):
        return True
    residues = parse_residues(left), parse_residues(right)
    if any(residues):
        return residues[0] == residues[1]
    left, in_left = without_integers(without_remarks(left))
    right, in_right = without_integers(without_remarks(right))
    symbolic = Family(symbolic) if in_left or in_right else symbolic
    choice = same_choice(left, right)
    if choice is not None:
        return choice
    left, right = without_choice_label(left, right), without_choice_label(right, left)
    whole = _is_quantity(left), _is_quantity(right)
    if all(whole) and (same_expression(left, right, symbolic) or not ("," in left or "," in right)):
        return same_expression(left, right, symbolic)
    gold_node, predicted_node = _parse("answer", left), _parse("response", right)
    if isinstance(gold_node, Items) != isinstance(predicted_node, Items):
        # "12,345" is a number here and a list there: read it as the other side demands.
        gold_node = _parse("answer", without_grouping(left))
        predicted_node = _parse("response", without_grouping(right))
    return _same(gold_node, predicted_node, symbolic)


def _plain_digits(text: str) -> str:
    digits = text.lstrip("-").lstrip("0")
    return "-" + digits if digits and text.startswith("-") else digits


def _open_text(answer: str) -> str:
    r"""``\text{5 cm}``: an answer that was put into a text command as a whole."""
    match = re.fullmatch(r"\s*\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*[0-9,][^{}]*)\}\s*\.?\s*", answer)
    return match.group(1) if match else answer


def _check(side: str, text: str) -> None:
    try:
        check_balance(text)
    except Malformed as error:
        raise Unparsable(side, str(error)) from error


def _parse(side: str, text: str) -> Node:
    try:
        return parse(text)
    except Malformed as error:
        raise Unparsable(side, str(error)) from error


def _is_quantity(text: str) -> bool:
    """Whether a canonical answer is one plain number, perhaps with a unit, a currency or a percent sign."""
    return parse_number(key(split_quantity(text).core)) is not None and not _SPACED_COMMA.search(text)


def _same(gold: Node, predicted: Node, symbolic: Symbolic) -> bool:
    if isinstance(gold, Equation) or isinstance(predicted, Equation):
        return _same_equation(gold, predicted, symbolic)
    if isinstance(gold, SetOf) and len(gold.items) == 1 and isinstance(predicted, Leaf) and predicted != _EMPTY_SET:
        gold = gold.items[0]
    if isinstance(predicted, SetOf) and len(predicted.items) == 1 and isinstance(gold, Leaf) and gold != _EMPTY_SET:
        predicted = predicted.items[0]
    match gold, predicted:
        case Leaf(), Leaf():
            if ORDER.search(gold.text) or ORDER.search(predicted.text):
                return same_inequality(gold.text, predicted.text, symbolic)
            return same_expression(gold.text, predicted.text, symbolic)
        case (Items(items=a) | SetOf(items=a), Items(items=b) | SetOf(items=b)):
            return _same_unordered(a, b, symbolic)
        case (Items(items=a), Sequence(items=b)) | (Sequence(items=a), Items(items=b)):
            return _same_ordered(_values(a), _values(b), symbolic)
        case Union(items=a), Union(items=b):
            return _same_unordered(a, b, symbolic)
        case Sequence(), Sequence():
            return _same_sequence(gold, predicted, symbolic)
        case Piecewise(), Piecewise():
            return _same_pieces(gold, predicted, symbolic)
        case (Sequence() | Matrix(), Leaf()):
            total = _sum_of_unit_vectors(gold, predicted)
            return total is not None and _same_plain(total, predicted.text, symbolic)
        case (Leaf(), Sequence() | Matrix()):
            total = _sum_of_unit_vectors(predicted, gold)
            return total is not None and _same_plain(gold.text, total, symbolic)
        case Matrix(), Matrix():
            return _same_matrix(gold, predicted, symbolic)
        case Matrix(), Sequence():
            return _same_ordered(_vector(gold), predicted.items, symbolic)
        case Sequence(), Matrix():
            return _same_ordered(gold.items, _vector(predicted), symbolic)
        case _:
            return False


def _values(nodes: Many[Node]) -> tuple[Node, ...]:
    """The right sides of assignments, in the order of their names: ``x=1, y=2`` compares with ``(1, 2)``."""
    named = {node.left: node for node in nodes if isinstance(node, Equation) and re.fullmatch(r"[a-z]", node.left)}
    if len(named) == len(nodes):
        nodes = [named[name] for name in sorted(named)]
    return tuple(Leaf(node.right) if isinstance(node, Equation) else node for node in nodes)


def _vector(matrix: Matrix) -> tuple[Node, ...]:
    """The entries of a single row or column; nothing for any other matrix."""
    if matrix.bars or (len(matrix.rows) > 1 and any(len(row) > 1 for row in matrix.rows)):
        return ()
    return tuple(entry for row in matrix.rows for entry in row)


def _same_ordered(gold: Many[Node], predicted: Many[Node], symbolic: Symbolic) -> bool:
    return len(gold) == len(predicted) and all(_same(a, b, symbolic) for a, b in zip(gold, predicted, strict=True))


def _same_unordered(gold: Many[Node], predicted: Many[Node], symbolic: Symbolic) -> bool:
    """Equality as multisets: identical items are paired first, the rest by comparison."""
    if len(gold) != len(predicted):
        return False
    remaining = list(predicted)
    unmatched = []
    for node in gold:
        if node in remaining:
            remaining.remove(node)
        else:
            unmatched.append(node)
    if len(unmatched) > MAX_UNORDERED_COMPARISONS:
        return False
    for node in unmatched:
        found = next((other for other in remaining if _same(node, other, symbolic)), None)
        if found is None:
            return False
        remaining.remove(found)
    return True


def _same_sequence(gold: Sequence, predicted: Sequence, symbolic: Symbolic) -> bool:
    if gold.variable and predicted.variable and key(gold.variable) != key(predicted.variable):
        return False
    pair = len(gold.items) == 2
    if pair and (gold.opening, gold.closing) != (predicted.opening, predicted.closing):
        return False
    return _same_ordered(_values(gold.items), _values(predicted.items), symbolic)


def _same_matrix(gold: Matrix, predicted: Matrix, symbolic: Symbolic) -> bool:
    shapes = [[len(row) for row in matrix.rows] for matrix in (gold, predicted)]
    if gold.bars != predicted.bars or shapes[0] != shapes[1]:
        return False
    return all(_same_ordered(a, b, symbolic) for a, b in zip(gold.rows, predicted.rows, strict=True))


def _same_pieces(gold: Piecewise, predicted: Piecewise, symbolic: Symbolic) -> bool:
    """Functions by pieces: the same values under the same conditions, in any order."""
    if len(gold.rows) != len(predicted.rows):
        return False
    remaining = list(predicted.rows)
    for value, condition in gold.rows:
        found = next(
            (
                row
                for row in remaining
                if _same(value, row[0], symbolic) and (condition == row[1] or _same(condition, row[1], symbolic))
            ),
            None,
        )
        if found is None:
            return False
        remaining.remove(found)
    return True


_UNIT_VECTORS: Final = (r"\hat{i}", r"\hat{j}", r"\hat{k}")


def _sum_of_unit_vectors(vector: Sequence | Matrix, written: Leaf) -> str | None:
    r"""A tuple or column as the sum of unit vectors, where the other side is one: ``\hat{i}+2\hat{j}``; else None."""
    entries = vector.items if isinstance(vector, Sequence) else _vector(vector)
    if not any(name in key(written.text) for name in _UNIT_VECTORS) or not 2 <= len(entries) <= len(_UNIT_VECTORS):
        return None
    if not all(isinstance(entry, Leaf) for entry in entries):
        return None
    return " + ".join(
        rf"({entry.text}) {name}"
        for entry, name in zip(entries, _UNIT_VECTORS, strict=False)
        if isinstance(entry, Leaf)
    )


def _same_plain(gold: str, predicted: str, symbolic: Symbolic) -> bool:
    check_plain("answer", gold)
    check_plain("response", predicted)
    return symbolic.equal(gold, predicted, None)


def _without_text(equation: Equation) -> tuple[str, ...]:
    """Both sides as keys, words with or without a text command alike."""
    return tuple(key(re.sub(r"\\text\{([^{}]*)\}", r"\1", side)) for side in (equation.left, equation.right))


_SPACED_COMMA = re.compile(r"[0-9],\s+[0-9]")
_PLAIN_INTEGER = re.compile(r"-?[0-9]+")
_BRACKETED = re.compile(r"\s*[(\[][^()\[\]]*[0-9][^()\[\]]*,")
_CONSTANT = re.compile(r"(?:[0-9.,+\-*/^(){}!\s%|:]|\\[a-z]+)+")
_NAME = re.compile(r"^(?:\\text\{[^{}]*\}|\\?[A-Za-z][A-Za-z ]*)'*(?:_\{?[^{}=]{1,20}\}?)?'*(?:\([^()=]{1,40}\))?$")
_APPLIED = re.compile(r"\([^()]{1,40}\)$")


def _same_equation(gold: Node, predicted: Node, symbolic: Symbolic) -> bool:
    """Equations against equations as such; an equation against a value by what it says the value is."""
    if isinstance(gold, Equation) and isinstance(predicted, Equation):
        return _same_equations(gold, predicted, symbolic)
    if isinstance(predicted, Equation):
        return _says(predicted, gold, symbolic)
    assert isinstance(gold, Equation)
    computed = _CONSTANT.fullmatch(gold.left) and _same(Leaf(gold.left), Leaf(gold.right), symbolic)
    if not (is_label(gold.left) or computed or (gold.rounded and gold.left == gold.right)):
        return False
    if _same(_parse("answer", gold.right), predicted, symbolic):
        return True
    return bool(gold.rounded) and _rounds_to(gold.rounded, predicted, symbolic)


def _same_equations(gold: Equation, predicted: Equation, symbolic: Symbolic) -> bool:
    if _without_text(gold) == _without_text(predicted):
        return True
    labels = is_label(gold.left) and is_label(predicted.left)
    applied = bool(_APPLIED.search(gold.left)) != bool(_APPLIED.search(predicted.left))
    tuples = is_tuple_of_names(gold.left) and is_tuple_of_names(predicted.left)
    if labels and (key(gold.left) == key(predicted.left) or applied or tuples):
        return _says(predicted, _parse("answer", gold.right), symbolic)
    if gold.between or predicted.between or gold.rounded or predicted.rounded:
        return labels and _NAME.match(gold.left) is None and _says(predicted, _parse("answer", gold.right), symbolic)
    sides = (gold.left, gold.right), (predicted.left, predicted.right)
    for side, pair in zip(("answer", "response"), sides, strict=True):
        for text in pair:
            check_plain(side, text)
    return symbolic.same_relation((sides[0][0], "=", sides[0][1]), (sides[1][0], "=", sides[1][1]))


def _says(predicted: Equation, gold: Node, symbolic: Symbolic) -> bool:
    """Whether an equation of the response says that its value is the gold one, and no other value beside it."""
    if predicted.left.lstrip().startswith((r"\{", r"\begin")) or _BRACKETED.match(predicted.left):
        sides = [_parse("response", side) for side in (predicted.left, *predicted.between, predicted.right)]
        return all(_same(gold, side, symbolic) for side in sides)
    constant = _CONSTANT.fullmatch(predicted.left) is not None
    named = is_label(predicted.left)
    if not (named or constant):
        return False
    first = predicted.between[0] if named and predicted.between else predicted.left if not named else predicted.right
    claimed = _is_quantity(first) and _is_quantity(predicted.right)
    if claimed and not _same(Leaf(first), Leaf(predicted.right), symbolic):
        return False
    if _contradicts_itself(predicted, symbolic):
        return False
    if _same(gold, _parse("response", predicted.right), symbolic):
        return named or claimed or predicted.left == predicted.right or _same(gold, Leaf(predicted.left), symbolic)
    if not predicted.rounded or not _same(gold, _parse("response", predicted.rounded), symbolic):
        return False
    return _rounds_to(predicted.rounded, Leaf(predicted.right), symbolic)


def _contradicts_itself(predicted: Equation, symbolic: Symbolic) -> bool:
    """Whether ``166 \\approx 167`` names two answers; of a named value only where both are plain integers."""
    if not predicted.rounded or predicted.rounded == predicted.right:
        return False
    unnamed = predicted.left == predicted.right
    integers = _PLAIN_INTEGER.fullmatch(predicted.rounded) and _PLAIN_INTEGER.fullmatch(predicted.right)
    if not (unnamed or (integers and not predicted.between)):
        return False
    exact, rounded = split_quantity(predicted.right), split_quantity(predicted.rounded)
    number = parse_number(key(rounded.core))
    if number is None or rounded.percent or exact.percent or (exact.unit and rounded.unit):
        return False
    return not _rounds_to(predicted.rounded, Leaf(predicted.right), symbolic, cut_off=True)


def _rounds_to(rounded: str, exact: Node, symbolic: Symbolic, *, cut_off: bool = False) -> bool:
    """Whether a value rounds (or is cut off) to one that is written behind an approximation sign."""
    number = parse_number(key(split_quantity(rounded).core))
    if number is None or not isinstance(exact, Leaf):
        return False
    core = split_quantity(exact.text).core
    own = parse_number(key(core))
    # A fraction stands for a value as near as its denominator lets it be, as 22/7 does for pi.
    place = number.last_place or Fraction(1, number.value.denominator**2)
    if own is not None:
        gap = abs(own.value - number.value)
        return gap < place if cut_off else gap * 2 <= place
    place *= 2 if cut_off else 1
    check_plain("response", core)
    return symbolic.equal(key(split_quantity(rounded).core), core, Number(number.value, number.digits, place))
