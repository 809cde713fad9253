"""A very small base model with pairs and prompts, and the settings of short DPO and GRPO runs on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from align_worker import Case

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.model.base import run_base
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

CONF = Path(__file__).resolve().parents[2] / "conf"


def make_inputs(root: Path, *shape: str) -> None:
    """A base of 0.1 M parameters, 32 pairs and prompts of varying lengths; `shape` overrides the base's settings."""
    overrides = [
        f"run.output={root / 'base'}",
        "hidden_size=64",
        "intermediate_size=128",
        "num_hidden_layers=2",
        "num_attention_heads=4",
        "initializer_range=0.1",
        "original_max_position_embeddings=256",
        "max_position_embeddings=8192",
        *shape,
    ]
    run_base(load_config(BaseConfig, CONF / "base" / "tiny.yaml", overrides))
    generator = random.Random(0)
    pairs, prompts = [], []
    for number in range(32):
        a, b = generator.randint(2, 99), generator.randint(2, 99)
        common = {"id": f"r{number}", "problem_id": f"p{number}", "question": f"Compute {a} + {b}."}
        right = f"{a} + {b} = {a + b}. " * generator.randint(1, 3)
        wrong = f"{a} + {b} is about {a + b + 1}. " * generator.randint(1, 4)
        pairs.append({**common, "chosen": right, "rejected": wrong, "mode": "random"})
        statistics = {"pass_rate": 0.5, "mean_length": 10.0, "length_spread": 0.1 * (number % 8)}
        prompts.append({**common, "answer": str(a + b), **statistics, "hard": number % 3 == 0})
    made: dict[Kind, list[dict[str, Any]]] = {"pairs": pairs, "prompts": prompts}
    for kind, rows in made.items():
        write_shard(root / kind, 0, rows_to_table(rows, kind), kind=kind)
        finish(root / kind, kind=kind, config={})


def make_case(
    root: Path,
    name: str,
    stage: str,
    *extra: str,
    grader: str = "even length",
    fault: str | None = None,
    stop: int | None = None,
) -> Case:
    overrides = [f"run.output={root / name}", f"base={root / 'base' / 'hf'}", "checkpoint.every=100"]
    overrides.append("packed=false")
    if stage == "dpo":
        overrides += [
            f"pairs={root / 'pairs'}",
            "epochs=1",
            "global_batch=8",
            "micro_batch=2",
            "optim.lr=1e-3",
            "beta=0.1",
        ]
    else:
        overrides += [f"prompts={root / 'prompts'}", "steps=4", "prompts_per_step=6", "group_size=4"]
        overrides += ["micro_batch=5", "max_new_tokens=12", "optim.lr=1e-3", "inner_batches=2", "kl=0.05"]
    return Case(stage, CONF / stage / "tiny.yaml", grader, (*overrides, *extra), fault, stop)
