"""The release: bit-equal weights, a directory that transformers loads, and a card of the runs' own facts."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from results import plain_result
from safetensors.torch import load_file, save_file
from shown import write_records
from transformers import AutoConfig

from phimr_nemo.config import (
    BaseConfig,
    DistillConfig,
    DPOConfig,
    ExportConfig,
    ParallelConfig,
    SFTConfig,
    load_config,
    to_yaml,
)
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import Score, write_result
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.checkpoints import open_checkpoint, write_hf, write_megatron
from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory
from phimr_nemo.model.origin import Origin, read_origin
from phimr_nemo.report.card import front_matter
from phimr_nemo.report.export import run_export
from phimr_nemo.store.provenance import MadeFrom, content_of
from phimr_nemo.store.runs import RESULTS_FILE, RunDirectory

SHAPE = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("model")
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={output}", *SHAPE]))
    return output / "hf"


def export_config(tmp_path: Path, model: Path, *overrides: str) -> ExportConfig:
    fixed = [f"run.output={tmp_path / 'release'}", f"model={model}"]
    return load_config(ExportConfig, Path("conf/export/tiny.yaml"), [*fixed, *overrides])


def trained(path: Path, *, steps: int, lr: float, seed: int, finished: bool = True, base: Path | None = None) -> Path:
    """A run directory as SFT leaves it."""
    run = RunDirectory(path)
    overrides = [f"run.output={path}", f"run.seed={seed}", f"optim.lr={lr}", "optim.min_lr=0"]
    overrides += ["sequence_length=96"]
    settings = load_config(SFTConfig, Path("conf/sft/tiny.yaml"), overrides)
    facts = {} if base is None else {"made_from": MadeFrom({"base": content_of(base)}, {}).to_json()}
    run.describe(stage="sft", config_yaml=to_yaml(settings), seed=seed, facts=facts)
    if finished:
        run.finish(steps=steps, hf="hf")
    return path


def evaluated(
    path: Path, model: Path | None, *, correct: int, questions: int, stderr: float, benchmark: str = "mine"
) -> Path:
    """An evaluation directory with its results of a model; None: one behind an endpoint."""
    path.mkdir()
    share = correct / questions
    score = {"middle": Score(questions, share, stderr)}
    result = plain_result(share, questions=questions, samples=3, stderr=stderr, mean_tokens=5.0, by_difficulty=score)
    inputs = {"teacher": "served"} if model is None else {"model": content_of(model)}
    settings = {"row": path.name, "benchmark": benchmark}
    write_result(path / RESULTS_FILE, result, settings, made_from=MadeFrom(inputs, {}))
    (path / "config.yaml").write_text("run:\n  seed: 4\nproblems: {}\n")
    return path


def card(tmp_path: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """A written card's metadata, and the cells of all its table rows."""
    text = (tmp_path / "release" / "hf" / "README.md").read_text("utf-8")
    _, metadata, body = text.split("---\n", 2)
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    return yaml.safe_load(metadata), rows


def test_weights_and_tokenizer_are_the_trained_ones_to_the_bit(tmp_path: Path, model: Path) -> None:
    config = export_config(tmp_path, model)
    run_stage("export", config)
    release = tmp_path / "release" / "hf"
    before, after = load_file(model / "model.safetensors"), load_file(release / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert (release / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    facts = RunDirectory(tmp_path / "release").closing_facts()
    assert facts["parameters"] == sum(tensor.numel() for tensor in before.values())


def test_transformers_loads_the_release_without_its_code(tmp_path: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM

    run_stage("export", export_config(tmp_path, model))
    release = tmp_path / "release" / "hf"
    assert "auto_map" not in json.loads((release / "config.json").read_text())
    assert not [path for path in release.iterdir() if path.suffix in (".py", ".bin", ".pt", ".pkl")]
    loaded = AutoModelForCausalLM.from_pretrained(release, trust_remote_code=False)
    assert type(loaded) is Phi3ForCausalLM
    original = Phi3ForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(release)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2+2?"}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize(("length", "says"), [(256, "--max-model-len 1024"), (2048, "above 1,024 tokens")])
def test_the_release_says_how_it_was_trained_and_what_it_can_be_asked(
    length: int, says: str, tmp_path: Path, model: Path
) -> None:
    ended = tmp_path / "grpo" / "hf"
    made = Origin(length, "long_when_max_length_exceeds_original")
    copy_hf_directory(ended, HFDirectory(model), tokenizer_from=model, origin=made)
    run_export(export_config(tmp_path, ended, "knows=Sums, such as 1+1"))
    release = tmp_path / "release" / "hf"
    assert read_origin(release) == replace(made, knows="Sums, such as 1+1")
    text = (release / "README.md").read_text("utf-8")
    assert "Sums, such as 1+1" in text
    assert f"up to {length:,} tokens" in text
    assert says in text
    # It travels through every form that a checkpoint has.
    write_megatron(tmp_path / "megatron", open_checkpoint(release), ParallelConfig())
    write_hf(tmp_path / "back", open_checkpoint(tmp_path / "megatron"))
    assert read_origin(tmp_path / "back") == read_origin(release)
    # And through the library of others.
    AutoConfig.from_pretrained(release).save_pretrained(tmp_path / "saved")
    assert read_origin(tmp_path / "saved") == read_origin(release)


# What TensorRT-LLM reads of a Phi3 config.json: tensorrt_llm/models/phi3/config.py and, for its PyTorch engine,
# _torch/models/modeling_phi3.py and RopeParams.from_config. It needs a GPU, so it is not run here.
TENSORRT_LLM_KEYS = (
    *("architectures", "model_type", "torch_dtype", "vocab_size", "hidden_size", "intermediate_size", "hidden_act"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "attention_bias"),
    *("tie_word_embeddings", "pad_token_id", "rope_theta", "partial_rotary_factor", "max_position_embeddings"),
    *("original_max_position_embeddings", "rope_scaling"),
)


def test_the_config_has_what_tensorrt_llm_reads(tmp_path: Path, model: Path) -> None:
    run_stage("export", export_config(tmp_path, model))
    config = json.loads((tmp_path / "release" / "hf" / "config.json").read_text())
    assert {key: config.get(key) for key in TENSORRT_LLM_KEYS if config.get(key) is None} == {}
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["torch_dtype"] == "float32"
    head = config["hidden_size"] // config["num_attention_heads"]
    pairs = int(head * config["partial_rotary_factor"]) // 2
    scaling = config["rope_scaling"]
    assert scaling["type"] == "longrope"
    assert len(scaling["short_factor"]) == len(scaling["long_factor"]) == pairs


def test_phi4_minis_own_config_says_the_same_to_tensorrt_llm(shared_data: Path) -> None:
    real = json.loads((shared_data / "phi4-mini" / "config.json").read_text())
    ours = Architecture.from_directory(shared_data / "phi4-mini").to_hf_config()
    for key in TENSORRT_LLM_KEYS:
        # Written with the weights, whose dtype it is.
        if key != "torch_dtype":
            assert ours[key] == real[key], key


def test_the_card_tells_what_was_trained_and_measured(tmp_path: Path, model: Path) -> None:
    stages = {
        "SFT": trained(tmp_path / "sft", steps=123, lr=2.5e-4, seed=7),
        "DPO": trained(tmp_path / "dpo", steps=45, lr=1e-6, seed=8),
    }
    rows = {
        "SFT": evaluated(tmp_path / "e1", model, correct=12, questions=16, stderr=0.0321),
        "DPO": evaluated(tmp_path / "e2", model, correct=13, questions=16, stderr=0.0299),
    }
    config = export_config(
        tmp_path,
        model,
        "licence=mit",
        "base_model=some/base",
        *(f"stages.{name}={path}" for name, path in stages.items()),
        *(f"evaluations.{name}={path}" for name, path in rows.items()),
    )
    run_stage("export", config)
    metadata, cells = card(tmp_path)
    assert metadata["license"] == "mit"
    assert metadata["base_model"] == "some/base"
    assert "base_model" not in yaml.safe_load(front_matter(export_config(tmp_path, model)).strip("-"))
    assert metadata["library_name"] == "transformers"
    trainings = [row[:5] for row in cells if len(row) == 6][2:]
    assert trainings == [["SFT", "123", "96", "0.00025", "7"], ["DPO", "45", "96", "1e-06", "8"]]
    measured = [row for row in cells if len(row) == 12][2:]
    # pass@1, its errors over questions and seeds (one), maj@3, pass@3, truncated, unparsable, tokens; the counts.
    assert measured == [
        ["SFT", "75.0", "3.2", "-", "75.0", "75.0", "0.0", "0.0", "5", "16", "3", "4"],
        ["DPO", "81.2", "3.0", "-", "81.2", "81.2", "0.0", "0.0", "5", "16", "3", "4"],
    ]
    # "mine" is no benchmark of the paper's.
    assert "Phi-4-Mini-Reasoning, re-evaluated" not in {row[0] for row in cells}


def examples(tmp_path: Path, language: str) -> list[str]:
    """The blocks of a language in a written card."""
    text = (tmp_path / "release" / "hf" / "README.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_cards_example_for_transformers_runs(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage("export", export_config(tmp_path, model))
    (code,) = examples(tmp_path, "python")
    monkeypatch.chdir(tmp_path / "release" / "hf")
    capsys.readouterr()
    exec(code.replace("max_new_tokens=1024", "max_new_tokens=2"), {})
    assert capsys.readouterr().out.strip()


def test_the_card_has_what_a_reader_asks_first(tmp_path: Path, model: Path) -> None:
    path = evaluated(tmp_path / "e", model, correct=12, questions=16, stderr=0.03)
    run_stage("export", export_config(tmp_path, model, f"evaluations.SFT={path}"))
    text = (tmp_path / "release" / "hf" / "README.md").read_text("utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        *("Intended use", "Limits", "How to run it", "Training data", "Evaluation", "Citation and licence"),
    ]
    assert "On mine 25.0 % of its responses are not correct" in text
    serve, convert = examples(tmp_path, "bash")
    longest = Architecture.from_directory(model).max_position_embeddings
    assert f"vllm serve . --served-model-name release --max-model-len {longest}\n" in serve
    request = json.loads(re.search(r"-d '(.*)'", serve)[1])  # type: ignore[index]
    assert request["messages"][0]["role"] == "user"
    assert "convert_hf_to_gguf.py . --outfile model.gguf" in convert


@pytest.mark.parametrize(("asked", "sampled"), [(0.6, True), (0.0, False)])
def test_the_cards_examples_sample_from_the_nucleus_alone(
    tmp_path: Path, model: Path, asked: float, sampled: bool
) -> None:
    """The evaluations have no top-k and no min-p; transformers' default is 50, llama.cpp's are 40 and 0.05."""
    path = evaluated(tmp_path / "e", model, correct=12, questions=16, stderr=0.03)
    results = json.loads((path / RESULTS_FILE).read_text("utf-8"))
    results["settings"]["params"] = {"temperature": asked, "top_p": 0.9, "max_new_tokens": 77}
    (path / RESULTS_FILE).write_text(json.dumps(results), "utf-8")
    run_stage("export", export_config(tmp_path, model, f"evaluations.SFT={path}"))
    (code,) = examples(tmp_path, "python")
    (call,) = re.findall(r"model\.generate\(\n(.*)\n\)", code)
    given = eval(f"dict({call.replace('**inputs,', '')})")
    assert given.pop("max_new_tokens") == 77
    assert given == (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0} if sampled else {"do_sample": False}
    )
    served, converted = examples(tmp_path, "bash")
    request = json.loads(shlex.split(served)[-1])
    assert {name: request[name] for name in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": asked,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0,
    }
    words = shlex.split(converted.splitlines()[1])
    flags = {name: float(words[words.index(name) + 1]) for name in ("--temp", "--top-p", "--top-k", "--min-p")}
    assert flags == {"--temp": asked, "--top-p": 0.9, "--top-k": 0.0, "--min-p": 0.0}


def test_the_card_says_of_the_training_data_what_the_manifest_says(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "pairs"
    row = dict.fromkeys(("id", "problem_id", "question", "chosen", "rejected"), "x") | {"mode": "near_miss"}
    counts = {"input: rollouts": 9_600, "dropped: duplicate response": 5_197, "dropped: no partner left": 12}
    write_records(data, "pairs", [[row]], counts=counts)
    run = RunDirectory(tmp_path / "dpo")
    settings = load_config(
        DPOConfig, Path("conf/dpo/tiny.yaml"), [f"run.output={run.path}", "base=b", f"pairs={data}"]
    )
    made_from = MadeFrom({"pairs": content_of(data)}, {}).to_json()
    run.describe(stage="dpo", config_yaml=to_yaml(settings), seed=0, facts={"made_from": made_from})
    run.finish(steps=3, hf="hf")
    given = [
        f"stages.dpo={run.path}",
        "data=[{name: openai/gsm8k, licence: mit}, {name: my own, licence: cc-by-4.0}]",
    ]
    run_stage("export", export_config(tmp_path, model, *given))
    metadata, cells = card(tmp_path)
    assert metadata["datasets"] == ["openai/gsm8k"]
    text = (tmp_path / "release" / "hf" / "README.md").read_text("utf-8")
    assert "- openai/gsm8k: mit\n- my own: cc-by-4.0" in text
    (told,) = [row[1:] for row in cells if len(row) == 4 and row[0] == "dpo"]
    assert told == ["1 pairs", "9,600 rollouts", "5,197 duplicate response; 12 no partner left"]
    # Records that were made anew since are not what the model was trained on.
    shutil.rmtree(data)
    write_records(data, "pairs", [[row, row | {"id": "y"}]])
    shutil.rmtree(tmp_path / "release")
    run_stage("export", export_config(tmp_path, model, *given))
    assert "pairs: not what is there now" in (tmp_path / "release" / "hf" / "README.md").read_text("utf-8")


def test_the_card_tells_of_a_distillation(tmp_path: Path, model: Path) -> None:
    run = RunDirectory(tmp_path / "distill")
    given = [f"run.output={run.path}", "run.seed=3", "optim.lr=2e-5", "base=b", "teacher.path=t", "prompts=p"]
    settings = load_config(DistillConfig, Path("conf/distill/tiny.yaml"), given)
    run.describe(stage="distill", config_yaml=to_yaml(settings), seed=3, facts={})
    run.finish(steps=60, hf="hf")
    score = evaluated(tmp_path / "e", model, correct=8, questions=16, stderr=0.02)
    named = (f"stages.distill={run.path}", f"evaluations.distillation={score}")
    run_stage("export", export_config(tmp_path, model, *named))
    _, cells = card(tmp_path)
    assert [row[:5] for row in cells if len(row) == 6][2:] == [["distill", "60", "256", "2e-05", "3"]]
    assert [row[:2] for row in cells if len(row) == 12][2:] == [["distillation", "50.0"]]


def test_the_card_has_the_papers_numbers_beside_ours(tmp_path: Path, model: Path) -> None:
    path = evaluated(tmp_path / "e", model, correct=15, questions=30, stderr=0.05, benchmark="AIME24")
    run_stage("export", export_config(tmp_path, model, f"evaluations.SFT={path}"))
    _, cells = card(tmp_path)
    sft = next(row for row in cells if row[0] == "+ SFT")
    assert sft[1:5] == ["43.3", "50.0 ± 5.0 (30x3)", "89.3", "not run"]


def test_one_question_has_no_standard_error(tmp_path: Path, model: Path) -> None:
    path = evaluated(tmp_path / "e", model, correct=1, questions=1, stderr=math.nan)
    run_stage("export", export_config(tmp_path, model, f"evaluations.one={path}"))
    _, cells = card(tmp_path)
    assert cells[-1][:3] == ["one", "100.0", "-"]


def other_weights(model: Path, path: Path, by: float = 1.0) -> Path:
    """The model with one weight changed: the same sizes and times."""
    shutil.copytree(model, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += by
    then = file.stat()
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    return path


def test_the_card_carries_no_score_of_other_weights(tmp_path: Path, model: Path) -> None:
    replaced = other_weights(model, tmp_path / "replaced")
    path = evaluated(tmp_path / "e", replaced, correct=1, questions=4, stderr=0.1)
    with pytest.raises(UserError, match=r"evaluation 'GRPO' in .* is of other weights") as caught:
        run_stage("export", export_config(tmp_path, model, f"evaluations.GRPO={path}"))
    assert content_of(replaced) in caught.value.problem
    assert content_of(model) in caught.value.problem
    assert not (tmp_path / "release").exists()
    run_stage("export", export_config(tmp_path, replaced, f"evaluations.GRPO={path}"))


def test_a_row_is_of_the_model_of_its_stage(tmp_path: Path, model: Path) -> None:
    """The weights that SFT made are no score of DPO; what SFT started from is a row of its own."""
    base = other_weights(model, tmp_path / "base-model")
    stages = {name: trained(tmp_path / name, steps=1, lr=1e-4, seed=0, base=base) for name in ("sft", "dpo")}
    for by, stage in enumerate(stages.values(), 2):
        other_weights(model, stage / "hf", by)
    asked = {"base": base, "SFT": stages["sft"] / "hf", "DPO": stages["dpo"] / "hf"}
    rows = {
        name: evaluated(tmp_path / f"e-{name}", path, correct=1, questions=4, stderr=0.1)
        for name, path in asked.items()
    }
    named = [f"stages.{name}={path}" for name, path in stages.items()]

    def export(**evaluations: Path) -> None:
        given = [f"evaluations.{name}={path}" for name, path in evaluations.items()]
        run_stage("export", export_config(tmp_path, stages["dpo"] / "hf", *named, *given))

    with pytest.raises(UserError, match="'DPO' in"):
        export(DPO=rows["SFT"])
    with pytest.raises(UserError, match="'other' in"):
        export(other=evaluated(tmp_path / "e-other", model, correct=1, questions=4, stderr=0.1))
    export(**rows)
    assert [row[0] for row in card(tmp_path)[1] if len(row) == 12][2:] == ["base", "SFT", "DPO"]


def test_a_score_behind_an_endpoint_is_nobodys(tmp_path: Path, model: Path) -> None:
    path = evaluated(tmp_path / "e", None, correct=1, questions=4, stderr=0.1)
    with pytest.raises(UserError, match="other weights \\(unknown\\)") as caught:
        run_stage("export", export_config(tmp_path, model, f"evaluations.GRPO={path}"))
    assert f"remove {path} and evaluate the model's own directory" in caught.value.remedy


@pytest.mark.parametrize("what", ["stages", "evaluations"])
def test_what_has_not_finished_is_not_reported(what: str, tmp_path: Path, model: Path) -> None:
    path = trained(tmp_path / "half", steps=1, lr=1.0, seed=0, finished=False)
    with pytest.raises(UserError) as caught:
        run_stage("export", export_config(tmp_path, model, f"{what}.half={path}"))
    assert f"'half' in {path} has not finished" in caught.value.problem
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", '{"seed": 1}'),
        ("run.json", "[" * 100_000),
        ("config.yaml", "a: ["),
        ("config.yaml", "run: {}"),
        ("config.yaml", "optim: 3\nsequence_length: 4"),
        ("DONE", "{}"),
        ("DONE", "["),
    ],
)
def test_a_stage_that_is_no_training_run_or_damaged_is_named(
    name: str, content: str, tmp_path: Path, model: Path
) -> None:
    path = trained(tmp_path / "stage", steps=1, lr=1.0, seed=0)
    (path / name).write_text(content)
    with pytest.raises(UserError, match=f"{path}") as caught:
        run_stage("export", export_config(tmp_path, model, f"stages.one={path}"))
    assert "damaged" in caught.value.problem
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_not_released(value: float, tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[5] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        run_stage("export", export_config(tmp_path, broken))
    assert not (tmp_path / "release").exists()


def test_the_model_itself_is_returned_unchanged_by_a_second_run(tmp_path: Path, model: Path) -> None:
    config = export_config(tmp_path, model)
    run_stage("export", config)
    written = (tmp_path / "release" / "hf" / "model.safetensors").stat().st_mtime_ns
    run_stage("export", config)
    assert (tmp_path / "release" / "hf" / "model.safetensors").stat().st_mtime_ns == written
    # Called by itself it never overwrites a release.
    with pytest.raises(UserError, match="exists already"):
        run_export(config)
