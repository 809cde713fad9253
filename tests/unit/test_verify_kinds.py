"""Pairs of a gold answer and a response by kind: what a policy would find, and what people and models write.

tests/golden/verify_kinds.jsonl is made by the project. Where the cases that were gathered from public suites and bug
reports lie beside the repository, they are tested as well.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.verify import Grader
from phimr_nemo.verify.algebra.equal import equal
from phimr_nemo.verify.algebra.formula import read

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "verify_kinds.jsonl"
MIN_CASES = 400
SEED = 17
PATIENT_SECONDS = 60.0
"""Wall time for an answer: the limit of processor time holds, whatever else the machine does."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def wrongly_decided(grader: Grader, rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    verdicts = grader.grade_many([(row["response"], row["answer"]) for row in rows])
    return [
        (row["answer"], row["response"], verdict.verdict)
        for row, verdict in zip(rows, verdicts, strict=True)
        if (verdict.verdict == "correct") != row["correct"]
    ]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, deadline_seconds=PATIENT_SECONDS) as made:
        yield made


def test_there_are_many_cases_right_and_wrong_ones() -> None:
    rows = rows_of(GOLDEN)
    assert len(rows) >= MIN_CASES
    assert min(sum(row["correct"] for row in rows), sum(not row["correct"] for row in rows)) >= MIN_CASES // 4


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in rows_of(GOLDEN)}))
def test_every_case_of_a_kind(grader: Grader, kind: str) -> None:
    assert wrongly_decided(grader, [row for row in rows_of(GOLDEN) if row["kind"] == kind]) == []


@pytest.mark.parametrize("name", ["failing", "holding"])
def test_the_gathered_cases(grader: Grader, shared_data: Path, name: str) -> None:
    path = shared_data.parent / "cases" / "grader" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("the gathered cases are absent (cases/grader beside the real input data)")
    assert wrongly_decided(grader, rows_of(path)) == []


def test_random_rational_expressions_against_fractions() -> None:
    """Expressions of integers with + - * / and powers, against Python's own exact arithmetic."""
    draw = random.Random(SEED)

    def grow(depth: int) -> tuple[str, Fraction]:
        if depth == 0:
            value = draw.randint(1, 10**12)
            return str(value), Fraction(value)
        (a, x), (b, y) = grow(depth - 1), grow(depth - 1)
        match draw.randrange(5):
            case 0:
                return rf"({a}+{b})", x + y
            case 1:
                return rf"({a}-{b})", x - y
            case 2:
                return rf"{a}\cdot {b}", x * y
            case 3 if y:
                return rf"\frac{{{a}}}{{{b}}}", x / y
            case _:
                power = draw.randint(0, 9)
                return rf"({a})^{{{power}}}", x**power

    for _ in range(300):
        text, value = grow(3)
        sign = "-" if value < 0 else ""
        exact = rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
        other = rf"{sign}\frac{{{abs(value.numerator) + 1}}}{{{value.denominator}}}"
        assert equal(read(text), read(exact)), text
        assert not equal(read(text), read(other)), text


def test_surds_are_told_apart_by_their_minimal_polynomials() -> None:
    """sqrt(a) + sqrt(b) = sqrt(a + b + 2 sqrt(ab)); with ab one larger it is another number."""
    draw = random.Random(SEED)
    for _ in range(60):
        a, b = draw.randint(2, 10**9), draw.randint(2, 10**9)
        left = read(rf"\sqrt{{{a}}}+\sqrt{{{b}}}")
        assert equal(left, read(rf"\sqrt{{{a + b}+2\sqrt{{{a * b}}}}}"))
        assert not equal(left, read(rf"\sqrt{{{a + b}+2\sqrt{{{a * b + 1}}}}}"))


def test_floors_of_quotients_against_every_residue() -> None:
    r"""ceil(n/d) = floor((n+d-1)/d) for integers n, and the same with another offset is another function."""
    for d in range(2, 12):
        gold = read(rf"\lceil\frac{{n}}{{{d}}}\rceil")
        for offset in range(2 * d):
            same = all(math.ceil(Fraction(n, d)) == (n + offset) // d for n in range(-2 * d, 2 * d))
            assert equal(gold, read(rf"\lfloor\frac{{n+{offset}}}{{{d}}}\rfloor")) is same
            assert same is (offset == d - 1)


def test_no_answer_can_hold_a_multiple_of_the_prime_it_is_compared_by() -> None:
    """A difference that the primes of other pairs divide is seen: the prime follows from both texts."""
    for prime in ((1 << 127) - 1, (1 << 521) - 1, (1 << 607) - 1):
        assert not equal(read("5"), read(rf"5+{prime}\cdot 2^{{200000}}"))
    assert equal(read("2^{400000}"), read("4^{200000}"))
    assert not equal(read("2^{400000}"), read("4^{200000}+1"))


NO_MATHEMATICS = (
    '{"answer": 42}',
    "a: b",
    r"\foo{3}:2",
    r"(1, \foo)",
    r"\hat{i}+\foo",
    r"x=\foo",
    r"\begin{pmatrix}\foo\\1\end{pmatrix}",
    r"\foo<x<3",
    r"\foo\text{ cm}",
    r"\csname 42\endcsname",
    r"y=\foo x",
    r"\foo\cup(1,2)",
)
"""Notations that nobody knows, in the places of those that everybody does."""


def test_no_response_makes_a_readable_gold_answer_unreadable(grader: Grader) -> None:
    golds = sorted({row["answer"] for row in rows_of(GOLDEN) if row["correct"]})
    pairs = [
        (rf"$\boxed{{{NO_MATHEMATICS[(place + step) % len(NO_MATHEMATICS)]}}}$", gold)
        for place, gold in enumerate(golds)
        for step in (0, 5)
    ]
    verdicts = grader.grade_many(pairs)
    assert [
        (pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict == "correct"
    ] == []
    unread = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict == "gold_unreadable"]
    assert unread == []


@pytest.mark.parametrize("gold", [r"\foo{3}", r"(1, \foo)", "10% of %", "the number that we found above"])
def test_a_gold_answer_that_is_no_mathematics_is_the_datas_fault(grader: Grader, gold: str) -> None:
    [verdict] = grader.grade_many([(r"$\boxed{\sqrt{2}+x}$", gold)])
    assert verdict.verdict in ("gold_unreadable", "wrong")


def test_a_gold_answer_of_another_form_makes_a_response_wrong(grader: Grader) -> None:
    pairs = [
        (r"$\boxed{\mathbf{42}}$", r"\emptyset"),
        ("$\\boxed{3}$", r"\text{Friday}"),
        (r"$\boxed{x^2}$", r"\text{(A)}"),
    ]
    assert [verdict.verdict for verdict in grader.grade_many(pairs)] == ["wrong"] * len(pairs)
