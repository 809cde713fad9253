"""What the tests of exports start from: a very small base model with data of every stage, and short settings."""

from __future__ import annotations

from pathlib import Path

from supervised_inputs import make_inputs

from phimr_nemo.bridges.command import run_bridge
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

STEPS = 3
# Half of the sequences are longer, so the run is in the long regime and transformers alone would not be.
ORIGINAL = 64
COMMON = ("run.log_every=1", "optim.warmup_fraction=0.4", "optim.lr=1.0e-3", "optim.min_lr=1.0e-4")
SFT_SIZES = (
    *("sequence_length=160", "micro_batch=4", "global_batch=8", "validation_rows=8", f"max_steps={STEPS}"),
    *("validate_every=3", "checkpoint.every=100", "epochs=2", "optim.distributed=false"),
)
DPO_SIZES = (
    *("sequence_length=160", "micro_batch=4", "global_batch=8", f"max_steps={STEPS}", "checkpoint.every=100"),
    "optim.distributed=false",
)
GRPO_SIZES = (
    *("sequence_length=200", "max_new_tokens=24", f"steps={STEPS}", "prompts_per_step=4", "group_size=4"),
    *("micro_batch=8", "rebalance.enabled=false", "grader=bridge_grader:even", "checkpoint.every=100"),
    *("temperature.fraction=1.0",),
)


def make_stage_inputs(root: Path) -> Path:
    """A very small base model with conversations, pairs and prompts."""
    make_inputs(root, f"original_max_position_embeddings={ORIGINAL}")
    rollouts = teacher_rollouts(generate_problems(1, 30, "train"), 1, 0, 0.0).to_pylist()
    pairs = [
        {"id": r["id"], "problem_id": r["problem_id"], "question": r["question"], "chosen": r["response"]}
        | {"rejected": r["response"] + " So it is 7.", "mode": "near_miss"}
        for r in rollouts
    ]
    write_shard(root / "pairs", 0, rows_to_table(pairs, "pairs"), kind="pairs")
    finish(root / "pairs", kind="pairs", config={})
    prompts = [
        {"id": r["id"], "problem_id": r["problem_id"], "question": r["question"], "answer": "7"}
        | {"pass_rate": 0.5, "mean_length": 10.0, "length_spread": 0.1, "hard": False}
        for r in rollouts
    ]
    write_shard(root / "prompts", 0, rows_to_table(prompts, "prompts"), kind="prompts")
    finish(root / "prompts", kind="prompts", config={})
    return root


def overrides(stage: str, inputs: Path, output: Path) -> list[str]:
    data = {"sft": ("data", SFT_SIZES), "dpo": ("pairs", DPO_SIZES), "grpo": ("prompts", GRPO_SIZES)}
    name, sizes = data[stage]
    folder = {"sft": "sft", "dpo": "pairs", "grpo": "prompts"}[stage]
    return [f"run.output={output}", f"base={inputs / 'base' / 'hf'}", f"{name}={inputs / folder}", *COMMON, *sizes]


def export(target: str, stage: str, inputs: Path, output: Path, *more: str) -> Path:
    given = [*overrides(stage, inputs, output / "unused"), *more]
    run_bridge(target, stage, Path(f"conf/{stage}/tiny.yaml"), output, given)  # type: ignore[arg-type]
    return output
