r"""Whether a response's final answer equals the gold answer: the grading policy.

One set of rules, run twice: in the parent with a `Symbolic` that refuses (so that text, numbers, lists of
numbers, letters and words are settled without a worker), and in a worker with math-verify behind it.
docs/verification.md lists the rules with examples; each example is a test.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Many
from typing import Final

from phimr_nemo.verify.extract import Extraction
from phimr_nemo.verify.read.choice import same_choice, without_choice_label
from phimr_nemo.verify.read.expression import Symbolic, check_expression, for_math_verify, same_expression
from phimr_nemo.verify.read.normalise import canonical, key
from phimr_nemo.verify.read.quantity import parse_number, split_quantity
from phimr_nemo.verify.read.structure import (
    Equation,
    Items,
    Leaf,
    Malformed,
    Matrix,
    Node,
    Sequence,
    SetOf,
    Union,
    check_balance,
    parse,
)
from phimr_nemo.verify.verdict import Unparsable, Verdict

MAX_UNORDERED_COMPARISONS: Final = 64
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
        return Verdict("unparsable", text, f"the {error.side}'s final answer: {error.problem}")
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
        gold_node = Leaf(left) if whole[0] else gold_node
        predicted_node = Leaf(right) if whole[1] else predicted_node
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
    return parse_number(key(split_quantity(text).core)) is not None


def _same(gold: Node, predicted: Node, symbolic: Symbolic) -> bool:
    if isinstance(gold, Equation) or isinstance(predicted, Equation):
        return _same_equation(gold, predicted, symbolic)
    if isinstance(gold, SetOf) and len(gold.items) == 1 and isinstance(predicted, Leaf):
        gold = gold.items[0]
    if isinstance(predicted, SetOf) and len(predicted.items) == 1 and isinstance(gold, Leaf):
        predicted = predicted.items[0]
    match gold, predicted:
        case Leaf(), Leaf():
            return same_expression(gold.text, predicted.text, symbolic)
        case (Items(items=a) | SetOf(items=a), Items(items=b) | SetOf(items=b)):
            return _same_unordered(a, b, symbolic)
        case (Items(items=a), Sequence(items=b)) | (Sequence(items=a), Items(items=b)):
            return _same_ordered(_values(a), _values(b), symbolic)
        case Union(items=a), Union(items=b):
            return _same_unordered(a, b, symbolic)
        case Sequence(), Sequence():
            return _same_sequence(gold, predicted, symbolic)
        case Matrix(), Matrix():
            return _same_matrix(gold, predicted, symbolic)
        case Matrix(), Sequence():
            return _same_ordered(_vector(gold), predicted.items, symbolic)
        case Sequence(), Matrix():
            return _same_ordered(gold.items, _vector(predicted), symbolic)
        case _:
            return False


def _values(nodes: Many[Node]) -> tuple[Node, ...]:
    """The right sides of assignments, so that ``x=1, y=2`` can be compared with ``(1, 2)``."""
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
    pair = len(gold.items) == 2
    if pair and (gold.opening, gold.closing) != (predicted.opening, predicted.closing):
        return False
    return _same_ordered(_values(gold.items), _values(predicted.items), symbolic)


def _same_matrix(gold: Matrix, predicted: Matrix, symbolic: Symbolic) -> bool:
    shapes = [[len(row) for row in matrix.rows] for matrix in (gold, predicted)]
    if gold.bars != predicted.bars or shapes[0] != shapes[1]:
        return False
    return all(_same_ordered(a, b, symbolic) for a, b in zip(gold.rows, predicted.rows, strict=True))


def _without_text(equation: Equation) -> tuple[str, ...]:
    """Both sides as keys, words with or without a text command alike."""
    return tuple(key(re.sub(r"\\text\{([^{}]*)\}", r"\1", side)) for side in (equation.left, equation.right))


_PLAIN_INTEGER = re.compile(r"-?[0-9]+")
_NAME = re.compile(r"^(?:\\text\{[^{}]*\}|\\?[A-Za-z][A-Za-z ]*)'*(?:_\{?[^{}=]{1,20}\}?)?'*(?:\([^()=]{1,40}\))?$")
_APPLIED = re.compile(r"\([^()]{1,40}\)$")


def _same_equation(gold: Node, predicted: Node, symbolic: Symbolic) -> bool:
    """Equations against equations as such; an equation against a value by what it says the value is."""
    if isinstance(gold, Equation) and isinstance(predicted, Equation):
        if _without_text(gold) == _without_text(predicted):
            return True
        if key(gold.left) == key(predicted.left):
            return _same(_parse("answer", gold.right), _parse("response", predicted.right), symbolic)
        names = _NAME.match(gold.left) is not None and _NAME.match(predicted.left) is not None
        applied = bool(_APPLIED.search(gold.left)) != bool(_APPLIED.search(predicted.left))
        if names and applied:
            return _same(_parse("answer", gold.right), _parse("response", predicted.right), symbolic)
        sides = (gold.left, gold.right), (predicted.left, predicted.right)
        for side, pair in zip(("answer", "response"), sides, strict=True):
            for text in pair:
                check_expression(side, text)
        prepared = for_math_verify(*sides[0], *sides[1])
        return symbolic.same_equation((prepared[0], prepared[1]), (prepared[2], prepared[3]))
    if isinstance(predicted, Equation):
        if _same(gold, _parse("response", predicted.right), symbolic):
            return True
        return bool(predicted.rounded) and _same(gold, _parse("response", predicted.rounded), symbolic)
    assert isinstance(gold, Equation)
    if not _NAME.match(gold.left):
        return False
    return _same(_parse("answer", gold.right), predicted, symbolic)
