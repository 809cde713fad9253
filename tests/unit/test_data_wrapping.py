"""Questions are compared without what only stands around them, and nothing of a question is taken off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest

from phimr_nemo.data.sources.normalise import comparison_key
from phimr_nemo.data.sources.problems import read_problems
from phimr_nemo.data.sources.wrapping import bare_question, learn_wrappers, without_instructions

Wrap = Callable[[str], str]

WRAPS: dict[str, Wrap] = {
    "Skywork": lambda q: q + " Let's think step by step and output the final answer within \\boxed{}.",
    "SYNTHETIC-1": lambda q: (
        "Solve the following math problem efficiently and clearly. The last line of your response should be of the "
        "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without "
        "quotes) where ANSWER is just the final number or expression that solves the problem. Think step by step."
        f"\n\n{q}"
    ),
    "LaTeX": lambda q: (
        f"Solve the following math problem. {q}\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}"
    ),
    "R1": lambda q: q + "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "Bespoke": lambda q: "Return your final response within \\boxed{}. " + q,
    "DAPO": lambda q: (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        f"$Answer (without quotes) where $Answer is the answer to the problem.\n\n{q}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
    "number and points": lambda q: "12. (5 points) " + q,
    "contest": lambda q: "7. [4] " + q,
    "problem": lambda q: "Problem 3: " + q,
    "Markdown": lambda q: "## Question 5\n\n" + q,
    "headings": lambda q: f"**Problem:** {q}\n\n**Answer:**",
    "Alpaca": lambda q: (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{q}\n\n### Response: Let's think step by step."
    ),
    "two orders": lambda q: "Solve this problem and box your answer: " + q,
    "no noun": lambda q: "Please solve the following:\n\n" + q,
    "Q and A": lambda q: f"Q: {q}\nA:",
    "Chinese": lambda q: q + "\n请逐步推理，并将最终答案放在\\boxed{}中。",
    "assistant": lambda q: (
        f"You are a helpful math assistant. Answer the following question.\n{q}\nExplain your reasoning."
    ),
}
QUESTIONS = [
    "Evaluate $(1+2i)6-3i$.",
    "How many positive whole-number divisors does 196 have?",
    "Let $n$ be odd. Find the sum of all $n$ and explain your reasoning about each divisor of 2024 in turn.",
    "Compute the answer to $x = \\boxed{?} + 1$ if the box holds 3",
    'What is the area? [asy]\nlabel("A", (0, 0), N);\n[/asy]',
]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_wrapped_question_is_the_question(wrap: str, question: str) -> None:
    assert comparison_key(bare_question(WRAPS[wrap](question))) == comparison_key(question)


@pytest.mark.parametrize(
    "question",
    [
        *QUESTIONS,
        "(3) + (4) is what?",
        "3.5 times 2 is what?",
        "2024 is what power of 2?",
        "[5] denotes the greatest integer. What is $[5]$?",
        "Write 12 in base 2. Express your answer in base 3.",
        "How long is it? Express your answer to the nearest tenth.",
        "Solve for $x$: $x + 1 = 2$",
        "\\boxed{}",
        "Simplify and write the result with a rational denominator: $\\sqrt{8}$",
        "Add them and give the sum as your answer",
    ],
)
def test_a_question_alone_is_left_whole(question: str) -> None:
    assert comparison_key(bare_question(question)) == comparison_key(question)
    assert without_instructions(question) == question


def test_an_answer_format_stays_in_what_is_stored() -> None:
    question = "What is $1/2 + 1/3$? Express your answer as a common fraction."
    assert without_instructions(WRAPS["R1"](question)) == question
    assert comparison_key(bare_question(question)) == comparison_key("What is $1/2 + 1/3$?")


def test_wrappers_are_learned_from_a_source() -> None:
    bodies = [f"Number {index} has how many divisors?" for index in range(40)]
    first = [
        f"Dear friend, here is a riddle for you: {body}\nThanks in advance for all your help" for body in bodies[:20]
    ]
    second = [f"Another riddle of the old kind. {body}" for body in bodies[20:]]
    wrappers = learn_wrappers(first + second)
    assert [bare_question(text, wrappers) for text in first + second] == bodies
    assert len(wrappers.prefixes) == 2
    # What begins a sentence and does not end one is part of the question.
    assert learn_wrappers([f"What is the sum of {index} and 4?" for index in range(40)]).prefixes == ()
    assert learn_wrappers(["The same question over and over again?"] * 40).prefixes == ()


def test_nothing_is_learned_from_real_sets(shared_data: Path) -> None:
    for name, suffixes in (("gsm8k_train.jsonl", 0), ("math_train.json", 0), ("deepscaler_level_3.json.gz", 0)):
        wrappers = learn_wrappers(read_problems(shared_data / "problems" / name)["question"].to_pylist()[:2000])
        assert (len(wrappers.prefixes), len(wrappers.suffixes)) == (0, suffixes), (name, wrappers)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 200_000,
        "Answer: " * 50_000,
        " " * 2_000_000 + "b",
        "a" + " " * 20_000 + "b (5 points",
        "put " * 100_000 + "\\boxed",
        "1." * 100_000,
        "**" * 200_000 + "Problem",
        "\n" * 100_000 + "Q:",
    ],
)  # fmt: skip
def test_hostile_texts_take_no_time(text: str) -> None:
    started = process_time()
    bare_question(text)
    without_instructions(text)
    assert process_time() - started < 5
