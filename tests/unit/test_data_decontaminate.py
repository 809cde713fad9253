"""Planted copies and paraphrases are caught, unrelated and short questions are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from phimr_nemo.config import EvaluationSetConfig, PrepareConfig, load_config
from phimr_nemo.config.evaluation import BenchmarkName
from phimr_nemo.data.prepare.decontaminate import EvaluationIndex, Match, evaluation_questions
from phimr_nemo.data.sources.normalise import comparison_tokens
from phimr_nemo.data.sources.wrapping import bare_question
from phimr_nemo.errors import UserError
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

WALK = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at "
    "a constant speed of $s$ kilometers per hour, the walk takes her 4 hours, including $t$ minutes spent in the "
    "coffee shop. Find the number of minutes the walk takes her."
)
PARAPHRASE = (
    "Each morning, Aya goes for a $12$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at "
    "a constant speed of $v$ kilometers per hour, the walk takes her 5 hours, including $t$ minutes spent in the "
    "coffee shop. What is the number of minutes the walk takes her?"
)
TAIL = "where $m$ and $n$ are relatively prime positive integers. Find $m+n$."
SUM = "What is $7+2$?"
EVALUATION = [
    ("AIME24", WALK),
    ("MATH-500", SUM),
    *(
        ("AIME25", f"The {word} of the ball is $\\frac{{m}}{{n}}$, {TAIL}")
        for word in ("mass", "cost", "speed", "size", "age")
    ),
]


@pytest.fixture(scope="module")
def index() -> EvaluationIndex:
    return EvaluationIndex(EVALUATION, ngram=8, overlap=0.6)


def match(index: EvaluationIndex, question: str) -> Match | None:
    return index.match(question, comparison_tokens(question))


def test_a_planted_copy_is_caught(index: EvaluationIndex) -> None:
    copy = WALK.upper().replace("$9$", "\\(9\\)").replace("  ", " ") + " "
    assert match(index, copy) == Match("exact", "AIME24", WALK, 1.0)
    assert match(index, "what is 7 + 2") == Match("exact", "MATH-500", SUM, 1.0)


def test_a_planted_paraphrase_with_other_numbers_is_caught(index: EvaluationIndex) -> None:
    found = match(index, PARAPHRASE)
    assert found is not None
    assert (found.rule, found.set, found.question) == ("ngram", "AIME24", WALK)
    assert 0.6 <= found.overlap < 1.0


def test_a_copy_inside_a_longer_question_is_caught(index: EvaluationIndex) -> None:
    found = match(index, f"Solve this one. {WALK} Then double it and tell a friend what you have found by doing so.")
    assert found is not None
    assert found.set == "AIME24"


@pytest.mark.parametrize(
    "question",
    [
        "What is $3+5$?",
        "What is $7+3$?",
        f"A die is thrown until a six comes. The chance of an even count is $\\frac{{m}}{{n}}$, {TAIL}",
        "Every morning a baker makes 9 loaves. How many loaves does he make in 4 days?",
        "$1+2+3+4+5+6+7+8+9+10+11+12$",
        "",
    ],
)
def test_unrelated_and_short_questions_are_not(index: EvaluationIndex, question: str) -> None:
    assert match(index, question) is None


def test_without_the_mask_the_paraphrase_of_a_number_rich_question_would_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    question = "Tom buys 3 pens, 4 books and 5 bags on day 6 of week 7 and pays 8 coins for 9 pens and 10 books now."
    other = (
        "Tom buys 13 pens, 14 books and 15 bags on day 16 of week 17 and pays 18 coins for 19 pens and 20 books now."
    )
    assert match(EvaluationIndex([("E", question)], ngram=8, overlap=0.6), other) is not None
    monkeypatch.setattr("phimr_nemo.data.prepare.decontaminate.mask_numbers", lambda tokens: tokens)
    assert match(EvaluationIndex([("E", question)], ngram=8, overlap=0.6), other) is None


def test_drawings_do_not_count(index: EvaluationIndex) -> None:
    drawing = "[asy] size(100); pair A, B, C; label(A, north); label(B, south); draw(A--B--C--cycle); dot(A); [/asy]"
    with_drawing = EvaluationIndex([("E", f"Find the angle at $A$. {drawing}")], ngram=8, overlap=0.6)
    assert match(with_drawing, f"How long is the side $BC$ in the figure shown? {drawing}") is None


def test_questions_come_from_files_and_record_directories(tmp_path: Path) -> None:
    rows = [{"Question": "One?", "Correct Answer": "1"}, {"Question": "Two?", "Correct Answer": "2"}]
    path = tmp_path / "gpqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert list(evaluation_questions(EvaluationSetConfig(name="GPQA", path=path))) == ["One?", "Two?"]
    problem = dict.fromkeys(("solution", "domain", "difficulty")) | {
        "id": "a", "source": "s", "question": "Three?", "answer": "3", "metadata": "{}",
    }  # fmt: skip
    write_shard(tmp_path / "records", 0, rows_to_table([problem], "problems"), kind="problems")
    finish(tmp_path / "records", kind="problems", config={})
    assert list(evaluation_questions(EvaluationSetConfig(name="R", path=tmp_path / "records"))) == ["Three?"]
    with pytest.raises(UserError, match="Correct Answer"):
        list(evaluation_questions(EvaluationSetConfig(name="GPQA", path=path, question="problem")))


def test_real_training_sets_against_real_benchmarks(shared_data: Path) -> None:
    """GSM8K's training set shares no question with AIME and MATH-500; DeepScaleR holds copies from MATH-500."""
    sets = (("AIME24", "aime24.jsonl"), ("AIME25", "aime25.json"), ("MATH-500", "math500.jsonl"))
    questions = [
        (name, question)
        for name, file in sets
        for question in evaluation_questions(EvaluationSetConfig(name=name, path=shared_data / "problems" / file))
    ]
    index = EvaluationIndex(questions, ngram=8, overlap=0.6)
    gsm8k = EvaluationSetConfig(name="gsm8k", path=shared_data / "problems" / "gsm8k_train.jsonl")
    assert [match(index, question) for question in evaluation_questions(gsm8k)] == [None] * 7473
    hard = EvaluationSetConfig(name="hard", path=shared_data / "problems" / "deepscaler_level_3.json.gz")
    found = [one for question in evaluation_questions(hard) if (one := match(index, question)) is not None]
    assert [one.set for one in found if one.rule == "exact"] == ["MATH-500"] * 2
    assert len(found) < 0.003 * 7961


WRAPPED = {
    "instruction": "{} Let's think step by step and output the final answer within \\boxed{{}}.",
    "R1": "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "number": "12. (5 points) {}",
    "headings": "**Problem:** {}\n\n**Answer:**",
    "unknown": "Here comes a riddle for you, my friend: {}",
    "story": "Alice had homework. {} She solved it within an hour.",
}
SHORT = ["Evaluate $(1+2i)6-3i$.", "How many positive divisors does 196 have?", "What is $10^2 + 3$?", WALK]


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrapped_benchmark_question_is_caught(wrapper: str) -> None:
    wrapped = EvaluationIndex([("E", question) for question in SHORT], ngram=8, overlap=0.6)
    for question in SHORT:
        text = WRAPPED[wrapper].format(question)
        found = wrapped.match(text, comparison_tokens(bare_question(text)))
        assert found is not None, text
        assert found.question == question


@pytest.mark.parametrize(
    ("question", "spelled"),
    [
        ("Compute $\\dfrac{3}{4}$ of $1{,}000$.", "Resolva o problema: Compute $\\frac34$ of 1000."),
        ("Find $x^{10}$ if $x=90^{\\circ}$.", "Løs oppgaven: Find x¹⁰ if x = 90°."),
        ("How many divisors does 10,\\!000 have?", "問題: How many divisors does 10000 have?"),
        ("For $x \\in \\mathbb{R}$, is $\\text{lcm}(4,6) = 5\\%$?", "Aufgabe: For x ∈ ℝ, is lcm(4, 6) = 5%?"),
    ],
)
def test_a_benchmark_question_is_caught_in_another_spelling(question: str, spelled: str) -> None:
    index = EvaluationIndex([("E", question)], ngram=8, overlap=0.6)
    assert index.match(spelled, comparison_tokens(bare_question(spelled))) is not None
    other = spelled.replace("4", "7").replace("10", "11").replace("¹⁰", "¹¹")
    assert index.match(other, comparison_tokens(bare_question(other))) is None


@pytest.mark.parametrize(
    "question",
    [
        "Evaluate $(1+2i)6-3i+1$.",
        "If a pile of 9 has 3 stones left, how many positive divisors does 196 have less than it?",
        "What is $102 + 3$?",
        "What is $10^2 + 3 + 4$?",
    ],
)
def test_a_question_that_goes_on_is_another_question(question: str) -> None:
    index = EvaluationIndex([("E", one) for one in SHORT], ngram=8, overlap=0.6)
    assert index.match(question, comparison_tokens(bare_question(question))) is None


def test_superscripts_of_a_benchmark_are_powers() -> None:
    index = EvaluationIndex([("E", "What is 10² + 3?")], ngram=8, overlap=0.6)
    assert match(index, "what is $10^{2}+3$") is not None
    assert match(index, "what is $102+3$") is None


def test_gpqas_own_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gpqa_diamond.csv"
    path.write_text(
        '\ufeffRecord ID,Question,Correct Answer\nr1,"One, with a comma\nand a line?",1\nr2,Two?,2\n', "utf-8"
    )
    asked = list(evaluation_questions(EvaluationSetConfig(name="GPQA-Diamond", path=path)))
    assert asked == ["One, with a comma\nand a line?", "Two?"]
    (tmp_path / "empty.csv").write_text("Question\n", "utf-8")
    with pytest.raises(UserError, match="holds no rows"):
        list(evaluation_questions(EvaluationSetConfig(name="E", path=tmp_path / "empty.csv")))


def test_the_papers_list_holds_every_benchmark_that_evaluation_knows() -> None:
    config = load_config(PrepareConfig, Path("conf/prepare/paper.yaml"), [])
    assert config.decontamination is not None
    assert {one.name for one in config.decontamination.sets} == set(get_args(BenchmarkName))


def test_every_real_benchmark_question_is_caught_behind_a_wrapper(shared_data: Path) -> None:
    """123 of MATH-500's questions are too short for n-grams."""
    questions = list(
        evaluation_questions(EvaluationSetConfig(name="M", path=shared_data / "problems" / "math500.jsonl"))
    )
    index = EvaluationIndex([("M", question) for question in questions], ngram=8, overlap=0.6)
    wrapped = [WRAPPED["instruction"].format(question) for question in questions]
    assert sum(index.match(text, comparison_tokens(bare_question(text))) is not None for text in wrapped) == 500
