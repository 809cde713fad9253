"""Generated problems: right answers by an independent evaluator, disjoint parts, reproducible draws."""

from __future__ import annotations

import ast
import itertools
import json
import operator
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.data.synthetic import problems as synthetic
from phimr_nemo.data.synthetic.arithmetic import Step, canonical, evaluate
from phimr_nemo.data.synthetic.problems import HELDOUT_ONE_IN, TIERS, generate_problems, split_of, steps_of
from phimr_nemo.errors import UserError

PYTHON_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def python_value(expression: str) -> int:
    """The value of +, - and * by Python's own grammar: another implementation than the one under test."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int)
            return node.value
        if isinstance(node, ast.UnaryOp):
            return -walk(node.operand)
        assert isinstance(node, ast.BinOp)
        return PYTHON_OPERATORS[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(expression, mode="eval").body)


def calculations(seeds: range, split: synthetic.Split, count: int) -> set[str]:
    tables = [generate_problems(seed, count, split) for seed in seeds]
    return {canonical(steps_of(text)) for table in tables for text in table["metadata"].to_pylist()}


def test_answers_of_expressions_equal_pythons() -> None:
    rows = generate_problems(3, 600, "train", families=("chain", "product", "mixed")).to_pylist()
    for row in rows:
        expression = row["question"].removeprefix("What is ").removeprefix("Compute ").rstrip("?.")
        assert python_value(expression) == int(row["answer"]), row


def test_word_problems_hold_exactly_the_numbers_of_their_steps() -> None:
    for row in generate_problems(4, 300, "train", families=["word"]).to_pylist():
        written = sorted(int(word.strip(".,")) for word in row["question"].split() if word.strip(".,").isdigit())
        operands = [x for left, _, right in steps_of(row["metadata"]) for x in (left, right)]
        numbers = sorted({x for x in operands if isinstance(x, int)})
        assert sorted(set(written)) == numbers
        assert evaluate(steps_of(row["metadata"]))[-1] == int(row["answer"])


def test_difficulty_is_the_number_of_steps() -> None:
    for row in generate_problems(5, 300, "heldout").to_pylist():
        assert row["difficulty"] == TIERS[len(json.loads(row["metadata"])["steps"]) - 1]


def test_every_one_step_calculation_is_in_one_part_whatever_its_order() -> None:
    held_out = 0
    pairs = list(itertools.product(range(2, 100), repeat=2))
    for a, b in pairs:
        for sign in "+*":
            assert split_of([(a, sign, b)]) == split_of([(b, sign, a)])
        held_out += split_of([(a, "-", b)]) == "heldout"
    # Binomial: mean n/10, standard deviation below 0.3 sqrt(n); five of them.
    assert abs(held_out - len(pairs) / HELDOUT_ONE_IN) < 5 * 0.3 * len(pairs) ** 0.5


def test_parts_are_disjoint_for_every_seed() -> None:
    assert not calculations(range(6), "train", 300) & calculations(range(6), "heldout", 300)


def test_a_split_by_written_form_would_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: splitting by the order of terms puts 37+48 here and 48+37 there."""

    def by_written_form(steps: list[Step]) -> synthetic.Split:
        return "heldout" if random.Random(str(steps)).random() < 1 / HELDOUT_ONE_IN else "train"

    monkeypatch.setattr(synthetic, "split_of", by_written_form)
    assert calculations(range(6), "train", 300) & calculations(range(6), "heldout", 300)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), split=st.sampled_from(["train", "heldout"]))
def test_every_draw_belongs_to_its_part_and_is_distinct(seed: int, split: synthetic.Split) -> None:
    table = generate_problems(seed, 20, split)
    assert {split_of(steps_of(text)) for text in table["metadata"].to_pylist()} == {split}
    assert len(set(table["question"].to_pylist())) == 20
    assert all(1 <= int(answer) <= synthetic.LARGEST_VALUE for answer in table["answer"].to_pylist())


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-"), st.integers(1, 99)), min_size=1, max_size=4), st.randoms())
def test_canonical_form_ignores_the_order_of_terms(terms: list[tuple[str, int]], rng: random.Random) -> None:
    def chain(first: int, rest: list[tuple[str, int]]) -> list[Step]:
        return [(first if i == 0 else f"#{i - 1}", sign, number) for i, (sign, number) in enumerate(rest)]

    shuffled = rng.sample(terms, len(terms))
    assert canonical(chain(50, terms)) == canonical(chain(50, shuffled))
    changed = [(terms[0][0], terms[0][1] + 100), *terms[1:]]
    assert canonical(chain(50, terms)) != canonical(chain(50, changed))


def test_canonical_form_keeps_precedence_apart() -> None:
    times_sum = canonical([(2, "+", 3), ("#0", "*", 4)])
    sum_with_product = canonical([(3, "*", 4), (2, "+", "#0")])
    assert times_sum != sum_with_product
    assert canonical([(3, "+", 2), (4, "*", "#0")]) == times_sum


def test_first_problems_do_not_depend_on_the_count_and_seeds_differ() -> None:
    few, many = generate_problems(7, 20, "train"), generate_problems(7, 60, "train")
    assert many.slice(0, 20).equals(few)
    assert not set(few["id"].to_pylist()) & set(generate_problems(8, 20, "train")["id"].to_pylist())


def test_families_and_tiers_are_drawn_evenly() -> None:
    rows = generate_problems(9, 2000, "train").to_pylist()
    drawn = Counter((json.loads(row["metadata"])["family"], row["difficulty"]) for row in rows)
    expected = {(t.family, t.difficulty) for t in synthetic.TEMPLATES}
    assert set(drawn) == expected
    # "product" runs out of distinct problems; the others stay within a factor of the even share.
    shares = [count for (family, _), count in drawn.items() if family != "product"]
    assert min(shares) > 0.5 * len(rows) / len(expected)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UserError, match="only about"):
        generate_problems(0, 300, "heldout", families=["product"])
    with pytest.raises(UserError, match="unknown family"):
        generate_problems(0, 1, "train", families=["geometry"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="no problem of families"):
        generate_problems(0, 1, "train", families=["product"], difficulties=["college"])
    with pytest.raises(UserError, match="split 'test'"):
        generate_problems(0, 1, "test")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no steps"):
        steps_of("{}")
