"""All stages train through Transformer Engine's own Python as they do in plain PyTorch, and continue each other.

The yardstick is the plain path's own error in bfloat16 against float32: the largest difference in a step's loss, the
largest relative one in a gradient's norm, and that of the exported weights in the root mean square. A path with as
many roundings draws its errors anew in every step; the largest of a few draws is at most `MARGIN` of another such.
FP8 has four stored bits less at every product, five in gradients: 2^5 of bfloat16's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import align_inputs
import numpy as np
import pytest
import te_lane
import te_training_worker as worker
import torch
from distributed import run_prepared
from safetensors.torch import load_file, save_file
from supervised_inputs import STEPS, curve, make_inputs, overrides, weights

pytestmark = pytest.mark.skipif(not te_lane.is_there(), reason=te_lane.REASON)

MARGIN = 4.0
ROUNDING = 2.0**-8
"""Of a number, to bfloat16: of a gradient's norm, and of a token's log-probability (nats) or its ratio in a loss."""
FP8 = 2.0**5
EXACT, ROUNDED = "model.dtype=fp32", "model.dtype=bf16"
HALF_WAY = 3

TENSOR = ("parallel.tensor=2", "parallel.sequence=true")
RECOMPUTED = "model.recompute=mlp"
CONTEXT = (
    *("parallel.context=2", "optim.distributed=true", "overlap.grad_reduce=true", "overlap.param_gather=true"),
    *("checkpoint.asynchronous=true", "model.recompute=full"),
)

Errors = tuple[float, ...]
Reference = Callable[[str, str], Path]


def over_te(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    return run_prepared(te_lane.enter_with_trainers, function, ranks, *arguments)


def plain(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    return run_prepared(te_lane.plain_with_trainers, function, ranks, *arguments)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The output of a supervised stage on one process in plain PyTorch, by number format."""
    made: dict[tuple[str, str], Path] = {}

    def get(stage: str, dtype: str) -> Path:
        if (stage, dtype) not in made:
            output = tmp_path_factory.mktemp(stage) / "run"
            plain(worker.train, 1, stage, overrides(stage, inputs, output, [dtype]))
            made[stage, dtype] = output
        return made[stage, dtype]

    return get


def errors(found: Path, wanted: Path) -> Errors:
    """Largest difference in loss and largest relative one in the gradient's norm over the steps; of the weights."""
    ours, theirs = np.array(curve(found)), np.array(curve(wanted))
    assert ours.shape == theirs.shape
    assert len(ours) > 0
    loss = np.abs(ours[:, 0] - theirs[:, 0]).max()
    gradient = (np.abs(ours[:, 1] - theirs[:, 1]) / theirs[:, 1]).max()
    learnt, wished = weights(found), weights(wanted)
    assert {name: x.shape for name, x in learnt.items()} == {name: x.shape for name, x in wished.items()}
    apart = torch.cat([(learnt[name].double() - wished[name].double()).flatten() for name in wished])
    return float(loss), float(gradient), float(apart.square().mean().sqrt())


def shares(name: str, found: Path, exact: Path, rounded: Path) -> Errors:
    """The same, as multiples of the plain path's in bfloat16."""
    ours, yardstick = errors(found, exact), errors(rounded, exact)
    pairs = list(zip(ours, yardstick, strict=True))
    of = ("loss", "gradient norm", "weights")
    print(f"{name}: {', '.join(f'{what} {a:.1e} ({b:.1e})' for what, (a, b) in zip(of, pairs, strict=True))}")
    # One draw of an error may be near 0 by chance; of a few steps none is a better yardstick than a rounding.
    floors = (ROUNDING, ROUNDING, 0.0)
    return tuple(a / max(b, floor) for (a, b), floor in zip(pairs, floors, strict=True))


def test_pipeline_stages_train_on_padded_rows_as_in_plain_pytorch(
    inputs: Path, reference: Reference, tmp_path: Path
) -> None:
    settings = [ROUNDED, "parallel.pipeline=2"]
    over_te(worker.train, 2, "sft", overrides("sft", inputs, tmp_path / "run", settings))
    assert len(curve(tmp_path / "run")) == STEPS
    assert max(shares("sft, PP2", tmp_path / "run", reference("sft", EXACT), reference("sft", ROUNDED))) < MARGIN


def test_tensor_parallelism_continues_what_plain_pytorch_began(
    inputs: Path, reference: Reference, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    started = overrides("midtrain", inputs, output, [ROUNDED, RECOMPUTED])
    assert plain(worker.train_and_stop, 1, "midtrain", started) == [True]
    assert len(curve(output)) == HALF_WAY
    over_te(worker.train, 2, "midtrain", overrides("midtrain", inputs, output, [ROUNDED, RECOMPUTED, *TENSOR]))
    assert len(curve(output)) == STEPS
    exact, rounded = reference("midtrain", EXACT), reference("midtrain", ROUNDED)
    assert max(shares("plain, then TP2 with sequence parallelism", output, exact, rounded)) < MARGIN


def test_context_parallelism_with_everything_overlapped_continues_in_plain_pytorch(
    inputs: Path, reference: Reference, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    started = overrides("midtrain", inputs, output, [ROUNDED, *CONTEXT])
    assert over_te(worker.train_and_stop, 2, "midtrain", started) == [True, True]
    assert len(curve(output)) == HALF_WAY
    plain(
        worker.train,
        1,
        "midtrain",
        overrides("midtrain", inputs, output, [ROUNDED, "optim.distributed=true", "model.recompute=full"]),
    )
    exact, rounded = reference("midtrain", EXACT), reference("midtrain", ROUNDED)
    assert len(curve(output)) == STEPS
    assert max(shares("CP2, then plain", output, exact, rounded)) < MARGIN
    # The last checkpoint, read without either path, is what was exported.
    newest = output / "checkpoints" / f"step={STEPS}"
    [last] = plain(worker.learnt, 1, str(newest), str(inputs / "base" / "hf"), str(tmp_path / "written"))
    exported = weights(output)
    assert last.keys() == exported.keys()
    assert all(torch.equal(last[name], exported[name]) for name in exported)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_fp8_trains_within_its_rounding(recipe: str, inputs: Path, reference: Reference, tmp_path: Path) -> None:
    output = tmp_path / "run"
    # The output layer's products too, where its rounding is within the layers'.
    settings = [ROUNDED, f"model.fp8={recipe}", f"model.fp8_output={str(recipe == 'current').lower()}"]
    over_te(worker.train, 1, "midtrain", overrides("midtrain", inputs, output, settings))
    assert len(curve(output)) == STEPS
    found = shares(f"FP8, {recipe}", output, reference("midtrain", EXACT), reference("midtrain", ROUNDED))
    # Above bfloat16's: the products were in FP8.
    assert max(found) > 1.0
    assert max(found) < MARGIN * FP8


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of the alignment stages, with a base that bfloat16 represents: so all formats sample the same."""
    root = tmp_path_factory.mktemp("preferences")
    align_inputs.make_inputs(root)
    file = root / "base" / "hf" / "model.safetensors"
    save_file({name: x.bfloat16().to(x.dtype) for name, x in load_file(file).items()}, file, {"format": "pt"})
    return root


ALIGNED = {
    "dpo, packed": ("dpo", 1, ("packed=true",), ()),
    "grpo, TP2 with sequence parallelism": (
        *("grpo", 2),
        # One step: later ones train on other responses, of weights that are others by then.
        ("steps=1", "engine.dtype=fp32", "correction.kind=truncated", "correction.cap=2"),
        TENSOR,
    ),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_an_alignment_stage_trains_as_in_plain_pytorch(name: str, preferences: Path) -> None:
    stage, ranks, settings, layout = ALIGNED[name]

    def done(run: Callable[..., Any], how: Callable[..., Any], number: int, label: str, *more: str) -> Path:
        case = align_inputs.make_case(preferences, f"{stage}-{label}", stage, *settings, *more)
        run(how, number, case)
        return preferences / f"{stage}-{label}"

    exact = done(plain, worker.run_case, 1, "exact", EXACT)
    rounded = done(plain, worker.run_case, 1, "rounded", ROUNDED)
    found = done(over_te, worker.run_case, ranks, "te", ROUNDED, *layout)
    assert max(shares(name, found, exact, rounded)) < MARGIN
    if stage == "dpo":
        wrong = done(over_te, worker.run_case_with_half_a_gradient, 1, "wrong", ROUNDED)
        assert max(shares("planted: half a gradient", wrong, exact, rounded)) > 2 * MARGIN
