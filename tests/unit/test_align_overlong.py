"""Long responses: DAPO's soft punishment against its formula, and responses at the limit that are not trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phimr_nemo.align.grpo.rewards import overlong_penalty
from phimr_nemo.align.grpo.rollouts import Rollout
from phimr_nemo.align.grpo.selection import selected
from phimr_nemo.config import GRPOConfig, load_config
from phimr_nemo.config.sampled.grpo import KeptOverlong, MaskedOverlong, SoftOverlong

TINY = Path("conf/grpo/tiny.yaml")


def dapo(length: int, longest: int, cache: int) -> float:
    """arXiv 2503.14476, equation 13, as printed."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize(("longest", "buffer"), [(20, 5), (20, 20), (7, 1)])
def test_the_soft_punishment_is_dapos(longest: int, buffer: int) -> None:
    for length in range(1, longest + 3):
        for penalty in (1.0, 0.5):
            found = overlong_penalty(length, longest, SoftOverlong(kind="soft", buffer=buffer, penalty=penalty))
            assert found == pytest.approx(penalty * dapo(length, longest, buffer))
        assert overlong_penalty(length, longest, KeptOverlong(kind="keep")) == 0.0
        assert overlong_penalty(length, longest, MaskedOverlong(kind="mask")) == 0.0


def rollouts(*groups: str) -> list[Rollout]:
    """A letter a response: right or wrong, in capitals if it hit the limit."""
    return [
        Rollout(slot, sample, slot, (1, 2), (-0.1, -0.2), is_truncated=letter.isupper(), is_correct=letter in "rR")
        for slot, group in enumerate(groups)
        for sample, letter in enumerate(group)
    ]


def test_masked_responses_are_not_trained_on() -> None:
    settings = ["rebalance.enabled=false", "prompts_per_step=3", "group_size=4"]
    config = load_config(GRPOConfig, TINY, settings)
    given = rollouts("rwRW", "rrww", "WWWW")
    assert selected(given, config, 0).kept == list(range(12))
    masked = replace(config, overlong=MaskedOverlong(kind="mask"))
    chosen = selected(given, masked, 0)
    assert list(chosen.kept) == [0, 1, 4, 5, 6, 7]
    assert (chosen.prompts, chosen.impossible) == (2, 1)


def test_masking_comes_before_rebalancing() -> None:
    """One right response is balanced by one wrong one that is trained on, never by one that is left out."""
    config = load_config(GRPOConfig, TINY, ["prompts_per_step=1", "group_size=4", "overlong.kind=mask"])
    for step in range(8):
        assert list(selected(rollouts("rwWW"), config, step).kept) == [0, 1]
