"""Packed pairs equal padded pairs: loss, gradients, metrics, references; and a planted fault does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from align_inputs import CONF, make_inputs
from distributed import run_distributed
from dpo_worker import Step, one_step

PAIRS = 32
TOLERANCE = 1e-5
"""Relative, float32: sums over the same numbers in another order."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dpo-packing")
    make_inputs(root)
    return root


def step(root: Path, *overrides: str, fault: str | None = None) -> Step:
    settings = [f"run.output={root / 'run'}", f"base={root / 'base' / 'hf'}", f"pairs={root / 'pairs'}"]
    settings += [f"global_batch={PAIRS}", "micro_batch=2", "beta=0.1", "packed=false", *overrides]
    result: Step = run_distributed(one_step, 1, CONF / "dpo" / "tiny.yaml", settings, fault)[0]
    return result


@pytest.fixture(scope="module")
def padded(root: Path) -> Step:
    return step(root)


def gradient_difference(one: Step, other: Step) -> float:
    """Largest difference of an entry, relative to the largest entry."""
    return float((one.gradients - other.gradients).abs().max() / other.gradients.abs().max())


@pytest.mark.parametrize("micro_batch", [1, 2, 16])
def test_packed_pairs_have_the_loss_and_the_gradients_of_padded_ones(
    root: Path, padded: Step, micro_batch: int
) -> None:
    packed = step(root, "packed=true", f"micro_batch={micro_batch}")
    assert packed.loss == pytest.approx(padded.loss, rel=TOLERANCE)
    assert gradient_difference(packed, padded) < TOLERANCE
    assert torch.allclose(packed.reference, padded.reference, rtol=TOLERANCE, atol=TOLERANCE)
    assert packed.metrics == pytest.approx(padded.metrics, rel=10 * TOLERANCE, abs=TOLERANCE)
    assert packed.micro_batches < padded.micro_batches
    assert packed.tokens < padded.tokens


@pytest.mark.parametrize("fault", ["a boundary leaks", "the row is one document", "sides swapped in one row"])
def test_a_planted_fault_is_seen(root: Path, padded: Step, fault: str) -> None:
    assert gradient_difference(step(root, "packed=true", fault=fault), padded) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "loss",
    [
        ("loss.kind=ipo",),
        ("loss.kind=length_normalized_dpo", "beta=5"),
        ("loss.kind=rpo", "loss.nll_weight=1.0"),
        ("loss.kind=label_smoothed_dpo", "loss.label_smoothing=0.1"),
    ],
    ids=lambda settings: settings[0].split("=")[1],
)
def test_every_loss_is_the_same_packed(root: Path, loss: tuple[str, ...]) -> None:
    packed, plain = step(root, "packed=true", *loss), step(root, *loss)
    assert packed.loss == pytest.approx(plain.loss, rel=TOLERANCE)
    assert gradient_difference(packed, plain) < TOLERANCE


def test_recomputation_changes_nothing(root: Path, padded: Step) -> None:
    packed = step(root, "packed=true", "model.recompute=full")
    assert gradient_difference(packed, padded) < TOLERANCE
