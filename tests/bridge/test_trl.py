"""Exports for TRL are run by TRL: three steps of each stage, the same data in the same order, the same losses."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import supervised_worker
from distributed import run_distributed
from own_worker import policy_gradient
from supervised_inputs import make_inputs

from phimr_nemo.bridges.command import run_bridge
from phimr_nemo.bridges.counterparts import covered, settings_of
from phimr_nemo.bridges.trl.settings import DPO, GRPO, SFT
from phimr_nemo.config import STAGES, load_config, to_dict
from phimr_nemo.data.chat import decode_response, load_tokenizer
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

HERE = Path(__file__).parent
STEPS = 3
FIRST = 1e-5
"""Largest difference of the first step's loss in fp32."""
LATER = 1e-4
"""Of the steps after it: Adam turns a gradient's rounding into a weight's."""
FAULT = 1e-3
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small base model with conversations, pairs and prompts."""
    root = make_inputs(tmp_path_factory.mktemp("inputs"), f"original_max_position_embeddings={ORIGINAL}")
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


def export(stage: str, inputs: Path, output: Path, *more: str) -> Path:
    given = [*overrides(stage, inputs, output / "unused"), *more]
    run_bridge("trl", stage, Path(f"conf/{stage}/tiny.yaml"), output, given)  # type: ignore[arg-type]
    return output


def trl_losses(python: Path, variables: Mapping[str, str], directory: Path, output: Path) -> list[float]:
    command = [str(python), "-m", "phimr_nemo.bridges.trl.run", str(directory), "--output", str(output)]
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [row["loss"] for row in json.loads((output / "log.json").read_text()) if "loss" in row]


def own_losses(stage: str, inputs: Path, output: Path) -> list[float]:
    run_distributed(supervised_worker.train, 1, stage, overrides(stage, inputs, output))
    return [row["loss"] for row in read_metrics(output) if "loss" in row]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_three_steps_have_the_stages_losses(
    stage: str, inputs: Path, tmp_path: Path, bridge_python: Path, bridge_variables: dict[str, str]
) -> None:
    ours = own_losses(stage, inputs, tmp_path / "ours")
    directory = export(stage, inputs, tmp_path / "export")
    theirs = trl_losses(bridge_python, bridge_variables, directory, tmp_path / "trl")
    print(f"{stage}: {ours} here, {theirs} in TRL")
    assert len(ours) == len(theirs) == STEPS
    assert theirs[0] == pytest.approx(ours[0], abs=FIRST)
    assert theirs == pytest.approx(ours, abs=LATER)
    if stage == "sft":
        # Another order of the data is another run.
        lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
        (directory / "train.jsonl").write_text("".join(reversed(lines)))
        other = trl_losses(bridge_python, bridge_variables, directory, tmp_path / "reversed")
        assert max(abs(one - two) for one, two in zip(other, ours, strict=True)) > FAULT


def test_three_rounds_of_grpo_have_the_stages_data_temperatures_and_gradient(
    inputs: Path, tmp_path: Path, bridge_python: Path, bridge_variables: dict[str, str]
) -> None:
    directory, file = export("grpo", inputs, tmp_path / "export"), tmp_path / "rounds.json"
    command = [str(bridge_python), str(HERE / "trl_rounds.py"), str(directory), str(tmp_path / "trl"), str(file)]
    done = subprocess.run(command, env=bridge_variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = json.loads(file.read_text())
    rounds, log = recorded["rounds"], [row for row in recorded["log"] if "loss" in row]
    assert len(rounds) == len(log) == STEPS

    exported = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    slots = [item["prompt"] for item in exported]
    for number, one in enumerate(rounds):
        mine = slots[4 * number : 4 * number + 4]
        assert one["prompts"] == [prompt for prompt in mine for _ in range(4)]
    # From 1 to 0.6 over the three rounds: 1 - 0.4 k / 3.
    assert [one["temperature"] for one in rounds] == pytest.approx([1 - 0.4 * k / STEPS for k in range(STEPS)])
    assert [one["sampled_at"] for one in rounds] == [one["temperature"] for one in rounds]

    first = rounds[0]
    prompts = [kept(ids, mask) for ids, mask in zip(first["prompt_ids"], first["prompt_mask"], strict=True)]
    responses = [kept(ids, mask) for ids, mask in zip(first["completion_ids"], first["completion_mask"], strict=True)]
    assert prompts == [item["prompt_ids"] for item in exported[:4] for _ in range(4)]
    tokenizer = load_tokenizer(inputs / "base" / "hf")
    rewards = [-1.0 if len(decode_response(tokenizer, ids)) % 2 else 1.0 for ids in responses]
    assert len(set(rewards)) == 2
    arguments = (str(inputs / "base" / "hf"), prompts, responses, rewards, 4, first["temperature"])
    loss, norm, advantages = run_distributed(policy_gradient, 1, *arguments)[0]
    print(f"grpo: loss {loss}, gradient {norm} here; {log[0]['loss']}, {log[0]['grad_norm']} in TRL")
    assert first["advantages"] == pytest.approx(advantages, abs=FIRST)
    assert log[0]["loss"] == pytest.approx(loss, abs=FIRST)
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=LATER)


def kept(ids: list[int], mask: list[int]) -> list[int]:
    return [token for token, wanted in zip(ids, mask, strict=True) if wanted]


@pytest.mark.parametrize("preset", ["tiny", "paper", "phi4mini-8xh100"])
@pytest.mark.parametrize(("stage", "table"), [("sft", SFT), ("dpo", DPO), ("grpo", GRPO)])
def test_every_setting_of_every_stage_is_in_the_table(stage: str, table: Any, preset: str) -> None:
    values = to_dict(load_config(STAGES[stage], Path(f"conf/{stage}/{preset}.yaml")))
    assert [name for name, _, _ in covered(values, table)] == settings_of(values)
    with pytest.raises(LookupError, match=re.escape("optim.lr")):
        covered(values, [line for line in table if line.ours != "optim.lr"])


@pytest.mark.parametrize(
    ("stage", "setting", "said"),
    [
        ("sft", "parallel.tensor=2", "parallel.tensor=2"),
        ("sft", "guard.on_nan=skip", "guard.on_nan"),
        ("sft", "micro_batch=3", "micro-batches of 3"),
        ("dpo", "loss={kind: rpo, nll_weight: 1.0}", "loss.kind=rpo"),
        ("dpo", "loss={kind: ipo}", "loss.kind=ipo"),
        ("grpo", "rebalance.enabled=true", "equal negatives"),
        ("grpo", "overlong={kind: soft, buffer: 4, penalty: 1.0}", "overlong.kind=soft"),
        ("grpo", "reward.length=0.5", "reward.length"),
    ],
)
def test_a_setting_without_counterpart_is_refused_and_nothing_is_written(
    stage: str, setting: str, said: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        export(stage, inputs, tmp_path / "export", setting)
    assert said in str(refusal.value)
    assert not (tmp_path / "export").exists()


def test_the_table_of_an_export_names_what_became_of_each_setting(inputs: Path, tmp_path: Path) -> None:
    text = (export("grpo", inputs, tmp_path / "export") / "counterparts.md").read_text()
    assert "| `temperature.end` | `0.6` | patch | `temperature` |" in text
    assert "| `prompt_optimization.max_length_spread` | `0.5` | data | `train.jsonl` |" in text
    assert "| `group_size` | `4` | same | `num_generations` |" in text
