"""NeMo-Aligner's own DPO loss, on full logits, against ours, on hidden states: values and gradients."""

from __future__ import annotations

import pytest
from distributed import run_distributed
from dpo_worker import aligner_and_our_loss

TOLERANCE = 1e-5
"""Float32; theirs goes through all logits, ours through chunks of them."""


@pytest.mark.parametrize("kind", ["dpo", "ipo", "length_normalized_dpo", "length_normalized_ipo"])
def test_loss_accuracy_and_gradient_are_aligners(kind: str) -> None:
    ours, theirs = run_distributed(aligner_and_our_loss, 1, kind)[0]
    assert ours.loss == pytest.approx(theirs.loss, rel=TOLERANCE)
    assert ours.accuracy == pytest.approx(theirs.accuracy)
    assert 0.0 < theirs.accuracy < 1.0
    scale = float(theirs.gradient.abs().max())
    assert scale > 0
    assert float((ours.gradient - theirs.gradient).abs().max()) < TOLERANCE * scale
