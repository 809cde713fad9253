"""The programmatic teacher: right solutions hold step by step, mistakes always spoil the answer."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
from test_data_synthetic import python_value

from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import MISTAKES, TeacherResponse, solve, teacher_rollouts
from phimr_nemo.errors import UserError

BOX = re.compile(r"\\boxed\{(-?\d+)\}")


def boxed(response: str) -> int | None:
    found = BOX.findall(response)
    assert len(found) <= 1
    return int(found[0]) if found else None


def false_equalities(response: str) -> int:
    """How many of the written equalities do not hold (unbalanced ends of a cut-off line aside)."""
    false = 0
    for line in response.splitlines():
        if "=" in line and "boxed" not in line:
            values = [python_value(part) for part in line.split("=")]
            false += sum(a != b for a, b in itertools.pairwise(values))
    return false


def written(count: int, mistake_rate: float) -> list[tuple[int, TeacherResponse]]:
    problems = generate_problems(11, count, "train").to_pylist()
    rng = random.Random(12)
    return [(int(p["answer"]), solve(p["metadata"], rng, mistake_rate)) for p in problems]


def test_without_mistakes_every_equality_holds_and_the_box_is_right() -> None:
    for answer, solution in written(400, 0.0):
        assert solution.mistake is None
        assert solution.finish_reason == "stop"
        assert boxed(solution.response) == answer
        assert false_equalities(solution.response) == 0
        assert re.fullmatch(r"<think>\n.*\n</think>\nThe answer is \\boxed\{\d+\}\.", solution.response, re.S)


def test_a_mistake_always_spoils_the_answer_and_propagates_consistently() -> None:
    kinds: Counter[str] = Counter()
    for answer, solution in written(1500, 1.0):
        assert solution.mistake is not None
        kinds[solution.mistake] += 1
        assert boxed(solution.response) != answer, solution
        assert (solution.finish_reason == "length") == (solution.mistake == "truncated")
        if solution.mistake in ("missing_box", "truncated"):
            assert boxed(solution.response) is None
        elif solution.mistake in ("wrong_operation", "dropped_step"):
            assert false_equalities(solution.response) == 0
        else:
            assert false_equalities(solution.response) == 1
    assert set(kinds) == set(MISTAKES)
    assert min(kinds.values()) > 0.05 * sum(kinds.values())


def test_careful_style_goes_one_digit_at_a_time() -> None:
    texts = "\n".join(solution.response for _, solution in written(400, 0.0))
    careful = re.findall(r"^(\d+)([+-])(\d\d)=(\d+)[+-](\d)=(\d+)$", texts, re.M)
    assert len(careful) > 50
    for left, sign, right, middle, units, _ in careful:
        tens = int(right) // 10 * 10
        assert int(middle) == (int(left) + tens if sign == "+" else int(left) - tens)
        assert int(units) == int(right) % 10
    assert re.search(r"^\d\d\+\d\d=\d+$", texts, re.M), "the terse style is there too"


def test_the_rate_of_mistakes_is_the_one_that_was_set() -> None:
    problems = generate_problems(13, 500, "train")
    rows = teacher_rollouts(problems, 4, seed=1, mistake_rate=0.3).to_pylist()
    wrong = sum(boxed(row["response"]) != int(row["answer"]) for row in rows)
    # Binomial standard deviation of 2,000 draws at 0.3 is 20.5; four of them.
    assert abs(wrong - 600) < 82


def test_a_response_is_its_lines_and_nothing_between_them() -> None:
    """Without any working too: an empty line there would be another text, and other tokens to train on."""
    rows = teacher_rollouts(generate_problems(0, 2000, "train"), 1, 0, 1.0).to_pylist()
    texts = [row["response"] for row in rows if row["finish_reason"] == "stop"]
    assert all(text.startswith("<think>\n") and "\n\n" not in text for text in texts)
    assert any(text.startswith("<think>\n</think>\n") for text in texts)


def test_rollouts_derive_from_content() -> None:
    problems = generate_problems(14, 30, "train")
    whole = teacher_rollouts(problems, 3, seed=2, mistake_rate=0.5)
    assert whole["sample_index"].to_pylist() == [0, 1, 2] * 30
    assert len(set(whole["id"].to_pylist())) == 90
    alone = teacher_rollouts(problems.slice(20, 1), 3, seed=2, mistake_rate=0.5)
    assert alone.equals(whole.slice(60, 3).combine_chunks())
    assert not set(whole["id"].to_pylist()) & set(teacher_rollouts(problems, 3, 3, 0.5)["id"].to_pylist())


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    problem = generate_problems(15, 1, "train").to_pylist()[0]
    with pytest.raises(UserError, match="mistake rate"):
        solve(problem["metadata"], random.Random(0), rate)


def test_teachers_of_two_styles_are_two_teachers() -> None:
    """Without mistakes the careful one writes a digit at a time and the terse one never; mistakes are independent."""
    problems = generate_problems(16, 200, "train")
    careful, terse = (teacher_rollouts(problems, 1, 0, 0.0, style).to_pylist() for style in ("careful", "terse"))
    assert {row["teacher"] for row in careful} == {"programmatic-careful"}
    assert not {row["id"] for row in careful} & {row["id"] for row in terse}
    assert all(line.count("=") == 1 for row in terse for line in row["response"].splitlines() if "=" in line)
    assert any(line.count("=") > 1 for row in careful for line in row["response"].splitlines())
    mixed = {row["response"] for row in teacher_rollouts(problems, 1, 0, 0.0).to_pylist()}
    assert mixed <= {row["response"] for row in (*careful, *terse)}
    wrong = [
        [
            boxed(row["response"]) != int(row["answer"])
            for row in teacher_rollouts(problems, 1, 0, 0.5, style).to_pylist()
        ]
        for style in ("careful", "terse")
    ]
    # Of 200 problems both are wrong at 50 in the mean, with a standard deviation of 6.1; four of them.
    assert abs(sum(a and b for a, b in zip(*wrong, strict=True)) - 50) < 25
    rarely = teacher_rollouts(problems, 1, 0, 0.25, "careful").to_pylist()
    slips = [boxed(row["response"]) != int(row["answer"]) for row in rarely]
    # Were they the same draws, all 50 would be among the 100; independent ones are at 25, deviation 4.7.
    assert abs(sum(a and b for a, b in zip(slips, wrong[0], strict=True)) - 25) < 19
