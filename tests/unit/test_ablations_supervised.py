"""The ablations of mid-training and SFT: what they run, what they compute from finished arms, what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from results import plain_result

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.config.ablations import (
    DirectSFTConfig,
    MidtrainPackingConfig,
    MidtrainScalingConfig,
    RepetitionConfig,
    StoppingConfig,
)
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory, write_hf_directory
from phimr_nemo.store.records import schemas
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from phimr_nemo.supervised.document_loss import document_losses, kept_document_losses
from recipes.ablations import direct_sft, midtrain_packing, midtrain_scaling, repetition, stopping

CONF = Path(__file__).resolve().parents[2] / "conf"
QUESTIONS = 4
SMALL = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer."""
    output = tmp_path_factory.mktemp("base")
    run_base(load_config(BaseConfig, CONF / "base" / "tiny.yaml", [f"run.output={output}", *SMALL]))
    return output / "hf"


def conversations(directory: Path, responses: list[str]) -> Path:
    rows = [
        {
            "id": f"c{n}",
            "problem_id": f"p{n}",
            "question": f"{n}+1",
            "domain": None,
            "difficulty": None,
            "response": text,
        }
        for n, text in enumerate(responses)
    ]
    write_shard(directory, 0, rows_to_table(rows, "conversations"), kind="conversations")
    finish(directory, kind="conversations", config={})
    return directory


def test_a_model_that_knows_nothing_pays_ln_vocabulary_a_token(base: Path, tmp_path: Path) -> None:
    """Tied embeddings of zero give equal logits, so every token costs ln V and every document the same."""
    source = HFDirectory(base)
    zeroed = ((name, source.read(name) * ("embed" not in name)) for name in source.names())
    write_hf_directory(tmp_path / "hf", source.architecture, zeroed, tokenizer_from=base)
    losses = document_losses(tmp_path / "hf", conversations(tmp_path / "set", ["2", "1+1=2. So \\boxed{2}."]))
    assert losses == pytest.approx(dict.fromkeys(("c0", "c1"), math.log(source.architecture.vocab_size)), abs=1e-6)


def test_a_documents_loss_is_the_mean_over_its_response_alone(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from phimr_nemo.data.chat import load_tokenizer, render_conversation, render_prompt

    data = conversations(tmp_path / "set", ["1+1=2. So \\boxed{2}."])
    tokenizer = load_tokenizer(base)
    prompt = len(render_prompt(tokenizer, "0+1"))
    ids, _ = render_conversation(tokenizer, "0+1", "1+1=2. So \\boxed{2}.")
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([ids])).logits[0].double()
    tokens = [-float(logits[at - 1].log_softmax(-1)[ids[at]]) for at in range(prompt, len(ids))]
    found = document_losses(base, data)["c0"]
    assert found == pytest.approx(sum(tokens) / len(tokens), abs=1e-6)
    assert len(ids) - prompt > 1
    assert found != pytest.approx(sum(tokens[:-1]) / len(tokens[:-1]), abs=1e-6)  # without <|end|>


def test_losses_are_kept_for_these_weights_and_documents_alone(base: Path, tmp_path: Path) -> None:
    data, path = conversations(tmp_path / "set", ["2"]), tmp_path / "loss.json"
    found = kept_document_losses(base, data, path)
    kept = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**kept, "losses": {"c0": 7.0}}))
    assert kept_document_losses(base, data, path) == {"c0": 7.0}
    path.write_text(json.dumps({**kept, "weights": "of another model", "losses": {"c0": 7.0}}))
    assert kept_document_losses(base, data, path) == found


def test_no_document_has_no_mean(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no conversation"):
        document_losses(base, conversations(tmp_path / "none", []))


def evaluated(directory: Path, scores: list[float], stopped: float = 1.0) -> None:
    mean = sum(scores) / QUESTIONS
    per_question = {f"q{number}": score for number, score in enumerate(scores)}
    result = plain_result(mean, questions=QUESTIONS, stderr=0.0, stopped=stopped, per_question=per_question)
    RunDirectory(directory).finish()
    write_result(directory / "results.json", result, {"row": directory.name, "benchmark": "synthetic"})


def trained(directory: Path, model: Path, steps: int) -> None:
    directory.mkdir(parents=True)
    (directory / "hf").symlink_to(model)
    RunDirectory(directory).finish(steps=steps)


def packed(directory: Path, documents: int) -> None:
    write_shard(directory, 0, rows_to_table([], "rows"), kind="rows")
    finish(directory, kind="rows", config={}, counts={"documents": documents})
    RunDirectory(directory).finish()


def quickstart(root: Path, model: Path, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """Mid-training of 100 updates on 32 documents: half of the questions right, in seed 1 all."""
    for seed in seeds:
        place = root / f"seed-{seed}"
        trained(place / "base", model, 0)
        trained(place / "midtrain", model, 100)
        packed(place / "rows", 32)
        evaluated(place / "evaluate-midtrain", [0.0, 1.0, 0.0, 1.0] if seed == 0 else [1.0] * QUESTIONS)
        evaluated(place / "evaluate-base", [0.0] * QUESTIONS, stopped=0.25)
    return root


def settings(tmp_path: Path, name: str, *overrides: str) -> tuple[Path, list[str]]:
    fixed = [f"quickstarts=[{tmp_path / 'quickstart'}]", f"output={tmp_path / name}", *overrides]
    return CONF / "ablations" / f"{name}.yaml", fixed


def scaling_config(tmp_path: Path, *overrides: str) -> MidtrainScalingConfig:
    path, values = settings(tmp_path, "midtrain_scaling", "problems=[8]", "epochs=5", "updates=250", *overrides)
    return load_config(MidtrainScalingConfig, path, values)


def scaled(tmp_path: Path, model: Path) -> None:
    """Finished arms of one small set of 4 documents, 13 updates."""
    for seed in (0, 1):
        out = tmp_path / "midtrain_scaling" / f"seed-{seed}"
        conversations(out / "heldout" / "midtrain", ["2", "3"])
        RunDirectory(out / "heldout").finish()
        conversations(out / "curated-8" / "sft", ["2", "3", "4"])
        conversations(out / "curated-8" / "midtrain", ["2", "3", "4", "5"])
        RunDirectory(out / "curated-8").finish()
        packed(out / "rows-8", 4)
        trained(out / "midtrain-8-epochs", model, 13)
        evaluated(out / "evaluate-8-epochs", [0.0, 0.0, 0.0, 1.0])


def test_scaling_runs_each_set_under_both_protocols_but_not_what_the_quickstart_ran(
    base: Path, tmp_path: Path
) -> None:
    root = quickstart(tmp_path / "quickstart", base) / "seed-1"
    steps = [step for step in midtrain_scaling.plan(scaling_config(tmp_path)) if step.output.parent.name == "seed-1"]
    assert [step.name for step in steps if step.arguments[0] in ("midtrain", "evaluate")] == [
        *("midtrain-8-epochs", "evaluate-8-epochs"),
        *("midtrain-8-steps", "evaluate-8-steps", "midtrain-full-steps", "evaluate-full-steps"),
    ]
    named = {step.name: step.arguments for step in steps}
    assert f"data={root / 'rows'}" in named["midtrain-full-steps"]
    assert "max_steps=250" in named["midtrain-full-steps"]
    assert "epochs=5" in named["midtrain-8-epochs"]
    assert "problems.split=heldout" in named["heldout-rollouts"]
    only_epochs = midtrain_scaling.plan(scaling_config(tmp_path, "updates=null"))
    assert not [step for step in only_epochs if step.name.endswith("-steps")]


def test_scaling_table_and_picture(base: Path, tmp_path: Path) -> None:
    """The quickstart's seeds score 50 and 100: 75 +- 25 over seeds; both small arms 25."""
    quickstart(tmp_path / "quickstart", base)
    scaled(tmp_path, base)
    config = scaling_config(tmp_path, "updates=null")
    text = midtrain_scaling.report(config)
    assert "| 8 problems, 5 epochs | 4 (4, 4) | 13 (13, 13) |" in text
    assert "| 25.0 (25.0, 25.0) |" in text
    assert "| whole set, 5 epochs | 32 (32, 32) | 100 (100, 100) |" in text
    assert "| 75.0 ± 25.0 (50.0, 100.0) |" in text
    losses = document_losses(base, tmp_path / "midtrain_scaling" / "seed-0" / "heldout" / "midtrain")
    assert f"{sum(losses.values()) / 2:.4f}" in text
    assert (config.output / midtrain_scaling.PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_repetition_gives_every_set_the_same_updates_at_every_width(base: Path, tmp_path: Path) -> None:
    """Two widths, two sets, two seeds: the wide model answers one question more with the whole set, in seed 1 all."""
    root = quickstart(tmp_path / "quickstart", base) / "seed-1"
    path, values = settings(tmp_path, "repetition", "problems=[8]", "updates=250")
    one_width = tmp_path / "one-width.yaml"
    one_width.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text("utf-8")), "widths": {"a": []}}))
    config = replace(load_config(RepetitionConfig, path, values), widths={"a": (), "b": ("hidden_size=64",)})
    steps = {step.name: step.arguments for step in repetition.plan(config) if step.output.parent.name == "seed-1"}
    arms = [f"{width}-{size}" for width in "ab" for size in ("8", "full")]
    assert [name for name in steps if name in arms] == arms
    for arm in arms:
        assert {"max_steps=250", "epochs=1000", "validation_rows=0"} < set(steps[arm])
        assert f"base={config.output / 'seed-1' / f'base-{arm[0]}' / 'hf'}" in steps[arm]
        assert f"model={config.output / 'seed-1' / arm / 'hf'}" in steps[f"evaluate-{arm}"]
    assert "hidden_size=64" in steps["base-b"]
    assert "hidden_size=64" not in steps["base-a"]
    assert f"data={root / 'rows'}" in steps["b-full"]
    with pytest.raises(UserError, match="has no finished"):
        repetition.report(config)
    for seed in (0, 1):
        out = config.output / f"seed-{seed}"
        conversations(out / "heldout" / "midtrain", ["2", "3"])
        RunDirectory(out / "heldout").finish()
        packed(out / "rows-8", 4)
        for arm in arms:
            trained(out / arm, base, 250)
            extra = float(seed) if arm == "b-full" else 0.0
            evaluated(out / f"evaluate-{arm}", [extra, extra, float(arm == "b-full"), 1.0])
    with pytest.raises(UserError, match="widths"):
        load_config(RepetitionConfig, one_width, values)
    text = repetition.report(config)
    assert "| a, 8 problems | 4 (4, 4) | 250 (250, 250) |" in text
    assert "| b, whole set | 32 (32, 32) | 250 (250, 250) |" in text
    assert "| 75.0 ± 25.0 (50.0, 100.0) |" in text
    assert text.count("| 25.0 (25.0, 25.0) |") == len(arms) - 1
    assert (config.output / repetition.PICTURE).read_bytes().startswith(b"\x89PNG")


def packing_config(tmp_path: Path) -> MidtrainPackingConfig:
    path, values = settings(
        tmp_path, "midtrain_packing", "problems=8", "batch=2", f"scaling={tmp_path / 'midtrain_scaling'}"
    )
    return load_config(MidtrainPackingConfig, path, values)


def test_packing_compares_by_document(base: Path, tmp_path: Path) -> None:
    """One model on all sides: no difference in loss; unpacked is right on one question more in seed 0, of four."""
    quickstart(tmp_path / "quickstart", base)
    with pytest.raises(UserError, match="midtrain_scaling"):
        midtrain_packing.plan(packing_config(tmp_path))
    scaled(tmp_path, base)
    config = packing_config(tmp_path)
    plan = midtrain_packing.plan(config)
    for place, placement in enumerate(("length", "mixed")):
        pack, packed, _ = plan[3 * place : 3 * place + 3]
        documents = config.scaling / "seed-0" / "curated-8" / "midtrain"
        assert {f"placement={placement}", f"conversations={documents}"} < set(pack.arguments)
        assert {f"data={pack.output}", "epochs=5", "validation_rows=0"} < set(packed.arguments)
    train, evaluate = plan[6:8]
    assert train.arguments[0] == "sft"
    assert {"micro_batch=2", "global_batch=2", "epochs=5", "optim.lr=0.003"} < set(train.arguments)
    assert f"model={train.output / 'hf'}" in evaluate.arguments
    for seed in (0, 1):
        out = config.output / f"seed-{seed}"
        trained(out / "unpacked", base, 10)
        evaluated(out / "evaluate-unpacked", [0.0, 0.0, 1.0 - seed, 1.0])
        trained(out / "length", base, 13)
        evaluated(out / "evaluate-length", [0.0, 0.0, 0.0, 1.0])
        trained(out / "mixed", base, 10)
        evaluated(out / "evaluate-mixed", [0.0, 0.0, 1.0 - seed, 0.0])
    text = midtrain_packing.report(config)
    assert "| packed by length minus unpacked | +0.0000 | 0.0000 | +0.0000 (0.0000) | +0.0000 (0.0000) |" in text
    assert "| packed by length minus unpacked | -12.5 | 12.5 | -25.0 (25.0) | +0.0 (0.0) |" in text
    assert "| packed, mixed minus unpacked | -25.0 | 0.0 | -25.0 (25.0) | -25.0 (25.0) |" in text
    assert "| packed by length | 13 (13, 13) | 1.5 (1.5, 1.5) |" in text  # 5 epochs of 4 documents in 13 updates


def test_direct_sft_is_compared_with_its_own_start(base: Path, tmp_path: Path) -> None:
    root = quickstart(tmp_path / "quickstart", base)
    for seed in (0, 1):
        conversations(root / f"seed-{seed}" / "curated" / "sft", ["2"] * 5)
        for name in direct_sft.WHOLE.values():
            evaluated(root / f"seed-{seed}" / f"evaluate-{name}", [1.0] * QUESTIONS)
    path, values = settings(tmp_path, "direct_sft", "small=8", f"scaling={tmp_path / 'midtrain_scaling'}")
    config = load_config(DirectSFTConfig, path, values)
    with pytest.raises(UserError, match="midtrain_scaling"):
        direct_sft.plan(config)
    scaled(tmp_path, base)
    steps = direct_sft.plan(config)
    assert [step.name for step in steps[:4]] == [
        *("sft-base", "evaluate-sft-base", "sft-midtrain", "evaluate-sft-midtrain"),
    ]
    assert f"base={root / 'seed-0' / 'midtrain' / 'hf'}" in steps[2].arguments
    assert "epochs=15" in steps[2].arguments
    for seed in (0, 1):
        for name in direct_sft.STARTS:
            evaluated(config.output / f"seed-{seed}" / f"evaluate-sft-{name}", [0.0] * 3 + [1.0 - seed])
    text = direct_sft.report(config)
    # Mid-training: 50 -> 25 in seed 0, 100 -> 0 in seed 1.
    assert "| mid-training + small set minus mid-training | -62.5 | 37.5 |" in text
    assert "| random base | 0 (0, 0) | 0.0 (0.0, 0.0) | 25.0 (25.0, 25.0) |" in text
    assert "| random base + small set | 3 (3, 3) | 12.5 ± 12.5 (25.0, 0.0) | 100.0 (100.0, 100.0) |" in text
    assert "| mid-training + whole SFT set | 5 (5, 5) | 100.0 (100.0, 100.0) |" in text


def test_who_stops_is_counted_from_the_records(tmp_path: Path) -> None:
    """Of four answers one runs into the limit, one stops without an answer."""
    outcomes = [("stop", "correct", 4), ("stop", "wrong", 6), ("stop", "unparsable", 2), ("length", "correct", 8)]
    rows = [
        {
            **dict.fromkeys(schemas()["verdicts"].names, ""),
            "id": f"r{n}",
            "problem_id": f"q{n}",
            "sample_index": 0,
            "seed": 0,
            "metadata": "{}",
            "domain": None,
            "difficulty": None,
            "finish_reason": reason,
            "verdict": verdict,
            "tokens": tokens,
        }
        for n, (reason, verdict, tokens) in enumerate(outcomes)
    ]
    for step in stopping.STEPS:
        place = tmp_path / "quickstart" / "seed-0" / f"evaluate-{step}"
        RunDirectory(place).finish()
        write_shard(place / "verdicts", 0, rows_to_table(rows, "verdicts"), kind="verdicts")
        finish(place / "verdicts", kind="verdicts", config={})
    path, values = settings(tmp_path, "stopping")
    text = stopping.report(load_config(StoppingConfig, path, values))
    assert "| base | 75.0 (75.0) | 50.0 (50.0) | 5.0 (5.0) |" in text
    assert "| SFT | 75.0 (75.0) |" in text
