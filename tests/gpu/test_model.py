"""Our model on a GPU against transformers: plain PyTorch and Transformer Engine, float32, bfloat16, FP8, packed rows.

Tolerances follow from the roundings (see compare.py): what they predict may be exceeded by a factor of 3, and a
planted fault must exceed it by far more.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import compare
import pytest
import torch
import yaml
from compare import Outcome

from phimr_nemo.model import Architecture
from phimr_nemo.model.megatron.attention import RotaryScale
from phimr_nemo.model.megatron.gpt import PhiGPTModel

MARGIN = 3.0
FLOAT32 = 1e-5
"""Relative error in float32: sums over up to 2,048 terms, each rounded by 6e-8, through the layers."""
REAL_LENGTH = 4097
"""One token into the long regime of the real factors."""

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def reference(gpu: torch.device, checkpoint: Path) -> Outcome:
    return compare.run_transformers(checkpoint, torch.float32, gpu, *compare.batch(compare.SMALL, gpu))


def drop_attention_factor(model: PhiGPTModel) -> PhiGPTModel:
    for module in model.modules():
        if isinstance(module, RotaryScale):
            module.scale.fill_(1.0)
    return model


def test_float32_equals_transformers(gpu: torch.device, checkpoint: Path, reference: Outcome, modules: str) -> None:
    if modules == "transformer_engine":
        pytest.skip("Transformer Engine's fused attention has no float32")
    found = compare.run_ours(compare.build(checkpoint, torch.float32, gpu), *compare.batch(compare.SMALL, gpu))
    assert compare.relative_error(found.logits, reference.logits) < FLOAT32
    assert compare.relative_error(found.nll, reference.nll) < FLOAT32
    assert compare.gradient_error(found.gradients, reference.gradients) < FLOAT32


def test_bfloat16_stays_in_its_rounding(
    gpu: torch.device, checkpoint: Path, reference: Outcome, modules: str
) -> None:
    expected = compare.expected_bfloat16(compare.SMALL.num_hidden_layers)
    inputs = compare.batch(compare.SMALL, gpu)
    found = compare.run_ours(compare.build(checkpoint, torch.bfloat16, gpu), *inputs)
    assert expected / 10 < compare.relative_error(found.logits, reference.logits) < MARGIN * expected
    # Backward has as many roundings again, and begins with forward's.
    gradient = compare.gradient_error(found.gradients, reference.gradients)
    assert gradient < MARGIN * 2 * expected
    # The peer in bfloat16 has the same roundings.
    peer = compare.run_transformers(checkpoint, torch.bfloat16, gpu, *inputs)
    assert compare.relative_error(found.logits, reference.logits) < 2 * compare.relative_error(
        peer.logits, reference.logits
    )
    assert gradient < 2 * compare.gradient_error(peer.gradients, reference.gradients)


def test_planted_fault_exceeds_the_rounding(
    gpu: torch.device, checkpoint: Path, reference: Outcome, modules: str
) -> None:
    faulty = drop_attention_factor(compare.build(checkpoint, torch.bfloat16, gpu))
    with torch.no_grad():
        logits = faulty(compare.batch(compare.SMALL, gpu)[0])
    expected = compare.expected_bfloat16(compare.SMALL.num_hidden_layers)
    assert compare.relative_error(logits, reference.logits) > 2 * MARGIN * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_equals_each_document_alone(
    gpu: torch.device, checkpoint: Path, modules: str, dtype: torch.dtype
) -> None:
    if modules == "transformer_engine":
        if dtype == torch.float32:
            pytest.skip("Transformer Engine's fused attention has no float32")
        # Its rotation takes one table for all documents of a row, so all have to be of one regime.
        arch = dataclasses.replace(compare.SMALL, original_max_position_embeddings=8)
    else:
        arch = compare.SMALL
    directory = checkpoint.parent / f"{modules}-{dtype}".replace("torch.", "")
    compare.make_checkpoint(directory, arch)
    model = compare.build(directory, dtype, gpu)
    tolerance = FLOAT32 if dtype == torch.float32 else MARGIN * compare.expected_bfloat16(arch.num_hidden_layers)
    for packed, alone in zip(compare.packed_logits(model), compare.single_logits(model), strict=True):
        assert compare.relative_error(packed, alone) < tolerance
    # Another document's tokens change no bit.
    before, after = compare.packed_logits(model), compare.packed_logits(model, changed=1)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.usefixtures("transformer_engine")
def test_fp8_stays_in_its_rounding(gpu: torch.device, checkpoint: Path, reference: Outcome) -> None:
    if torch.cuda.get_device_capability(gpu) < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")
    # Scales of the tensor at hand; delayed ones would need a warm-up.
    model = compare.build(checkpoint, torch.bfloat16, gpu, fp8="hybrid", fp8_recipe="tensorwise").train()
    found = compare.run_ours(model, *compare.batch(compare.SMALL, gpu))
    expected = compare.expected_fp8()
    error = compare.relative_error(found.logits, reference.logits)
    # Above what bfloat16 makes: the products were in FP8.
    assert MARGIN * compare.expected_bfloat16(compare.SMALL.num_hidden_layers) < error < MARGIN * expected
    # Gradients are rounded to a bit less, on top of forward's error.
    assert compare.gradient_error(found.gradients, reference.gradients) < MARGIN * 3 * expected


def test_real_factors_and_width_around_4096(
    gpu: torch.device, tmp_path: Path, repository: Path, modules: str
) -> None:
    """Two layers of Phi-4-mini itself, with its vocabulary, one token beyond the original length, in bfloat16."""
    values = yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text())
    # The size of the weights as in the small model: 0.0125 x sqrt(3072) = 0.7.
    arch = Architecture.from_preset(values, num_hidden_layers=2, initializer_range=0.0125)
    compare.make_checkpoint(tmp_path / "hf", arch)
    ids, labels = compare.batch(arch, gpu, rows=1, length=REAL_LENGTH)
    wanted = compare.run_transformers(tmp_path / "hf", torch.float32, gpu, ids, labels)
    found = compare.run_ours(compare.build(tmp_path / "hf", torch.bfloat16, gpu), ids, labels)
    expected = compare.expected_bfloat16(arch.num_hidden_layers)
    assert compare.relative_error(found.logits, wanted.logits) < MARGIN * expected
    assert compare.gradient_error(found.gradients, wanted.gradients) < MARGIN * 2 * expected
