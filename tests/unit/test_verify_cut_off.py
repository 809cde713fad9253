"""A response that was cut off at the token limit is graded as such wherever its finish reason is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from phimr_nemo.align.grpo.grading import graded_completions
from phimr_nemo.align.grpo.rollouts import Prompt
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.evaluate.held_out import HeldOut
from phimr_nemo.generate.sampler import Completion, FinishReason, Request
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import finish, read_table, rows_to_table, write_shard
from phimr_nemo.verify import Grader
from phimr_nemo.verify.extract import CUT_OFF, final_answer
from phimr_nemo.verify.stage import verify_rollouts

CLAIM: Final = "So the volume is 3."
"""What a response says that was cut off before the rest of 3.75."""
REASONS: Final[tuple[FinishReason, ...]] = ("length", "stop")
VERDICTS: Final = ["unparsable", "correct"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(synthetic_corpus(0))


@pytest.fixture
def completions(tokenizer: Any) -> list[Completion]:
    token_ids = tuple(tokenizer.encode(CLAIM))
    return [
        Completion(f"{slot}/0", token_ids, (0.0,) * len(token_ids), reason) for slot, reason in enumerate(REASONS)
    ]


def test_of_rollouts(tmp_path: Path) -> None:
    rows = [
        {
            "id": content_id("rollout", reason),
            "problem_id": content_id("problem"),
            "question": "what is the volume?",
            "answer": "3",
            "response": CLAIM,
            "teacher": "test",
            "sample_index": index,
            "seed": index,
            "finish_reason": reason,
            "tokens": 6,
            "domain": None,
            "difficulty": "elementary",
            "metadata": "{}",
        }
        for index, reason in enumerate(REASONS)
    ]
    write_shard(tmp_path / "rollouts", 0, rows_to_table(rows, "rollouts"), kind="rollouts")
    finish(tmp_path / "rollouts", kind="rollouts", config={})
    verify_rollouts(tmp_path / "rollouts", tmp_path / "verdicts", workers=1)
    table = read_table(tmp_path / "verdicts", "verdicts")
    assert table["verdict"].to_pylist() == VERDICTS
    assert table["reason"].to_pylist()[0] == CUT_OFF


def test_of_held_out_questions(tmp_path: Path, tokenizer: Any, completions: list[Completion]) -> None:
    held_out = HeldOut.__new__(HeldOut)
    held_out._tokenizer, held_out._directory = tokenizer, tmp_path
    held_out._config = cast("Any", SimpleNamespace(workers=1, grader=None))
    held_out._names, held_out._answers = ["p", "p"], ["3", "3"]
    held_out.requests = [Request(f"p:{index}", (1,), index) for index in range(2)]
    assert held_out.score(completions, step=1)["pass1"] == 0.5
    [written] = tmp_path.iterdir()
    assert [row["verdict"] for row in json.loads(written.read_text("utf-8"))["responses"]] == VERDICTS


def test_of_a_round(tokenizer: Any, completions: list[Completion]) -> None:
    with Grader(workers=1) as grader:
        graded = graded_completions(grader, tokenizer, [Prompt("p", "3", (1,), False)] * 2, completions, 8)
    assert [one.verdict for one in graded] == VERDICTS
    assert [one.is_truncated for one in graded] == [True, False]


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 18",
        "The answer is **18.**",
        "**Final Answer**\n18",
        "The answer is 17.\n\n**Final Answer**\n1",
        "18",
        "$18$",
        "D",
        "We choose D.",
        r"\boxed{18",
        r"\boxed{\frac{1}{8}",
        r"It is \boxed{18}, \boxed{",
        r"It is \boxed{18} and",
        r"It is \boxed 18",
        r"It is \boxed{17}. No: \boxed",
        "<answer>18",
        "答案是18。",
    ],
)
def test_what_may_have_gone_on_is_no_answer(text: str) -> None:
    assert final_answer(text, is_cut_off=True).text == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"It is \boxed{18}", "18"),
        (r"It is \boxed{18}. To check, 18 =", "18"),
        (r"Once \boxed{17}, then \boxed{18}. So", "18"),
        ("The answer is 18. To check, 18 =", "18"),
        ("#### 18\nNext, we", "18"),
        ("So I choose D.\nThe others", "D"),
        ("<answer>18</answer>", "18"),
        ("The answer is 18.<|im_end|>", "18"),
    ],
)
def test_what_is_complete_counts(text: str, answer: str) -> None:
    assert final_answer(text, is_cut_off=True).text == answer
    assert final_answer(text).text == answer
