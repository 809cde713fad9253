"""The paper's three remedies: annealing, uniform prompts, rebalanced groups; expected values derived by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from phimr_nemo.align.grpo.stabilisers import (
    annealed_temperature,
    group_fate,
    oversampled,
    rebalanced_group,
    refill_size,
    uniform_prompts,
    unsolved,
)
from phimr_nemo.config.sampled.grpo import (
    CurriculumConfig,
    PromptOptimizationConfig,
    RebalanceConfig,
)
from phimr_nemo.config.sampled.rounds import TemperatureConfig
from phimr_nemo.errors import UserError

PAPER = TemperatureConfig(start=1.0, end=0.6, fraction=0.5)


def test_the_papers_temperature_over_ten_rounds() -> None:
    """0.4 less over 5 rounds is 0.08 a round; from round 5 on it stays."""
    expected = [1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert [annealed_temperature(step, 10, PAPER) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [0.5] * 4), (1.0, [0.9, 0.8, 0.7, 0.6])])
def test_annealing_at_once_and_to_the_very_end(fraction: float, expected: list[float]) -> None:
    config = TemperatureConfig(start=0.9, end=0.5, fraction=fraction)
    assert [annealed_temperature(step, 4, config) for step in range(4)] == pytest.approx(expected)


def test_constant_temperature_is_constant() -> None:
    config = TemperatureConfig(start=0.7, end=0.7, fraction=0.5)
    assert {annealed_temperature(step, 7, config) for step in range(7)} == {0.7}


@pytest.mark.parametrize("values", [(0.0, 0.6, 0.5), (1.0, -1.0, 0.5), (1.0, 0.6, 1.5), (math.nan, 0.6, 0.5)])
def test_impossible_schedules_are_refused(values: tuple[float, float, float]) -> None:
    start, end, fraction = values
    with pytest.raises(UserError, match=r"start|end|fraction"):
        TemperatureConfig(start=start, end=end, fraction=fraction)


def test_uneven_prompts_are_dropped() -> None:
    config = PromptOptimizationConfig(enabled=True, max_length_spread=0.3)
    assert uniform_prompts([0.1, 0.31, 0.3, math.nan, 0.0], config) == [0, 2, 4]


def test_without_prompt_optimisation_all_stay() -> None:
    config = PromptOptimizationConfig(enabled=False, max_length_spread=0.0)
    assert uniform_prompts([0.1, math.nan, 9.0], config) == [0, 1, 2]


def rebalance(drop_above: float = 0.5, *, enabled: bool = True, hard: int = 2) -> RebalanceConfig:
    return RebalanceConfig(enabled=enabled, drop_above=drop_above, oversample_hard=hard, refill_rounds=0)


def test_hard_prompts_are_repeated() -> None:
    assert oversampled([False, True, False, True], rebalance(hard=3)) == [0, 1, 1, 1, 2, 3, 3, 3]
    assert oversampled([False, True], rebalance(enabled=False, hard=3)) == [0, 1]


def test_a_hard_prompt_cannot_be_left_out() -> None:
    with pytest.raises(UserError, match="oversample_hard=0"):
        oversampled([True], rebalance(hard=0))


def test_every_group_of_six_keeps_what_the_paper_says() -> None:
    """All 64 groups: all positives and equally many negatives where 1..3 of 6 are correct, else nothing."""
    for correct in itertools.product([False, True], repeat=6):
        kept = rebalanced_group(correct, rebalance(0.5), seed=1)
        positives = {i for i in range(6) if correct[i]}
        if not 1 <= len(positives) <= 3:
            assert kept == []
            continue
        assert positives <= set(kept)
        assert len(kept) == len(set(kept)) == 2 * len(positives)
        assert kept == sorted(kept)


def test_every_group_of_six_has_a_reason() -> None:
    """By how many of 6 are right: none, up to half of them, more."""
    expected = ["impossible", "kept", "kept", "kept", "easy", "easy", "easy"]
    for correct in itertools.product([False, True], repeat=6):
        assert group_fate(correct, rebalance(0.5)) == expected[sum(correct)]
        assert group_fate(correct, rebalance(0.5, enabled=False)) == "kept"
    assert group_fate([True] * 6, rebalance(1.0)) == "easy"


def test_as_many_prompts_are_sampled_again_as_are_expected_to_fill_the_step() -> None:
    """16 of 64 found: a quarter, so 48 missing ones take 192, of which at most 64 at once; 60 of 64: 4.3, so 5."""
    assert refill_size(wanted=64, found=16, sampled=64, largest=64) == 64
    assert refill_size(wanted=64, found=60, sampled=64, largest=64) == 5
    assert refill_size(wanted=64, found=0, sampled=64, largest=64) == 64
    assert refill_size(wanted=64, found=64, sampled=100, largest=64) == 0
    assert refill_size(wanted=64, found=70, sampled=128, largest=64) == 0


def test_what_is_sampled_again_suffices_at_the_same_yield() -> None:
    for wanted, sampled in itertools.product(range(1, 12), range(1, 12)):
        for found in range(1, sampled + 1):
            size = refill_size(wanted, found, sampled, largest=10**6)
            # One prompt fewer would not be enough.
            assert found + size * found / sampled >= wanted or size == 0
            assert size == 0 or found + (size - 1) * found / sampled < wanted


def test_the_threshold_itself_is_kept() -> None:
    assert rebalanced_group([True, False], rebalance(0.5), seed=0) == [0, 1]
    assert rebalanced_group([True, True, False], rebalance(0.5), seed=0) == []


def test_where_negatives_are_fewer_all_of_them_stay() -> None:
    assert rebalanced_group([True, True, False, True], rebalance(0.9), seed=0) == [0, 1, 2, 3]


def test_negatives_are_chosen_evenly_and_by_seed() -> None:
    """One positive, four negatives: over 2,000 seeds each negative is chosen 500 times, give or take 5 sigma."""
    group = [False, False, True, False, False]
    chosen = Counter(i for seed in range(2000) for i in rebalanced_group(group, rebalance(), seed) if i != 2)
    sigma = math.sqrt(2000 * 0.25 * 0.75)
    assert set(chosen) == {0, 1, 3, 4}
    assert all(abs(count - 500) < 5 * sigma for count in chosen.values())
    assert rebalanced_group(group, rebalance(), 7) == rebalanced_group(group, rebalance(), 7)


def test_without_rebalancing_the_group_is_whole() -> None:
    assert rebalanced_group([True, True, True], rebalance(0.0, enabled=False), seed=0) == [0, 1, 2]


# ---- a curriculum ------------------------------------------------------------------------------------------------


def test_solved_prompts_give_their_places_to_the_next_ones() -> None:
    """Of the epoch 4 4 7 9 the prompts 4 (9 of 10) and 9 (all) are solved, 7 is not and 8 was never sampled."""
    epoch, rates = [4, 4, 7, 9, 8], {4: 0.9, 7: 0.8, 9: 1.0}
    config = CurriculumConfig(solved_from=0.9)
    assert [unsolved(epoch, place, rates, config) for place in range(5)] == [7, 7, 7, 8, 8]
    # A prompt that is no longer solved comes back.
    assert unsolved(epoch, 3, rates | {9: 0.5}, config) == 9


def test_without_a_curriculum_or_with_all_solved_the_order_stays() -> None:
    epoch, rates = [4, 7, 9], {4: 1.0, 7: 1.0, 9: 1.0}
    for config in (CurriculumConfig(), CurriculumConfig(solved_from=0.9)):
        assert [unsolved(epoch, place, rates, config) for place in range(3)] == epoch


@pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (1.0, 1.4)])
def test_a_temperature_may_stay_or_rise(start: float, end: float) -> None:
    config = TemperatureConfig(start=start, end=end, fraction=1.0)
    found = [annealed_temperature(step, 4, config) for step in range(5)]
    assert found == pytest.approx([start + (end - start) * step / 4 for step in range(5)])
