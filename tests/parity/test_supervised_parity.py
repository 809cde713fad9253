"""Stages 1 and 2 give the same losses, gradient norms and weights in every layout, and when stopped and continued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from supervised_worker import (
    STOP_AFTER,
    train,
    train_and_stop,
    train_on_swapped_rows,
    train_with_a_mean_per_micro_batch,
)

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.data.chat import load_tokenizer, render_conversation
from phimr_nemo.data.synthetic import generate_problems
from phimr_nemo.data.teacher import teacher_rollouts
from phimr_nemo.model.base import run_base
from phimr_nemo.runs import read_metrics
from phimr_nemo.store import finish, rows_to_table, write_shard

STEPS = 6
CAPACITY = 192
# Another order of summation moves an fp32 loss of about 6 by a few units in its last place (5e-7); Adam turns a
# gradient's rounding into a weight difference of at most the learning rate in the worst case, far less on average.
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-3
WEIGHT_TOLERANCE = 1e-3
SHAPE = (
    *("hidden_size=64", "intermediate_size=128", "num_attention_heads=4", "num_key_value_heads=2", "vocab_size=384"),
    # Every sequence is shorter, so transformers takes the short factors as well.
    *("original_max_position_embeddings=256", "max_position_embeddings=8192"),
)
LAYOUTS = {
    "TP2": ("parallel.tensor=2",),
    "PP2": ("parallel.pipeline=2",),
    "DP2": ("parallel.data=2",),
    "TP2 with sequence parallelism": ("parallel.tensor=2", "parallel.sequence=true"),
    "CP2": ("parallel.context=2",),
    "CP2 with the distributed optimizer": ("parallel.context=2", "optim.distributed=true"),
}

Curve = list[tuple[float, float]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small base model, packed rows and conversations."""
    root = tmp_path_factory.mktemp("inputs")
    overrides = [*SHAPE, f"run.output={root / 'base'}"]
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), overrides))
    tokenizer = load_tokenizer(root / "base" / "hf")
    rollouts = teacher_rollouts(generate_problems(0, 60, "train"), 1, 0, 0.0).to_pylist()
    conversations = [
        {"id": r["id"], "problem_id": r["problem_id"], "question": r["question"], "response": r["response"]}
        | {"domain": None, "difficulty": None}
        for r in rollouts
    ]
    write_shard(root / "sft", 0, rows_to_table(conversations, "conversations"), kind="conversations")
    finish(root / "sft", kind="conversations", config={})
    rows: list[dict[str, list[int]]] = []
    for item in conversations:
        ids, mask = render_conversation(tokenizer, item["question"], item["response"])
        if not rows or len(rows[-1]["input_ids"]) + len(ids) > CAPACITY:
            rows.append({"input_ids": [], "loss_mask": [], "document_lengths": []})
        rows[-1]["input_ids"] += ids
        rows[-1]["loss_mask"] += mask
        rows[-1]["document_lengths"].append(len(ids))
    write_shard(root / "rows", 0, rows_to_table(rows, "rows"), kind="rows")
    finish(root / "rows", kind="rows", config={})
    return root


def overrides(stage: str, inputs: Path, output: Path, layout: Sequence[str] = ()) -> list[str]:
    sizes = {
        "midtrain": [f"data={inputs / 'rows'}", f"sequence_length={CAPACITY}", "micro_batch=1", "global_batch=4"],
        "sft": [f"data={inputs / 'sft'}", "sequence_length=160", "micro_batch=2", "global_batch=8"],
    }[stage]
    return [
        f"run.output={output}",
        "run.log_every=1",
        f"base={inputs / 'base' / 'hf'}",
        *sizes,
        "validation_rows=0",
        f"max_steps={STEPS}",
        "epochs=6",
        "checkpoint.every=100",
        "optim.warmup_fraction=0.0",
        "optim.lr=1.0e-3",
        *layout,
    ]


def curve(output: Path) -> Curve:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(output) if "loss" in row]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "hf" / "model.safetensors")


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


def differences(reference: Path, other: Path) -> tuple[float, float, float]:
    """Largest difference in loss, relative difference in gradient norm, largest difference in a weight."""
    ours, theirs = np.array(curve(other)), np.array(curve(reference))
    assert ours.shape == theirs.shape == (STEPS, 2)
    loss = np.abs(ours[:, 0] - theirs[:, 0]).max()
    gradient = (np.abs(ours[:, 1] - theirs[:, 1]) / theirs[:, 1]).max()
    expected, found = weights(reference), weights(other)
    assert expected.keys() == found.keys()
    weight = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    return float(loss), float(gradient), weight


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
    from phimr_nemo.data.batches import IGNORED_LABEL, next_token_labels
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.train.data import conversation_data, packed_data

    stage, output = reference
    config = load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), overrides(stage, inputs, output))
    base = inputs / "base" / "hf"
    pad = Architecture.from_directory(base).pad_token_id
    data = (
        packed_data(config, pad)
        if stage == "midtrain"
        else conversation_data(config, load_tokenizer(base), pad, multiple=16)
    )
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
