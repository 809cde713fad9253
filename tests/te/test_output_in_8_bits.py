"""The output layer in 8 bits differs from the one in bfloat16 by what the formats' rounding explains; wide logits."""

from __future__ import annotations

import output_worker as worker
import pytest
import te_lane
from distributed import run_prepared

pytestmark = pytest.mark.skipif(not te_lane.is_there(), reason=te_lane.REASON)

RESULTS = ("logprobs", "entropy", "hidden", "weight")


@pytest.mark.parametrize("ranks", [1, 2])
def test_8_bits_stay_within_their_rounding(ranks: int) -> None:
    for found in run_prepared(te_lane.enter, worker.shares, ranks):
        print(found)
        assert all(found[name] < 1 for name in RESULTS), found
        # And it is another computation than the one in bfloat16, whose own rounding is 2^-9.
        assert all(found[f"{name}: mean"] > 2.0**-9 for name in ("hidden", "weight")), found


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [("scale of smaller values", "logprobs"), ("gradient of the weight forgotten after the first chunk", "weight")],
)
def test_planted_faults_of_8_bits_are_outside(fault: str, seen_in: str) -> None:
    (found,) = run_prepared(te_lane.enter, worker.shares, 1, fault)
    assert found[seen_in] > 1, found


def test_the_weights_gradient_in_8_bits_is_added_in_float32() -> None:
    (apart,) = run_prepared(te_lane.enter, worker.accumulated, 1)
    # Only rounded to bfloat16 in the one, for autograd.
    assert 0 < apart < 2.0**-8


@pytest.mark.parametrize("ranks", [1, 2])
def test_wide_logits_by_a_product_of_16_bits_are_those_of_float32_copies(ranks: int) -> None:
    for found in run_prepared(te_lane.enter, worker.wide, ranks):
        # Sums in another order; a gradient's rounding to bfloat16 may then fall on the other side.
        assert max(found["logprobs"], found["entropy"]) < 1e-5, found
        assert max(found["hidden"], found["weight"]) < 2.0**-7, found


def test_wide_logits_that_were_rounded_are_seen() -> None:
    (found,) = run_prepared(te_lane.enter, worker.wide, 1, "rounded")
    assert min(found["logprobs"], found["entropy"]) > 10 * 1e-5, found


def test_a_matrix_that_8_bit_products_do_not_take_is_refused() -> None:
    (said,) = run_prepared(te_lane.enter, worker.refusal, 1)
    assert said == "model.fp8_output=true with an output matrix of (319, 64) on each rank"
