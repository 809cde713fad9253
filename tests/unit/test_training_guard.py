"""The rules that keep a harmful batch from the optimizer."""

from __future__ import annotations

import math
from statistics import median

import pytest

from phimr_nemo.config import GuardConfig
from phimr_nemo.training.guard import judge

WINDOW = 4


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.0])
@pytest.mark.parametrize("norm", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_only_finite_numbers_are_trained_on(loss: float, norm: float, action: str) -> None:
    config = GuardConfig(on_nan=action)  # type: ignore[arg-type]
    expected = "train" if math.isfinite(loss) and math.isfinite(norm) else action
    assert judge(loss, norm, [], config).action == expected


def test_a_spike_is_a_multiple_of_the_median_of_the_last_batches() -> None:
    config = GuardConfig(on_nan="stop", spike_factor=2.0, spike_window=WINDOW, on_spike="skip")
    accepted = [100.0, 1.0, 2.0, 3.0, 4.0]
    limit = 2.0 * median(accepted[-WINDOW:])
    assert limit == 5.0
    assert judge(limit, 1.0, accepted, config).action == "train"
    finding = judge(math.nextafter(limit, math.inf), 1.0, accepted, config)
    assert finding.action == "skip"
    assert "2.5000" in finding.reason


def test_no_spike_before_the_window_is_full_and_none_without_a_rule() -> None:
    config = GuardConfig(on_nan="stop", spike_factor=2.0, spike_window=WINDOW, on_spike="stop")
    assert judge(1e9, 1.0, [1.0] * (WINDOW - 1), config).action == "train"
    assert judge(1e9, 1.0, [1.0] * WINDOW, config).action == "stop"
    assert judge(1e9, 1.0, [1.0] * WINDOW, GuardConfig(on_nan="stop")).action == "train"


def test_the_spike_can_be_the_gradients() -> None:
    """A policy gradient's loss lies around 0: only the norm tells."""
    config = GuardConfig(on_nan="stop", spike_factor=2.0, spike_window=WINDOW, on_spike="skip", spike_of="grad_norm")
    accepted = [1.0] * WINDOW
    assert judge(-5.0, 2.0, accepted, config).action == "train"
    finding = judge(-5.0, 2.5, accepted, config)
    assert finding.action == "skip"
    assert "grad_norm 2.5000" in finding.reason
