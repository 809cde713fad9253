"""What a run is judged by: measurements from its metrics, the best of them, early stopping as a pure function."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phimr_nemo.training.early_stopping import Measured, best_of, has_converged, measurements
from phimr_nemo.training.metrics import metrics_of

LOSS = metrics_of("sft")["val_loss"]
FLOOR, FALL, RATE = 1.0, 2.0, 0.5


def stops_at(losses: list[float], patience: int, min_delta: float) -> int | None:
    """The first measurement (from 0) after which training ends."""
    for count in range(1, len(losses) + 1):
        if has_converged(losses[:count], patience, min_delta, LOSS):
            return count - 1
    return None


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("min_delta", [0.01, 0.1])
def test_an_exponential_curve_stops_where_the_closed_form_says(patience: int, min_delta: float) -> None:
    """l(n) = FLOOR + FALL e^(-RATE n) falls by FALL (1 - e^-RATE) e^(-RATE (n - 1)) at step n; progress is measured
    from the last progress, so while every step is progress, it ends at the first n whose fall since the last
    progress is small for `patience` measurements."""
    losses = [FLOOR + FALL * math.exp(-RATE * n) for n in range(60)]
    # l(k) is the last progress iff the limit FLOOR is within min_delta of it after `patience` steps more.
    progress = [0]
    for n in range(1, 60):
        if losses[progress[-1]] - losses[n] > min_delta:
            progress.append(n)
        elif n - progress[-1] == patience:
            break
    assert stops_at(losses, patience, min_delta) == progress[-1] + patience


def test_a_curve_that_keeps_falling_never_stops() -> None:
    assert stops_at([10.0 - 0.2 * n for n in range(40)], 1, 0.1) is None


def test_a_curve_that_rises_stops_after_patience() -> None:
    assert stops_at([1.0, 2.0, 3.0, 4.0, 5.0], 3, 0.0) == 3


def test_noise_within_min_delta_is_no_progress() -> None:
    rng = np.random.default_rng(0)
    losses = [1.0, *(1.0 - 0.009 * rng.random(20))]
    assert stops_at([float(x) for x in losses], 4, 0.01) == 4


def test_brute_force() -> None:
    """Against the definition by recursion, on random curves."""

    def since_progress(losses: list[float], min_delta: float) -> tuple[int, float]:
        if len(losses) == 1:
            return 0, losses[0]
        count, best = since_progress(losses[:-1], min_delta)
        return (0, losses[-1]) if best - losses[-1] > min_delta else (count + 1, best)

    rng = np.random.default_rng(1)
    for _ in range(200):
        losses = [float(x) for x in rng.random(rng.integers(1, 9))]
        patience, min_delta = int(rng.integers(1, 4)), float(rng.choice([0.0, 0.1, 0.3]))
        assert has_converged(losses, patience, min_delta, LOSS) == (since_progress(losses, min_delta)[0] >= patience)
    assert not has_converged([], 1, 0.0, LOSS)


def test_a_metric_that_rises_is_the_mirror_image_of_one_that_falls() -> None:
    rate = metrics_of("grpo")["pass_rate"]
    rng = np.random.default_rng(2)
    for _ in range(100):
        values = [float(x) for x in rng.random(rng.integers(1, 9))]
        patience, min_delta = int(rng.integers(1, 4)), float(rng.choice([0.0, 0.1, 0.3]))
        mirrored = has_converged([-value for value in values], patience, min_delta, LOSS)
        assert has_converged(values, patience, min_delta, rate) == mirrored


def rows(name: str, values: list[float]) -> list[dict[str, float]]:
    return [{"step": step, name: value} for step, value in enumerate(values, start=1)]


def test_a_metric_of_the_log_is_the_mean_since_the_checkpoint_before() -> None:
    """Checkpoints after steps 2, 4 and the last, 5; a step that was skipped has no finite loss."""
    loss = metrics_of("dpo")["loss"]
    lines = rows("loss", [8.0, 4.0, 2.0, math.nan, 1.0])
    for done, expected in (
        (1, []),
        (2, [Measured(2, 6.0)]),
        (3, [Measured(2, 6.0)]),
        (4, [Measured(2, 6.0), Measured(4, 2.0)]),
        (5, [Measured(2, 6.0), Measured(4, 2.0), Measured(5, 1.0)]),
    ):
        assert measurements(lines, loss, every=2, last=5, done=done) == expected


def test_a_validation_speaks_for_its_own_step() -> None:
    lines = [{"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 3.0}, {"step": 4, "val_loss": 2.0}]
    assert measurements(lines, LOSS, every=2, last=6, done=6) == [Measured(2, 3.0), Measured(4, 2.0)]
    # A run that continues at step 3 does not know yet what came after it.
    assert measurements(lines, LOSS, every=2, last=6, done=3) == [Measured(2, 3.0)]


def test_the_best_is_the_first_of_the_best_in_the_metrics_direction() -> None:
    history = [Measured(1, 2.0), Measured(2, 1.0), Measured(3, 1.0), Measured(4, 3.0), Measured(5, 3.0)]
    assert best_of(history, LOSS) == Measured(2, 1.0)
    assert best_of(history, metrics_of("grpo")["reward"]) == Measured(4, 3.0)
    assert best_of([], LOSS) is None
