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
    "Qwen": lambda q: (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "R1-Distill": lambda q: (
        f"<｜begin▁of▁sentence｜><｜User｜>{q}\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<｜Assistant｜><think>\n"
    ),
    "Llama 3": lambda q: (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Llama 2": lambda q: f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{q} [/INST]",
    "Gemma": lambda q: f"<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n",
    "Granite": lambda q: (
        f"<|start_of_role|>user<|end_of_role|>{q}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    ),
    "R1-Zero": lambda q: (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        f"User: {q} Assistant:"
    ),
    "Open-Reasoner-Zero": lambda q: (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> "
        "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: You "
        "must put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final "
        "answer will be extracted automatically by the \\boxed{} tag.\nThis is the problem:\n"
        f"{q}\nAssistant: <think>"
    ),
    "tags": lambda q: (
        f"Solve the math problem inside the tags.\n<problem>{q}</problem>\nPut your answer in <answer></answer> tags."
    ),
    "few shots": lambda q: (
        f"Question: What is 1+1?\nAnswer: 2\n\nQuestion: Is 3 odd?\nAnswer: yes\n\nQuestion: {q}\nAnswer:"
    ),
    "Minerva": lambda q: (
        "Problem:\nFind the domain of $\\sqrt{x-2}$.\n\nSolution:\nFinal Answer: The final answer is $[2,\\infty)$. "
        f"I hope it is correct.\n\nProblem:\n{q}\n\nSolution:"
    ),
    "lighteval": lambda q: (
        "Solve the following math problem efficiently and clearly:\n\n- For simple problems (2 steps or fewer):\n"
        "Provide a concise solution.\n\n## Step 1: [Concise description]\n...\n\nTherefore, the final answer is: "
        f"$\\boxed{{answer}}$. I hope it is correct.\n\nProblem: {q}"
    ),
    "switch": lambda q: q + " /no_think",
    "detailed thinking": lambda q: "detailed thinking on\n\n" + q,
    "note": lambda q: q + "\n\nNote: the answer must be placed in \\boxed{}.",
    "bold": lambda q: f"**{q}**",
    "contest and year": lambda q: "(AIME 2024 Problem 3) " + q,
    "Putnam": lambda q: "A1. " + q,
    "Roman": lambda q: "IV. " + q,
    "in words": lambda q: "Three, (10 points) " + q,
    "Russian": lambda q: q + "\nПожалуйста, рассуждайте шаг за шагом и поместите окончательный ответ в \\boxed{}.",
    "Japanese": lambda q: q + "\n最終的な答えは\\boxed{}に入れてください。",
    "Spanish": lambda q: "Razona paso a paso y pon tu respuesta final dentro de \\boxed{}.\n" + q,
    "a friend": lambda q: "I have a math problem for you. Can you help me solve it? " + q,
    "an integer": lambda q: q + "\nThe answer is an integer between 0 and 999 inclusive.",
    "choice": lambda q: (
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
        f"\n\n{q}"
    ),
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
        "Fill the box: $3 + \\boxed{} = 7$.",
        "Which digit belongs in $\\boxed{}$?",
        "Two, three and five are prime. What is the next prime?",
        "I have 3 problems for you: find 1+1, 2+2 and 3+3",
        "A conversation takes 5 minutes. How many take an hour?",
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
