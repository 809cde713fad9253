"""What a response is worth: each part against a closed form, the sum, and the functions of the user's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from phimr_nemo.align.grpo.rewards import (
    Graded,
    RewardFunction,
    format_score,
    import_rewards,
    is_graded,
    length_score,
    reward_parts,
)
from phimr_nemo.config import GRPOConfig, load_config
from phimr_nemo.config.sampled.grpo import KeptOverlong, RewardConfig, SoftOverlong
from phimr_nemo.errors import UserError
from phimr_nemo.store.records import VerdictName
from phimr_nemo.verify import grade

KEEP = KeptOverlong(kind="keep")
PAPER = RewardConfig(correct=1.0, wrong=-1.0)
GOOD = Graded("<think>\n1+1=2\n</think>\nSo \\boxed{2}", "2", "correct", 30, 120, is_truncated=False)


@pytest.mark.parametrize("preset", ["paper", "tiny"])
def test_presets_reward_correctness_alone(repository: Path, preset: str) -> None:
    config = load_config(GRPOConfig, repository / "conf" / "grpo" / f"{preset}.yaml").reward
    assert reward_parts(GOOD, config, {}, KEEP) == {"correctness": 1.0}
    for verdict in ("wrong", "unparsable"):
        assert reward_parts(replace(GOOD, verdict=verdict), config, {}, KEEP) == {"correctness": -1.0}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD.response, 1.0),
        ("\\boxed{2}", 1.0),
        ("<think>never closed \\boxed{2}", 0.0),
        ("<think>x</think> two boxes \\boxed{1} or \\boxed{2}", 0.0),
        ("<think>x</think> the answer is 2", 0.0),
        ("<think>\\boxed{1} at first</think> \\boxed{2}", 1.0),
    ],
)
def test_format_is_closed_thinking_and_one_box(response: str, expected: float) -> None:
    assert format_score(replace(GOOD, response=response)) == expected
    assert format_score(replace(GOOD, response=response, is_truncated=True)) == 0.0


@pytest.mark.parametrize(("tokens", "expected"), [(1, 119 / 120), (60, 0.5), (120, 0.0), (121, 0.0)])
def test_length_is_the_share_left(tokens: int, expected: float) -> None:
    assert length_score(replace(GOOD, tokens=tokens)) == pytest.approx(expected)


def own(graded: Graded) -> float:
    return graded.tokens / 10


def broken(graded: Graded) -> float:
    raise KeyError(graded.answer)


def undefined(graded: Graded) -> float:
    return math.nan


def test_the_reward_is_the_weighted_sum() -> None:
    """Correct 2, format 0.5 * 1, length 0.25 * (1 - 30/120), own 0.1 * 30/10, overlong -(30 - 20)/100 * 1."""
    spec = f"{__name__}:own"
    config = RewardConfig(correct=2.0, wrong=0.0, format=0.5, length=0.25, functions={spec: 0.1})
    soft = SoftOverlong(kind="soft", buffer=100, penalty=1.0)
    parts = reward_parts(GOOD, config, import_rewards(config), soft)
    expected = {"correctness": 2.0, "format": 0.5, "length": 0.25 * 0.75, spec: 0.3, "overlong": -0.1}
    assert parts == pytest.approx(expected)


@pytest.mark.parametrize(
    ("function", "named"), [(broken, "raised KeyError: '2'"), (undefined, "returned nan")], ids=["raises", "nan"]
)
def test_a_function_that_gives_no_number_stops_the_run(function: RewardFunction, named: str) -> None:
    config = replace(PAPER, functions={"m:f": 1.0})
    with pytest.raises(UserError, match=named):
        reward_parts(GOOD, config, {"m:f": function}, KEEP)


@pytest.mark.parametrize("spec", ["no_such_module_here:f", f"{__name__}:absent"])
def test_a_function_that_is_not_there_is_named(spec: str) -> None:
    with pytest.raises(UserError, match=r"reward\.functions"):
        import_rewards(replace(PAPER, functions={spec: 1.0}))


def test_the_grader_s_giving_up_is_no_verdict_on_the_response() -> None:
    assert {name for name in get_args(VerdictName) if not is_graded(name)} == {"timeout", "error", "gold_unreadable"}
    assert not is_graded(grade("\\boxed{2}", "").verdict)
