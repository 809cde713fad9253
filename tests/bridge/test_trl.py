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
from bridge_inputs import STEPS, export, make_stage_inputs, overrides
from distributed import run_distributed
from own_worker import policy_gradient

from phimr_nemo.bridges.counterparts import covered, settings_of
from phimr_nemo.bridges.trl.settings import DPO, GRPO, SFT
from phimr_nemo.config import STAGES, load_config, to_dict
from phimr_nemo.data.chat import decode_response, load_tokenizer
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import read_metrics

HERE = Path(__file__).parent
FIRST = 1e-5
"""Largest difference of the first step's loss in fp32."""
LATER = 1e-4
"""Of the steps after it: Adam turns a gradient's rounding into a weight's."""
FAULT = 1e-3
EVALUATION = (
    "evaluation={every: 2, samples: 2, temperature: 1.0, top_p: 1.0, max_new_tokens: 8, "
    "problems: {kind: synthetic, count: 5, split: heldout}}"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stage_inputs(tmp_path_factory.mktemp("inputs"))


def trl_losses(python: Path, variables: Mapping[str, str], directory: Path, output: Path) -> list[float]:
    command = [str(python), "-m", "phimr_nemo.bridges.trl.run", str(directory), "--output", str(output)]
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [row["loss"] for row in json.loads((output / "log.json").read_text()) if "loss" in row]


def own_losses(stage: str, inputs: Path, output: Path, *more: str) -> list[float]:
    run_distributed(supervised_worker.train, 1, stage, [*overrides(stage, inputs, output), *more])
    return [row["loss"] for row in read_metrics(output) if "loss" in row]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_three_steps_have_the_stages_losses(
    stage: str, inputs: Path, tmp_path: Path, bridge_python: Path, bridge_variables: dict[str, str]
) -> None:
    ours = own_losses(stage, inputs, tmp_path / "ours")
    directory = export("trl", stage, inputs, tmp_path / "export")
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


def test_dpo_holds_out_the_same_pairs_with_the_same_validation_loss(
    inputs: Path, tmp_path: Path, bridge_python: Path, bridge_variables: dict[str, str]
) -> None:
    more = ("validation_pairs=8", f"validate_every={STEPS}", "model.deterministic=true", "parallel.timeout_minutes=5")
    ours = own_losses("dpo", inputs, tmp_path / "ours", *more)
    directory = export("trl", "dpo", inputs, tmp_path / "export", *more)
    theirs = trl_losses(bridge_python, bridge_variables, directory, tmp_path / "trl")
    assert theirs == pytest.approx(ours, abs=LATER)
    log = json.loads((tmp_path / "trl" / "log.json").read_text())
    validated = [row["eval_loss"] for row in log if "eval_loss" in row]
    expected = [row["val_loss"] for row in read_metrics(tmp_path / "ours") if "val_loss" in row]
    print(f"dpo: validation {expected} here, {validated} in TRL")
    assert len(expected) == 1
    assert validated == pytest.approx(expected, abs=LATER)


def test_three_rounds_of_grpo_have_the_stages_data_temperatures_and_gradient(
    inputs: Path, tmp_path: Path, bridge_python: Path, bridge_variables: dict[str, str]
) -> None:
    directory, file = export("trl", "grpo", inputs, tmp_path / "export"), tmp_path / "rounds.json"
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


@pytest.mark.parametrize("preset", ["tiny", "paper", "phi4mini-8xh100", "recipe2026"])
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
        ("dpo", "loss={kind: rpo, nll_weight: 1.0}", "loss.kind=rpo"),
        ("dpo", EVALUATION, "evaluation is on"),
        ("dpo", "loss={kind: ipo}", "loss.kind=ipo"),
        ("grpo", "micro_batch=3", "micro-batches of 3"),
        ("grpo", "rebalance.enabled=true", "equal negatives"),
        ("grpo", "overlong={kind: soft, buffer: 4, penalty: 1.0}", "overlong.kind=soft"),
        ("grpo", "reward.length=0.5", "reward.length"),
    ],
)
def test_a_setting_without_counterpart_is_refused_and_nothing_is_written(
    stage: str, setting: str, said: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        export("trl", stage, inputs, tmp_path / "export", setting)
    assert said in str(refusal.value)
    assert not (tmp_path / "export").exists()


def test_the_table_of_an_export_names_what_became_of_each_setting(inputs: Path, tmp_path: Path) -> None:
    text = (export("trl", "grpo", inputs, tmp_path / "export") / "counterparts.md").read_text()
    assert "| `temperature.end` | `0.6` | patch | `temperature` |" in text
    assert "| `prompt_optimization.max_length_spread` | `0.5` | data | `train.jsonl` |" in text
    assert "| `group_size` | `4` | same | `num_generations` |" in text
