"""Rollouts as numbers and as rows; prompts with the remedies that act on them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from phimr_nemo.align.grpo.grading import verdicts_of
from phimr_nemo.align.grpo.rewards import Graded
from phimr_nemo.align.grpo.rollouts import (
    Prompt,
    Rollout,
    check_graded,
    graded_rollouts,
    groups_of,
    load_prompts,
    pass_rate_bin,
    pass_rates_of,
    rollout_metrics,
    rollout_requests,
    training_rows,
)
from phimr_nemo.config import GRPOConfig, load_config
from phimr_nemo.data.chat import render_prompt
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from phimr_nemo.training.metrics import PASS_RATE_BINS

PROMPTS = (Prompt("a", "3", (10, 11, 12), False), Prompt("b", "4", (20, 21), True))


def rollout(
    slot: int, sample: int, prompt: int, *tokens: int, correct: bool = False, cut_off: bool = False
) -> Rollout:
    logprobs = tuple(-0.1 * token for token in tokens)
    parts = {"correctness": 1.0 if correct else -1.0}
    return Rollout(
        slot, sample, prompt, tokens, logprobs, is_truncated=cut_off, is_correct=correct, reward_parts=parts
    )


def test_metrics_of_two_groups() -> None:
    """Group 5: lengths 2 and 4, mean 3, standard deviation 1, spread 1/3; rewards differ. Group 7: equal rewards."""
    rollouts = [
        replace(rollout(5, 0, 0, 1, 2, correct=True), repetition=0.2),
        replace(rollout(5, 1, 0, 1, 2, 3, 4, cut_off=True), repetition=0.6),
        rollout(7, 0, 1, 5),
        rollout(7, 1, 1, 5),
    ]
    metrics = rollout_metrics(rollouts)
    assert metrics["reward"] == pytest.approx(-0.5)
    assert metrics["pass_rate"] == pytest.approx(0.25)
    assert metrics["zero_gradient_groups"] == pytest.approx(0.5)
    assert metrics["response_length"] == pytest.approx(2.0)
    assert metrics["length_spread"] == pytest.approx((1 / 3 + 0.0) / 2)
    assert metrics["truncated"] == pytest.approx(0.25)
    assert metrics["repetition"] == pytest.approx((0.2 + 0.6) / 4)
    assert metrics["repetitive"] == pytest.approx(0.25)
    # One group of a half, one of nothing.
    assert {name: metrics[f"groups_{name}"] for name in PASS_RATE_BINS if metrics[f"groups_{name}"]} == {
        "none": 1.0,
        "below_50": 1.0,
    }
    # (0.1 + 0.2) + (0.1 + 0.2 + 0.3 + 0.4) + 0.5 + 0.5 nats over 8 tokens
    assert metrics["entropy"] == pytest.approx(2.3 / 8)


def test_a_response_that_could_not_be_graded_is_in_no_mean() -> None:
    """Group 0: one right of two graded; group 1: nothing graded, so that it is no group without a gradient."""
    rollouts = [
        rollout(0, 0, 0, 1, correct=True),
        rollout(0, 1, 0, 1),
        replace(rollout(0, 2, 0, 1), is_graded=False, reward_parts={}),
        replace(rollout(1, 0, 1, 1), is_graded=False, reward_parts={}),
    ]
    metrics = rollout_metrics(rollouts)
    assert metrics["ungraded"] == pytest.approx(2 / 4)
    assert (metrics["reward"], metrics["pass_rate"], metrics["zero_gradient_groups"]) == (0.0, 0.5, 0.0)
    assert metrics["groups_below_50"] == 1.0
    assert sum(metrics[f"groups_{name}"] for name in PASS_RATE_BINS) == 1.0
    check_graded(rollouts, 0.5)
    with pytest.raises(UserError, match="gave up on 2 of 4"):
        check_graded(rollouts, 0.49)


def test_a_round_that_could_not_be_graded_at_all_is_an_error_whatever_is_allowed() -> None:
    lost = replace(rollout(0, 0, 0, 1), is_graded=False, reward_parts={}, reason="no such service")
    with pytest.raises(UserError, match="gave up on 2 of 2 responses of a round: no such service"):
        check_graded([lost, lost], 1.0)
    check_graded([lost, rollout(0, 1, 0, 1)], 0.5)


def test_a_prompts_pass_rate_is_that_of_its_graded_responses() -> None:
    rollouts = [
        rollout(0, 0, 5, 1, correct=True),
        rollout(0, 1, 5, 1),
        replace(rollout(0, 2, 5, 1), is_graded=False, reward_parts={}),
        rollout(1, 0, 5, 1, correct=True),
        replace(rollout(2, 0, 6, 1), is_graded=False, reward_parts={}),
        rollout(3, 0, 7, 1),
    ]
    assert pass_rates_of(rollouts) == {5: pytest.approx(2 / 3), 7: 0.0}


@pytest.mark.parametrize("size", [2, 3, 7, 8, 128])
def test_every_group_is_in_the_bin_that_its_name_says(size: int) -> None:
    upper = {
        "none": 0.0,
        "below_25": 0.25,
        "below_50": 0.5,
        "below_75": 0.75,
        "below_100": 1 - 0.5 / size,
        "all": 1.0,
    }
    assert tuple(upper) == PASS_RATE_BINS
    for correct in range(size + 1):
        expected = next(name for name, most in upper.items() if correct / size <= most)
        assert PASS_RATE_BINS[pass_rate_bin(correct, size)] == expected


def test_groups_follow_slots_not_prompts() -> None:
    """An oversampled prompt may stand in two slots of a round: these are two groups."""
    rollouts = [rollout(8, 0, 1, 1), rollout(3, 0, 1, 1), rollout(8, 1, 1, 1), rollout(3, 1, 1, 1)]
    assert groups_of(rollouts) == [[1, 3], [0, 2]]


def test_rows_put_every_response_token_behind_its_predecessor() -> None:
    chosen = [rollout(0, 0, 0, 30, 31, 32), None, rollout(1, 0, 1, 40)]
    rows = training_rows(chosen, PROMPTS, {0: 1.5, 2: -0.5}, pad_id=99)
    no = IGNORED_LABEL
    assert rows["response_tokens"].tolist() == [[10, 11, 12, 30, 31], [99] * 5, [20, 21, 99, 99, 99]]
    assert rows["labels"].tolist() == [[no, no, 30, 31, 32], [no] * 5, [no, 40, no, no, no]]
    expected = [[0, 0, -3.0, -3.1, -3.2], [0] * 5, [0, -4.0, 0, 0, 0]]
    for ours, theirs in zip(rows["sampler_logprobs"].tolist(), expected, strict=True):
        assert ours == pytest.approx(theirs)
    assert rows["advantages"].tolist() == [1.5, 0.0, -0.5]


def test_rows_of_nothing_are_empty_rows() -> None:
    rows = training_rows([None, None], PROMPTS, {}, pad_id=0)
    assert rows["labels"].tolist() == [[IGNORED_LABEL], [IGNORED_LABEL]]


def test_requests_are_whole_groups_with_seeds_of_their_own() -> None:
    requests = rollout_requests({4: PROMPTS[0], 9: PROMPTS[0]}, 3, "0", "7")
    assert [request.id for request in requests] == ["4/0", "4/1", "4/2", "9/0", "9/1", "9/2"]
    assert len({request.seed for request in requests}) == 6
    assert requests[0] == rollout_requests({4: PROMPTS[0]}, 3, "0", "7")[0]
    assert requests[0].seed != rollout_requests({4: PROMPTS[0]}, 3, "0", "8")[0].seed


def test_completions_and_verdicts_become_rollouts() -> None:
    completions = [Completion("4/0", (1, 2), (-1.0, -2.0), "stop"), Completion("4/1", (3,), (-3.0,), "length")]
    loop = " ".join(f"x{number}" for number in range(30))
    graded = [
        Graded("2 + 2 = 4", "4", "correct", 2, 8, is_truncated=False),
        Graded(f"{loop} {loop} {loop} {loop}", "4", "timeout", 1, 8, is_truncated=True),
    ]
    first, second = graded_rollouts(completions, graded, {4: 1}, lambda response: {"length": response.tokens / 8})
    parts = {"length": 2 / 8}
    right: dict[str, Any] = {"is_truncated": False, "is_correct": True, "verdict": "correct"}
    assert first == Rollout(4, 0, 1, (1, 2), (-1.0, -2.0), reward_parts=parts, **right)
    # Three of the four copies repeat the first; and the grader gave up, which is no reward.
    assert second == Rollout(
        4,
        1,
        1,
        (3,),
        (-3.0,),
        is_truncated=True,
        is_correct=False,
        is_graded=False,
        repetition=0.75,
        verdict="timeout",
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(synthetic_corpus())


def written_prompts(
    path: Path, questions: list[str], spreads: list[float], hard: list[bool], answers: list[str] | None = None
) -> Path:
    rows = [
        {
            "id": f"p{i}",
            "problem_id": f"p{i}",
            "question": question,
            "answer": str(i) if answers is None else answers[i],
            "pass_rate": 0.5,
            "mean_length": 9.0,
            "length_spread": spreads[i],
            "hard": hard[i],
        }
        for i, question in enumerate(questions)
    ]
    write_shard(path, 0, rows_to_table(rows, "prompts"), kind="prompts")
    finish(path, kind="prompts", config={})
    return path


def grpo_config(repository: Path, *overrides: str) -> Any:
    return load_config(GRPOConfig, repository / "conf" / "grpo" / "tiny.yaml", overrides)


def test_prompts_are_filtered_by_spread_and_length_and_hard_ones_repeated(
    tmp_path: Path, repository: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = ["What is 1 + 1?", "What is 2 + 2?", "What is 3 + 3? " * 40, "What is 4 + 4?"]
    path = written_prompts(tmp_path / "prompts", questions, [0.2, 0.9, 0.1, 0.4], [True, True, False, False])
    prompts = load_prompts(path, tokenizer, grpo_config(repository, "rebalance.oversample_hard=3"))
    assert [prompt.id for prompt in prompts.prompts] == ["p0", "p3"]
    assert prompts.prompts[1] == Prompt("p3", "3", tuple(render_prompt(tokenizer, questions[3])), False, questions[3])
    assert list(prompts.epoch) == [0, 0, 0, 1]
    assert (prompts.dropped_uneven, prompts.dropped_long) == (1, 1)


def test_the_policy_is_asked_with_the_configured_prompt(
    tmp_path: Path, repository: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = written_prompts(tmp_path / "prompts", ["What is 1 + 1?"], [0.2], [False])
    prompts = load_prompts(path, tokenizer, grpo_config(repository, 'prompt="Think. {question}"'))
    assert prompts.prompts[0].token_ids == tuple(render_prompt(tokenizer, "Think. What is 1 + 1?"))


@pytest.mark.parametrize(
    ("spreads", "message", "remedy"),
    [
        (
            [math.inf, 0.9],
            r"none of the 2 prompts .*max_length_spread=0\.5 drops 2; of the other 0",
            "max_length_spread",
        ),
        ([math.inf, 0.1], r"drops 1; of the other 1 all are longer .* = 2 tokens", "raise sequence_length"),
        ([], r"none of the 0 prompts .* drops 0", "curate again"),
    ],
)
def test_no_usable_prompt_is_an_error_that_says_what_dropped_them(
    tmp_path: Path,
    repository: Path,
    tokenizer: PreTrainedTokenizerBase,
    spreads: list[float],
    message: str,
    remedy: str,
) -> None:
    questions = ["What is 1 + 1?", "What is 2 + 2?"][: len(spreads)]
    path = written_prompts(tmp_path / "prompts", questions, spreads, [False] * len(spreads))
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(path, tokenizer, grpo_config(repository, "sequence_length=98"))
    assert remedy in str(caught.value)


@pytest.mark.parametrize("answer", ["", "  "])
def test_a_prompt_without_an_answer_is_refused(
    tmp_path: Path, repository: Path, tokenizer: PreTrainedTokenizerBase, answer: str
) -> None:
    """Nothing could ever be right: it would only cost samples."""
    path = written_prompts(tmp_path / "prompts", ["What is 1 + 1?"] * 3, [0.1] * 3, [False] * 3, ["2", answer, "2"])
    with pytest.raises(UserError, match=r"1 of 3 prompts in .* have no answer; the first is 'p1'"):
        load_prompts(path, tokenizer, grpo_config(repository))


class Grader:
    """Returns what it was given, or raises it."""

    def __init__(self, *verdicts: str, error: Exception | None = None) -> None:
        self.verdicts = [SimpleNamespace(verdict=verdict, reason="the gold answer is empty") for verdict in verdicts]
        self.error = error

    def grade_many(self, _pairs: Any, _cut_off: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.verdicts


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        (Grader(error=ZeroDivisionError("by zero")), "the reward of 2 responses raised ZeroDivisionError: by zero"),
        (Grader(error=UserError("no math-verify", rule="r", remedy="m")), "no math-verify"),
        (Grader("correct"), "1 verdicts for 2 responses"),
    ],
)
def test_a_reward_that_fails_is_one_clear_error(grader: Grader, message: str) -> None:
    with pytest.raises(UserError, match=message):
        verdicts_of(grader, ["a", "b"], ["1", "2"], [False, True])


@pytest.mark.parametrize("given", [("error", "correct"), ("timeout", "gold_unreadable")])
def test_verdicts_that_judge_nothing_are_handed_on(given: tuple[str, str]) -> None:
    """One process's few responses are no reason to stop: what is too much is asked of the whole round."""
    assert tuple(v.verdict for v in verdicts_of(Grader(*given), ["a", "b"], ["1", "2"], [False, True])) == given
    assert list(verdicts_of(Grader(), [], [], [])) == []
