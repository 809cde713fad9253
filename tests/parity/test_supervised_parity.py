"""Stages 1 and 2 give the same losses, gradient norms and weights in every layout, and when stopped and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from supervised_inputs import (
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    STEPS,
    WEIGHT_TOLERANCE,
    curve,
    differences,
    make_inputs,
    overrides,
)
from supervised_worker import (
    STOP_AFTER,
    train,
    train_and_stop,
    train_on_swapped_rows,
    train_with_a_mean_per_micro_batch,
)

from phimr_nemo.config import load_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", params=["midtrain", "sft"])
def reference(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Each stage on one process."""
    stage = str(request.param)
    output = tmp_path_factory.mktemp(stage) / "run"
    run_distributed(train, 1, stage, overrides(stage, inputs, output))
    assert len(curve(output)) == STEPS
    return stage, output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(
    layout: str, reference: tuple[str, Path], inputs: Path, tmp_path: Path, record_property: pytest.FixtureRequest
) -> None:
    stage, expected = reference
    run_distributed(train, 2, stage, overrides(stage, inputs, tmp_path / "run", LAYOUTS[layout]))
    loss, gradient, weight = differences(expected, tmp_path / "run")
    print(f"{stage} {layout}: loss {loss:.1e}, gradient norm {gradient:.1e}, weights {weight:.1e}")
    assert loss < LOSS_TOLERANCE
    assert gradient < GRADIENT_TOLERANCE
    assert weight < WEIGHT_TOLERANCE


def test_the_loss_falls(reference: tuple[str, Path]) -> None:
    losses = [loss for loss, _ in curve(reference[1])]
    assert losses[-1] < losses[0] - 0.1


def test_first_loss_is_the_mean_over_all_valid_tokens(reference: tuple[str, Path], inputs: Path) -> None:
    """transformers, one sequence at a time, on the rows that the order says come first."""
    from transformers import Phi3ForCausalLM

    from phimr_nemo.config import STAGES
    from phimr_nemo.data.rows.batches import IGNORED_LABEL, next_token_labels
    from phimr_nemo.supervised.data import midtrain_data, sft_data

    stage, output = reference
    config: Any = load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), overrides(stage, inputs, output))
    base = inputs / "base" / "hf"
    data = midtrain_data(config) if stage == "midtrain" else sft_data(config)
    model = Phi3ForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for sample in range(config.global_batch):
        row = data.train[sample]
        labels = next_token_labels(row)
        for end, length in zip(np.cumsum(row.document_lengths), row.document_lengths, strict=True):
            part = slice(end - length, end)
            with torch.no_grad():
                logits = model(torch.tensor(row.input_ids[part].astype(np.int64))[None]).logits[0]
            wanted = torch.tensor(labels[part])
            total += float(
                torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED_LABEL, reduction="sum")
            )
            count += int((wanted != IGNORED_LABEL).sum())
    assert curve(output)[0][0] == pytest.approx(total / count, abs=LOSS_TOLERANCE)


def test_planted_wrong_data_is_caught(reference: tuple[str, Path], inputs: Path, tmp_path: Path) -> None:
    stage, expected = reference
    run_distributed(train_on_swapped_rows, 1, stage, overrides(stage, inputs, tmp_path / "run"))
    assert differences(expected, tmp_path / "run")[0] > 10 * LOSS_TOLERANCE


def test_planted_mean_per_micro_batch_is_caught(reference: tuple[str, Path], inputs: Path, tmp_path: Path) -> None:
    stage, expected = reference
    run_distributed(train_with_a_mean_per_micro_batch, 1, stage, overrides(stage, inputs, tmp_path / "run"))
    assert differences(expected, tmp_path / "run")[1] > 10 * GRADIENT_TOLERANCE


def test_stopped_and_continued_equals_undisturbed_bit_for_bit(
    reference: tuple[str, Path], inputs: Path, tmp_path: Path
) -> None:
    stage, expected = reference
    arguments = overrides(stage, inputs, tmp_path / "run")
    assert run_distributed(train_and_stop, 1, stage, arguments) == [True]
    assert len(curve(tmp_path / "run")) == STOP_AFTER
    assert not (tmp_path / "run" / "hf").exists()
    run_distributed(train, 1, stage, arguments)
    assert differences(expected, tmp_path / "run") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("first", "second"), [("TP2", "PP2"), ("CP2", "TP2")])
def test_continues_in_another_layout(
    first: str, second: str, reference: tuple[str, Path], inputs: Path, tmp_path: Path
) -> None:
    stage, expected = reference
    run_distributed(train_and_stop, 2, stage, overrides(stage, inputs, tmp_path / "run", LAYOUTS[first]))
    run_distributed(train, 2, stage, overrides(stage, inputs, tmp_path / "run", LAYOUTS[second]))
    assert len(curve(tmp_path / "run")) == STEPS
    assert differences(expected, tmp_path / "run")[0] < LOSS_TOLERANCE
