"""The Megatron model equals transformers' Phi3ForCausalLM in fp32: logits, loss, every gradient, in every layout.

Each comparison has a twin with a planted fault that must break it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_worker as worker
import pytest
import torch
from distributed import run_distributed
from torch import Tensor

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture

LOGITS = 1e-5
"""Largest difference of logits of size ~5 in fp32 after 4 layers; a fault moves them by more than 1e-2."""
GRADIENT = 1e-4
"""Largest |difference| over |gradient| of a tensor (2-norms)."""
FAULT = 1e-2

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "tp4": ParallelConfig(tensor=4),
    "pp2": ParallelConfig(pipeline=2),
    "pp4": ParallelConfig(pipeline=4),
    "dp2": ParallelConfig(data=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "cp2": ParallelConfig(context=2),
    "cp4": ParallelConfig(context=4),
    "cp2_dp2": ParallelConfig(context=2, data=2),
    "cp2_tp2": ParallelConfig(context=2, tensor=2),
    "cp2_tp2_sp": ParallelConfig(context=2, tensor=2, sequence=True),
    "cp2_pp2": ParallelConfig(context=2, pipeline=2),
}
PACKED = ["one", "tp2", "tp2_sp", "pp2", "cp2", "cp4", "cp2_tp2_sp", "cp2_pp2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> worker.Results:
    return run_distributed(worker.hugging_face, 1, checkpoint, worker.ARCHITECTURE)[0]


@pytest.fixture(scope="module")
def measured(checkpoint: str, reference: worker.Results) -> Callable[[str], worker.Results]:
    """Every layout once, for all tests."""
    cache: dict[str, worker.Results] = {}

    def get(name: str) -> worker.Results:
        if name not in cache:
            layout = LAYOUTS[name]
            cache[name] = last_stage(run_distributed(worker.measure, layout.world_size, checkpoint, layout))
        return cache[name]

    return get


def last_stage(results: list[worker.Results]) -> worker.Results:
    return next(result for result in results if result["logits"] is not None)


def first_tensor(results: list[Any]) -> Tensor:
    return next(result for result in results if result is not None)


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max())


def worst_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == wanted.keys()
    return max((float((found[name] - wanted[name]).norm() / wanted[name].norm()), name) for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_log_probabilities_equal_transformers(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    result = measured(layout)
    for name in ("logits", "nll", "nll_warm"):
        assert gap(result[name], reference[name]) <= LOGITS, name
    assert bool((result["nll"][worker.batch()[1] < 0] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_transformers(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    worst, name = worst_gradient(measured(layout)["gradients"], reference["gradients"])
    assert worst <= GRADIENT, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_returns_the_weights_bit_for_bit(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    weights = measured(layout)["weights"]
    assert weights.keys() == reference["weights"].keys()
    assert all(torch.equal(weights[name], reference["weights"][name]) for name in weights)


@pytest.mark.parametrize("layout", PACKED)
def test_packed_equals_each_document_alone_in_transformers(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    # transformers picks the regime by each document's length, so the policy is per_sequence.
    row = measured(layout)["packed_per_sequence"][0]
    for part, alone in zip(row.split(worker.DOCUMENTS), reference["documents"], strict=True):
        assert gap(part, alone) <= LOGITS


@pytest.mark.parametrize("layout", PACKED)
def test_no_document_sees_another_bit_for_bit(layout: str, measured: Callable[[str], worker.Results]) -> None:
    result = measured(layout)
    before = result["packed"][0].split(worker.DOCUMENTS)
    after = result["packed_changed"][0].split(worker.DOCUMENTS)
    equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert equal == [index != worker.CHANGED_DOCUMENT for index in range(len(worker.DOCUMENTS))]


def test_planted_fault_one_document_for_all_leaks(measured: Callable[[str], worker.Results]) -> None:
    result = measured("one")
    last = worker.DOCUMENTS[-1]
    assert gap(result["packed_as_one"][0, -last:], result["packed"][0, -last:]) > FAULT


@pytest.fixture(scope="module")
def faults(checkpoint: str, reference: worker.Results) -> worker.Results:
    return run_distributed(worker.measure_faults, 1, checkpoint)[0]


@pytest.mark.parametrize(
    "fault", ["swapped_kv", "no_attention_factor", "wrong_rotary_share", "short_regime", "untied_head"]
)
def test_planted_fault_breaks_the_logits(fault: str, faults: worker.Results, reference: worker.Results) -> None:
    assert gap(faults[fault], reference["logits"]) > FAULT


def test_planted_fault_stale_head_on_the_last_stage(checkpoint: str, reference: worker.Results) -> None:
    layout = LAYOUTS["pp2"]
    logits = first_tensor(run_distributed(worker.measure_stale_head, 2, checkpoint, layout))
    assert gap(logits, reference["logits"]) > FAULT


def test_planted_fault_norm_gradients_not_summed_under_sequence_parallelism(
    checkpoint: str, reference: worker.Results
) -> None:
    found = run_distributed(worker.measure_unreduced_norms, 2, checkpoint, LAYOUTS["tp2_sp"])[0]
    worst, name = worst_gradient(found, reference["gradients"])
    assert worst > FAULT
    assert "norm" in name


def test_recompute_changes_nothing_and_bfloat16_stays_in_its_rounding(
    checkpoint: str, reference: worker.Results
) -> None:
    result = run_distributed(worker.measure_precision, 1, checkpoint)[0]
    for name, gradient in result["stored"].items():
        assert torch.equal(gradient, result["recomputed"][name]), name
    # Every rounding to 8 significant bits is a relative error of at most 2^-9, about 0.6 of that in the mean
    # square. Per layer some 12 roundings reach the residual stream; independent, they add as a square root.
    roundings = 12 * worker.ARCHITECTURE.num_hidden_layers
    expected = math.sqrt(roundings) * 2**-9 * 0.6
    error = (result["bfloat16"].float() - reference["logits"]).square().mean().sqrt()
    relative = float(error / reference["logits"].square().mean().sqrt())
    assert expected / 10 < relative < 3 * expected


def test_both_regimes_at_the_real_factors_around_4096(tmp_path: Path, repository: Path) -> None:
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text())
    small = Architecture.from_preset(
        values,
        vocab_size=worker.ARCHITECTURE.vocab_size,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.06,
    )
    assert small.head_dim == 128  # as in Phi-4-mini, so the 48 factors are the real ones
    directory = str(tmp_path / "hf")
    run_distributed(worker.hugging_face, 1, directory, small)
    errors = run_distributed(worker.compare_lengths, 1, directory, (4096, 4097))[0]
    assert errors[4096][0] <= LOGITS
    assert errors[4097][0] <= LOGITS
    # The twin: short factors are right up to the boundary and wrong beyond it.
    assert errors[4096][1] <= LOGITS
    assert errors[4097][1] > FAULT
