"""Exports for NeMo-RL and Nemotron: every key is one of the released schema, of its type, and says what is meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bridge_inputs import export, make_stage_inputs

from phimr_nemo.bridges import nemo_rl, nemotron
from phimr_nemo.bridges.counterparts import covered, settings_of
from phimr_nemo.bridges.schedule import torch_schedulers
from phimr_nemo.config import STAGES, OptimConfig, load_config, to_dict
from phimr_nemo.data.chat import load_tokenizer, render_conversation
from phimr_nemo.errors import UserError
from phimr_nemo.training.schedule import learning_rate

SCHEMAS = Path(__file__).with_name("schemas")
NEMO_RL = "nemo-rl-0.7.0.json"
NEMOTRON = "nemotron-0.1.0.json"
# What the released schema calls a type, and the values that are of it.
TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "number": (int, float),
    "string": (str,),
    "list": (list,),
    "table": (dict,),
}
# Both have no place for these of ours.
GRPO = ("temperature.end=1.0", "grader=null", "rebalance.enabled=false")
EVALUATION = (
    "evaluation={every: 2, samples: 2, temperature: 1.0, top_p: 1.0, max_new_tokens: 8, "
    "problems: {kind: synthetic, count: 5, split: heldout}}"
)
STAGE_SETTINGS: Mapping[str, tuple[str, ...]] = {"sft": (), "dpo": (), "grpo": GRPO}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stage_inputs(tmp_path_factory.mktemp("inputs"))


def schema(name: str, stage: str) -> dict[str, str]:
    types: dict[str, str] = json.loads((SCHEMAS / name).read_text())["types"][stage]
    return types


def faults(settings: Mapping[str, Any], types: Mapping[str, str], prefix: str = "") -> list[str]:
    """Keys that the schema does not have, or of another type there."""
    found = []
    for key, value in settings.items():
        name = prefix + key
        kind = types.get(name)
        if kind == "any" or (kind in TYPES and _is(value, TYPES[kind])):
            continue
        if kind is None and isinstance(value, Mapping) and value:
            found += faults(value, types, f"{name}.")
        else:
            found.append(f"{name}={value!r} where the schema has {kind}")
    return found


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_every_key_for_nemo_rl_is_in_its_released_schema(stage: str, inputs: Path, tmp_path: Path) -> None:
    directory = export("nemo-rl", stage, inputs, tmp_path / "export", *STAGE_SETTINGS[stage])
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    types = schema(NEMO_RL, stage)
    assert faults(settings, types) == []
    assert faults({**settings, "sftt": {"seed": 1}}, types) == ["sftt.seed=1 where the schema has None"]
    assert len(faults({**settings, "policy": {**settings["policy"], "max_grad_norm": "much"}}, types)) == 1


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_every_key_for_nemotron_is_in_its_released_schema(stage: str, inputs: Path, tmp_path: Path) -> None:
    directory = export("nemotron", stage, inputs, tmp_path / "export", *STAGE_SETTINGS[stage])
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    # Stages 3 and 4 are handed on to NeMo-RL.
    types = schema(NEMOTRON, "sft") if stage == "sft" else schema(NEMO_RL, stage)
    assert faults(settings, types) == []


@pytest.mark.parametrize("preset", ["tiny", "paper", "phi4mini-8xh100", "recipe2026"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_every_setting_of_every_stage_is_in_the_tables(stage: str, preset: str) -> None:
    values = to_dict(load_config(STAGES[stage], Path(f"conf/{stage}/{preset}.yaml")))
    tables = {"sft": (nemo_rl.SFT, nemotron.SFT), "dpo": (nemo_rl.DPO,), "grpo": (nemo_rl.GRPO,)}
    for table in tables[stage]:
        assert [name for name, _, _ in covered(values, table)] == settings_of(values)


def test_lines_are_what_their_datasets_read(inputs: Path, tmp_path: Path) -> None:
    def lines(target: str, stage: str) -> list[dict[str, Any]]:
        directory = export(target, stage, inputs, tmp_path / f"{target}-{stage}", *STAGE_SETTINGS[stage])
        return [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]

    tokenizer = load_tokenizer(inputs / "base" / "hf")
    exact = lines("trl", "sft")
    for tokens, there, messages in zip(exact, lines("nemo-rl", "sft"), lines("nemotron", "sft"), strict=True):
        # The texts make the very tokens that the stage trains on.
        assert render_conversation(tokenizer, there["input"], there["output"])[0] == tokens["input_ids"]
        assert [turn["role"] for turn in messages["messages"]] == ["user", "assistant"]
        assert [turn["content"] for turn in messages["messages"]] == [there["input"], there["output"]]
    for tokens, there in zip(lines("trl", "dpo"), lines("nemo-rl", "dpo"), strict=True):
        for side in ("chosen", "rejected"):
            ids = render_conversation(tokenizer, there["prompt"], there[side])[0]
            assert ids == tokens["prompt_ids"] + tokens[f"{side}_ids"]
    for tokens, there in zip(lines("trl", "grpo"), lines("nemo-rl", "grpo"), strict=True):
        assert there == {"input": tokens["question"], "output": tokens["answer"]}


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "linear", "wsd"])
def test_torchs_schedulers_give_the_stages_rates(schedule: Any, warmup: float) -> None:
    steps = 10
    optim = OptimConfig(
        lr=1e-3,
        min_lr=1e-4,
        warmup_fraction=warmup,
        schedule=schedule,
        decay_fraction=0.4 if schedule == "wsd" else None,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        clip_grad=1.0,
        distributed=False,
    )
    *parts, last = torch_schedulers(optim, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    schedulers = [
        getattr(torch.optim.lr_scheduler, p["name"].split(".")[-1])(optimizer, **p["kwargs"]) for p in parts
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=last["milestones"])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([learning_rate(step, steps, optim) for step in range(steps)], rel=1e-6)


@pytest.mark.parametrize(
    ("target", "stage", "setting", "said"),
    [
        ("nemo-rl", "grpo", "temperature.end=0.6", "temperature annealing"),
        ("nemo-rl", "grpo", "rebalance.enabled=true", "equal negatives"),
        ("nemo-rl", "grpo", "loss={kind: dr_grpo, clip_low: 0.2, clip_high: 0.2}", "loss.kind=dr_grpo"),
        ("nemo-rl", "dpo", "loss={kind: ipo}", "loss.kind=ipo"),
        ("nemo-rl", "dpo", "overlong=truncate", "overlong=truncate"),
        ("nemo-rl", "sft", "loss_on=all", "loss_on=all"),
        ("nemo-rl", "sft", "model.deterministic=true", "model.deterministic=true"),
        ("nemotron", "sft", "model.deterministic=true", "model.deterministic=true"),
        ("nemo-rl", "dpo", "validation_pairs=7", "validation_pairs=7"),
        ("nemo-rl", "grpo", EVALUATION, "evaluation is on"),
        ("nemo-rl", "sft", "parallel.pipeline=2", "parallel.pipeline=2"),
        ("nemotron", "sft", "checkpoint.best=true", "checkpoint.best"),
        ("nemotron", "grpo", "ahead=1", "ahead=1"),
    ],
)
def test_a_setting_without_counterpart_is_refused(
    target: str, stage: str, setting: str, said: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        export(target, stage, inputs, tmp_path / "export", *STAGE_SETTINGS[stage], setting)
    assert said in str(refusal.value)
    assert not (tmp_path / "export").exists()


def test_pairs_that_are_held_out_are_validated_on_there(inputs: Path, tmp_path: Path) -> None:
    def lines(directory: Path, name: str) -> list[str]:
        return [json.loads(line)["prompt"] for line in (directory / name).read_text().splitlines()]

    directory = export("nemo-rl", "dpo", inputs, tmp_path / "export", "validation_pairs=9", "validate_every=2")
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    assert faults(settings, schema(NEMO_RL, "dpo")) == []
    assert settings["data"]["validation"]["data_path"] == "validation.jsonl"
    wanted = {"val_period": 2, "val_batches": 1, "val_global_batch_size": 8, "val_at_end": True}
    assert wanted.items() <= settings["dpo"].items()
    held_out = lines(directory, "validation.jsonl")
    assert len(held_out) >= 9
    assert not set(held_out) & set(lines(directory, "train.jsonl"))


def test_the_exchange_has_the_stages_time(inputs: Path, tmp_path: Path) -> None:
    directory = export("nemotron", "sft", inputs, tmp_path / "export", "parallel.timeout_minutes=7.5")
    assert yaml.safe_load((directory / "config.yaml").read_text())["dist_env"]["timeout_minutes"] == 7.5
    assert (
        "| `parallel.timeout_minutes` | `7.5` | same | `dist_env.timeout_minutes` |"
        in (directory / "counterparts.md").read_text()
    )


@pytest.mark.parametrize("target", ["trl", "nemo-rl", "nemotron"])
def test_a_tracked_run_is_exported(target: str, inputs: Path, tmp_path: Path) -> None:
    directory = export(target, "sft", inputs, tmp_path / "export", "tracking.wandb={project: mine, mode: offline}")
    assert "| `tracking.wandb.project` | `mine` | launcher |" in (directory / "counterparts.md").read_text()


def test_the_regime_of_a_run_is_written_into_the_models_config(inputs: Path, tmp_path: Path) -> None:
    def factors(*settings: str) -> Any:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        exported = export("nemo-rl", "sft", inputs, directory, *settings)
        return yaml.safe_load((exported / "config.yaml").read_text())["policy"]["hf_config_overrides"]

    config = json.loads((inputs / "base" / "hf" / "config.json").read_text())["rope_scaling"]
    # 160 tokens, beyond the original length.
    long = factors()["rope_scaling"]
    assert long["short_factor"] == long["long_factor"] == config["long_factor"]
    short = factors("model.longrope=always_short")["rope_scaling"]
    assert short["short_factor"] == short["long_factor"] == config["short_factor"]
    assert factors("model.longrope=per_sequence") == {}
