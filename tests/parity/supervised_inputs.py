"""A very small base model with its data, the settings of short runs on it, and how two runs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.data.chat import load_tokenizer, render_conversation
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.model.base import run_base
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

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
    "PP2, two parts each": ("parallel.pipeline=2", "parallel.virtual=2"),
    "DP2 with everything overlapped": (
        *("parallel.data=2", "optim.distributed=true"),
        *("overlap.grad_reduce=true", "overlap.param_gather=true"),
    ),
    "CP2": ("parallel.context=2",),
    "CP2 with the distributed optimizer": ("parallel.context=2", "optim.distributed=true"),
}

Curve = list[tuple[float, float]]


def make_inputs(root: Path, *shape: str) -> Path:
    """A very small base model, packed rows and conversations; `shape` overrides the base's configuration."""
    overrides = [*SHAPE, *shape, f"run.output={root / 'base'}"]
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


def differences(reference: Path, other: Path) -> tuple[float, float, float]:
    """Largest difference in loss, relative difference in gradient norm, largest difference in a weight."""
    ours, theirs = np.array(curve(other)), np.array(curve(reference))
    assert ours.shape == theirs.shape
    assert len(ours) > 0
    loss = np.abs(ours[:, 0] - theirs[:, 0]).max()
    gradient = (np.abs(ours[:, 1] - theirs[:, 1]) / theirs[:, 1]).max()
    expected, found = weights(reference), weights(other)
    assert expected.keys() == found.keys()
    weight = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    return float(loss), float(gradient), weight
