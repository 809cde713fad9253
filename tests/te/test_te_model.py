"""The project's model through Transformer Engine's own Python against its path in plain PyTorch, in every layout.

Both round to bfloat16 at the same number of places, so their errors against float32 are two draws of one size: what
one of them has may exceed the other's by half, and a planted fault must exceed that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_worker
import model_worker as worker
import pytest
import te_worker
import torch
from torch import Tensor

from phimr_nemo.config import ParallelConfig

MARGIN = 1.5
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "cp2": ParallelConfig(context=2),
    "cp2_tp2_sp": ParallelConfig(context=2, tensor=2, sequence=True),
}
KINDS = ("nll", "packed", "gradients", "packed_gradients")

Run = Callable[..., list[Any]]
Results = dict[str, Any]


def error(found: Any, wanted: Any) -> float:
    """Relative, in the root mean square; gradients (a dictionary) as one vector."""
    if isinstance(wanted, Tensor):
        found, wanted = {"": found}, {"": wanted}
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return math.sqrt(difference / sum(float(wanted[name].double().square().sum()) for name in wanted))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, in_lane: Run) -> str:
    directory = str(tmp_path_factory.mktemp("te") / "hf")
    in_lane(worker.hugging_face, 1, directory, worker.ARCHITECTURE)
    return directory


@pytest.fixture(scope="module")
def measure(in_lane: Run, checkpoint: str) -> Callable[..., Results]:
    def run(layout: ParallelConfig, engine: bool, dtype: torch.dtype = torch.bfloat16, fault: str = "") -> Results:
        results = in_lane(te_worker.measure, layout.world_size, checkpoint, layout, engine, dtype, fault)
        return next(result for result in results if result["nll"] is not None)

    return run


@pytest.fixture(scope="module")
def reference(measure: Callable[..., Results]) -> Results:
    return measure(ParallelConfig(), False, torch.float32)


@pytest.fixture(scope="module")
def allowed(measure: Callable[..., Results], reference: Results) -> dict[str, float]:
    """Of each kind of result, the error that the path in plain PyTorch has in bfloat16, and half of it."""
    plain = measure(ParallelConfig(), False)
    assert "transformer_engine" not in plain["modules"]
    return {kind: MARGIN * error(plain[kind], reference[kind]) for kind in KINDS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_as_near_to_float32_as_plain_pytorch(
    layout: str, measure: Callable[..., Results], reference: Results, allowed: dict[str, float]
) -> None:
    found = measure(LAYOUTS[layout], True)
    assert "transformer_engine" in found["modules"]
    assert found["compared"] == 0, "a CPU waits for the GPU to compare tensors"
    for kind in KINDS:
        assert error(found[kind], reference[kind]) < allowed[kind], kind


def test_boundaries_given_twice_are_compared_in_every_layer(measure: Callable[..., Results]) -> None:
    """The planted fault: Transformer Engine asks whether those with padding are others."""
    assert measure(LAYOUTS["cp2"], True, fault="boundaries twice")["compared"] > 0


@pytest.mark.parametrize("layout", ["one", "tp2_sp"])
@pytest.mark.parametrize("case", ["qwen2, untied", "qwen3, untied", "smollm3"])
def test_biases_norms_of_heads_and_layers_without_rotation_over_transformer_engine(
    case: str, layout: str, in_lane: Run, tmp_path: Path
) -> None:
    """Where Transformer Engine's layers differ most from Megatron's own."""
    in_lane(family_worker.references, 1, str(tmp_path))
    directory, chosen = str(tmp_path / case), LAYOUTS[layout]

    def measured(engine: bool, dtype: torch.dtype) -> Results:
        results = in_lane(te_worker.measure, chosen.world_size, directory, chosen, engine, dtype)
        found: Results = next(result for result in results if result["nll"] is not None)
        return found

    exact, plain, found = (
        measured(False, torch.float32),
        measured(False, torch.bfloat16),
        measured(True, torch.bfloat16),
    )
    assert "transformer_engine" in found["modules"]
    for kind in KINDS:
        assert error(found[kind], exact[kind]) < MARGIN * error(plain[kind], exact[kind]), kind


@pytest.mark.parametrize(("fault", "layout"), te_worker.FAULTS)
def test_planted_fault_is_outside(
    fault: str, layout: ParallelConfig, measure: Callable[..., Results], reference: Results, allowed: dict[str, float]
) -> None:
    found = measure(layout, True, fault=fault)
    assert max(error(found[kind], reference[kind]) / allowed[kind] for kind in KINDS) > 2.0


def test_fp8_stays_in_its_rounding(in_lane: Run, tmp_path: Path) -> None:
    [errors] = in_lane(te_worker.measure_fp8, 1, str(tmp_path / "hf"))
    plain = errors.pop("plain")
    # E4M3 keeps four bits where bfloat16 keeps eight; gradients are in E5M2, with three.
    for scaling, (logits, gradients) in errors.items():
        assert 3 * plain[0] < logits < 2**4 * plain[0], scaling
        assert 3 * plain[1] < gradients < 2**5 * plain[1], scaling


def test_gradient_accumulates_in_float32_where_asked(in_lane: Run, checkpoint: str, reference: Results) -> None:
    fused, apart = in_lane(te_worker.measure_fused_accumulation, 1, checkpoint)[0]
    assert fused["adds"] > 0
    assert apart["adds"] == 0
    # The products go into the float32 gradient unrounded.
    errors = [error(found["gradients"], reference["gradients"]) for found in (fused, apart)]
    assert errors[0] < MARGIN * errors[1]


def test_recomputing_changes_no_bit(in_lane: Run, checkpoint: str) -> None:
    assert in_lane(te_worker.measure_recompute, 1, checkpoint)[0] == {}


def test_every_ready_made_layout_is_built_of_transformer_engine_s_layers(in_lane: Run, repository: Path) -> None:
    [faults] = in_lane(te_worker.build_layouts, 1, str(repository))
    assert len(faults) == len(list(repository.glob("conf/*/phi4mini-*.yaml"))) > 0
    assert {name: found for name, found in faults.items() if found} == {}
