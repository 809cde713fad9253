"""A programmatic teacher: step-by-step solutions of generated problems, with realistic mistakes at a set rate.

A response looks like a reasoning model's: `<think>`, one line of equations a step, `</think>`, and a
final sentence with `\\boxed{n}`. Two styles are mixed: terse (`37+48=85`) and careful
(`37+48=77+8=85`, one digit at a time). A mistake propagates through the later steps and always spoils
the final answer, so a response with a mistake is wrong or has no answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from phimr_nemo.data.synthetic.arithmetic import OPERATIONS, Step, evaluate, value_of
from phimr_nemo.data.synthetic.problems import steps_of
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.records import FinishReason
from phimr_nemo.store.shards import rows_to_table
from phimr_nemo.text.thinking import CLOSE, OPEN

if TYPE_CHECKING:
    import pyarrow as pa

Mistake = Literal[
    "carry_slip",
    "off_by_one",
    "wrong_operation",
    "swapped_digits",
    "dropped_step",
    "missing_box",
    "truncated",
]
TeacherStyle = Literal["careful", "terse"]
MISTAKES: Final[tuple[Mistake, ...]] = get_args(Mistake)
_CONFUSED: Final = {"+": "-", "-": "+", "*": "+"}

TEACHER: Final = "programmatic"
CAREFUL_SHARE: Final = 0.5
TOKENS_UNKNOWN: Final = -1
SHORTEST_CUT: Final = 0.2
LONGEST_CUT: Final = 0.8


@dataclass(frozen=True)
class TeacherResponse:
    """What the teacher wrote.

    Attributes:
        response: the text.
        finish_reason: "length" when the response was cut off, else "stop".
        mistake: the mistake that was made, or None when the solution is right.
    """

    response: str
    finish_reason: FinishReason
    mistake: Mistake | None


def solve(
    metadata: str, rng: random.Random, mistake_rate: float, style: TeacherStyle | None = None
) -> TeacherResponse:
    """Solve one generated problem, wrongly with probability `mistake_rate`.

    Args:
        metadata: the problem's metadata column.
        rng: the source of style, mistake and place.
        mistake_rate: probability of a mistake, 0 to 1.
        style: of the steps; None draws one of both.

    Raises:
        UserError: not a generated problem, or a rate outside 0 to 1.
    """
    if not 0.0 <= mistake_rate <= 1.0:
        raise UserError(
            f"mistake rate {mistake_rate}", rule="a rate is between 0 and 1", remedy="correct mistake_rate"
        )
    steps = steps_of(metadata)
    drawn = rng.random() < CAREFUL_SHARE
    careful = drawn if style is None else style == "careful"
    if rng.random() >= mistake_rate:
        lines, answer = _work(steps, careful)
        return TeacherResponse(_response(lines, answer), "stop", None)
    right_answer = evaluate(steps)[-1]
    for mistake in rng.sample(MISTAKES, len(MISTAKES)):
        if mistake == "missing_box":
            lines, answer = _work(steps, careful)
            return TeacherResponse(_response(lines, None), "stop", mistake)
        if mistake == "truncated":
            text = _response(*_work(steps, careful))
            text = text[: int(len(text) * rng.uniform(SHORTEST_CUT, LONGEST_CUT))]
            return TeacherResponse(text.partition("\\boxed")[0], "length", mistake)
        slip = _Slip(mistake, rng.randrange(len(steps)), rng.choice((-1, 1)))
        lines, answer = _work(steps, careful, slip)
        if answer != right_answer:
            return TeacherResponse(_response(lines, answer), "stop", mistake)
    raise AssertionError("a missing box is always possible")


@dataclass(frozen=True)
class _Slip:
    """A mistake in one step; `direction` is its sign where it has one."""

    mistake: Mistake
    step: int
    direction: int


def _work(steps: Sequence[Step], careful: bool, slip: _Slip | None = None) -> tuple[list[str], int]:
    """The written lines and the final value, a slip's consequences included."""
    lines: list[str] = []
    results: list[int] = []
    for index, (left_operand, operation, right_operand) in enumerate(steps):
        left, right = value_of(left_operand, results), value_of(right_operand, results)
        slipped = slip if slip is not None and slip.step == index else None
        if slipped is not None and slipped.mistake == "dropped_step":
            results.append(left)
            continue
        if slipped is not None and slipped.mistake == "wrong_operation":
            operation = _CONFUSED[operation]
        result = OPERATIONS[operation](left, right)
        if slipped is not None:
            result = _spoil(result, left, operation, right, slipped)
        middle = _in_parts(left, operation, right) if careful else []
        lines.append("=".join([f"{left}{operation}{right}", *middle, str(result)]))
        results.append(result)
    return lines, results[-1]


def _spoil(result: int, left: int, operation: str, right: int, slip: _Slip) -> int:
    """The result as a careless hand would write it; unchanged where this mistake cannot happen."""
    if slip.mistake == "off_by_one":
        return result + slip.direction
    if slip.mistake == "swapped_digits":
        tens, units = divmod(abs(result) % 100, 10)
        return result - 10 * tens - units + 10 * units + tens if result >= 10 else result
    if slip.mistake == "carry_slip":
        if operation == "+" and left % 10 + right % 10 >= 10:
            return result - 10
        if operation == "-" and left % 10 < right % 10:
            return result + 10
        if operation == "*" and (left % 10) * (right % 10) >= 10:
            return result - 10
    return result


def _in_parts(left: int, operation: str, right: int) -> list[str]:
    """The expressions between a calculation and its result when it is done one digit at a time.

    `37+48` goes over `77+8`, `14*6` over `60+24`; nothing where one digit is all there is.
    """
    if operation == "*":
        large, small = max(left, right), min(left, right)
        tens, units = large - large % 10, large % 10
        return [f"{tens * small}+{units * small}"] if tens and units and 0 < small < 10 else []
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(abs(right)))) if digit != "0"]
    if right < 0 or left < 0:
        return []
    middle = []
    while len(parts) > 1:
        left = OPERATIONS[operation](left, parts.pop())
        middle.append(f"{left}{operation}{sum(parts)}")
    return middle


def _response(lines: Sequence[str], answer: int | None) -> str:
    final = "So that is the answer." if answer is None else f"The answer is \\boxed{{{answer}}}."
    return "\n".join([OPEN, *lines, CLOSE, final])


def teacher_rollouts(
    problems: pa.Table,
    rollouts_per_problem: int,
    seed: int,
    mistake_rate: float,
    style: TeacherStyle | None = None,
) -> pa.Table:
    """Several solutions of every problem; ids and seeds derive from content, so a retry repeats them.

    Args:
        problems: a table of kind "problems", all generated by this project.
        rollouts_per_problem: solutions of each.
        seed: another seed gives other styles and mistakes.
        mistake_rate: probability that a solution holds a mistake, 0 to 1.
        style: of all solutions, as a teacher of its own, whose mistakes are independent of those of another style or
            rate; None mixes both styles.

    Returns:
        A table of kind "rollouts", `rollouts_per_problem` rows a problem, in the problems' order.

    Raises:
        UserError: a problem was not generated by this project, or the rate is outside 0 to 1.
    """
    name = TEACHER if style is None else f"{TEACHER}-{style}"
    kind = ("teacher",) if style is None else ("teacher", style, f"{mistake_rate:g}")
    rows = []
    for problem in problems.to_pylist():
        for sample_index in range(rollouts_per_problem):
            rollout_seed = content_seed(*kind, str(seed), problem["id"], str(sample_index))
            written = solve(problem["metadata"], random.Random(rollout_seed), mistake_rate, style)
            rows.append(
                {
                    "id": content_id("rollout", problem["id"], name, str(seed), str(sample_index)),
                    "problem_id": problem["id"],
                    "question": problem["question"],
                    "answer": problem["answer"],
                    "response": written.response,
                    "teacher": name,
                    "sample_index": sample_index,
                    "seed": rollout_seed,
                    "finish_reason": written.finish_reason,
                    "tokens": TOKENS_UNKNOWN,
                    "domain": problem["domain"],
                    "difficulty": problem["difficulty"],
                    "source": problem["source"],
                    "metadata": problem["metadata"],
                }
            )
    return rows_to_table(rows, "rollouts")
