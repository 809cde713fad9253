"""The output layer's Triton kernels, which a GPU runs, give what plain PyTorch gives; here they are interpreted."""

from __future__ import annotations

import fused_worker
import pytest
import te_lane
from distributed import run_prepared

from phimr_nemo.config import OutputFormat

pytestmark = pytest.mark.skipif(not te_lane.is_there(), reason=te_lane.REASON)

SINGLE = 1e-5
"""Sums of 300 float32 numbers in another order."""
STEP = 2.0**-7
"""Of bfloat16, in parts of a number. A logit's gradient is rounded in both, and so is the sum of them: where the
float32 numbers fall on different sides, each by a step."""


@pytest.mark.parametrize("output_format", ["own", "fp32"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_output_layer_is_the_plain_one(ranks: int, output_format: OutputFormat) -> None:
    for found in run_prepared(te_lane.enter, fused_worker.compare, ranks, output_format):
        assert len(found) == 7
        for name, error in found.items():
            assert error < (2 * STEP if name.endswith(("hidden", "weight")) else SINGLE), name


@pytest.mark.parametrize("fault", ["every label is this rank's", "no temperature"])
def test_planted_faults_of_the_fused_output_layer_are_caught(fault: str) -> None:
    for found in run_prepared(te_lane.enter, fused_worker.compare, 2, "own", fault):
        assert max(found.values()) > 20 * STEP
