"""What a step trains on: whole groups in the order of slots, until it is full, the rest counted by reason."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from phimr_nemo.align.grpo.rollouts import Rollout
from phimr_nemo.align.grpo.selection import selected
from phimr_nemo.config import GRPOConfig, load_config

GROUP = 4


def config_of(repository: Path, *overrides: str) -> GRPOConfig:
    settings = ("prompts_per_step=3", f"group_size={GROUP}", "rebalance.drop_above=0.5", *overrides)
    return load_config(GRPOConfig, repository / "conf" / "grpo" / "tiny.yaml", settings)


def rollouts_of(right: list[int]) -> list[Rollout]:
    """Group after group, the first responses of each right."""
    return [
        Rollout(slot, sample, 0, (1,), (-0.1,), is_truncated=False, is_correct=sample < count)
        for slot, count in enumerate(right)
        for sample in range(GROUP)
    ]


def test_groups_are_taken_until_the_step_is_full(repository: Path) -> None:
    """Right of 4: 0 impossible, 1 and 2 kept with as many wrong ones, 3 and 4 easy; the fourth kept is surplus."""
    found = selected(rollouts_of([0, 1, 4, 2, 3, 1, 2, 0]), config_of(repository), step=0)
    assert (found.prompts, found.easy, found.impossible, found.surplus) == (3, 2, 2, 1)
    assert len(found.kept) == 2 + 4 + 2
    assert {number // GROUP for number in found.kept} == {1, 3, 5}
    assert {4, 12, 13, 14, 15, 20} <= set(found.kept)
    assert found.metrics(32) == {
        "kept": 8 / 32,
        "trained_prompts": 3,
        "dropped_easy": 2,
        "dropped_impossible": 2,
        "dropped_surplus": 1,
    }


def test_further_prompts_change_nothing_about_the_first(repository: Path) -> None:
    """So a refilled step has all that it would have had without."""
    generator = random.Random(0)
    config = config_of(repository, "prompts_per_step=6")
    for _ in range(50):
        right = [generator.randint(0, GROUP) for _ in range(10)]
        first, whole = (selected(rollouts_of(right[:size]), config, step=7) for size in (6, 10))
        assert whole.kept[: len(first.kept)] == first.kept
        assert whole.prompts == min(6, sum(count in (1, 2) for count in right))
        assert whole.prompts + whole.easy + whole.impossible + whole.surplus == 10


def test_without_rebalancing_the_whole_round_is_trained_on(repository: Path) -> None:
    found = selected(rollouts_of([0, 4, 2]), config_of(repository, "rebalance.enabled=false"), step=0)
    assert list(found.kept) == list(range(12))
    assert (found.prompts, found.easy, found.impossible, found.surplus) == (3, 0, 0, 0)


@pytest.mark.parametrize("rebalance", ["true", "false"])
def test_what_could_not_be_graded_is_not_trained_on(repository: Path, rebalance: str) -> None:
    """Right, lost, wrong, wrong: the lost response is no negative; a group that is lost whole is impossible."""
    group = rollouts_of([1, 0])
    given = [replace(each, is_graded=number not in (1, 4, 5, 6, 7)) for number, each in enumerate(group)]
    for step in range(8):
        found = selected(given, config_of(repository, f"rebalance.enabled={rebalance}"), step)
        assert 1 not in found.kept
        assert set(found.kept) <= {0, 2, 3}
        assert (found.prompts, found.impossible) == (1, 1)


@pytest.mark.parametrize(("change", "is_same"), [("run.seed=0", True), ("run.seed=1", False)])
def test_negatives_depend_on_the_run_s_seed(repository: Path, change: str, is_same: bool) -> None:
    rollouts = rollouts_of([1] * 32)
    config = config_of(repository, "prompts_per_step=32")
    other = selected(rollouts, config_of(repository, "prompts_per_step=32", change), step=0)
    assert (selected(rollouts, config, step=0).kept == other.kept) is is_same
    assert selected(rollouts, config, step=1).kept != selected(rollouts, config, step=0).kept
