"""The whole recipe end to end in its smallest form: killed once, continued, and every file looked at.

The models learn nothing in a few steps, so their own rollouts would hold no right answer: the preference pairs and
prompts come from the programmatic teacher instead. Everything else is the quickstart's own plan.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from processes import start
from safetensors.torch import load_file
from warm_phimr import run_steps

from phimr_nemo.config import ParallelConfig, load_config
from phimr_nemo.data.chat import load_tokenizer, render_conversation
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.jobs.quickstart import ROWS, write_report
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.checkpoints import NEMO_WEIGHTS
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.convert import load_tensors
from phimr_nemo.model.origin import Origin, read_origin
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.store.shards import read_manifest, read_table
from phimr_nemo.training.seal import checkpoints

pytestmark = pytest.mark.slow

TRAINED = {
    "midtrain": small.MIDTRAIN_STEPS,
    "sft": small.SFT_STEPS,
    "dpo": small.DPO_STEPS,
    "grpo": small.GRPO_STEPS,
    "sft-without-midtrain": small.SFT_STEPS,
}
STARTS_FROM = {"midtrain": "base", "sft": "midtrain", "dpo": "sft", "sft-without-midtrain": "base"}
MODELS = ("base", *TRAINED, "release")
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Run:
    """One finished run of the recipe, and when its files were written before it was killed."""

    root: Path
    steps: list[Step]
    before_the_kill: dict[str, int]

    def model(self, name: str) -> Path:
        return self.root / name / "hf"

    def config(self, name: str) -> Any:
        return small.resolved(next(step for step in self.steps if step.name == name))[1]


def run_and_kill(step: Step) -> None:
    """Start a training step and kill it without warning as soon as it has trained."""
    process = start([sys.executable, "-m", "phimr_nemo.cli", *step.arguments], start_new_session=True)
    while not list(read_metrics(step.output)) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("tiny") / "seed-0"
    steps = small.quickstart(root)
    first = next(number for number, step in enumerate(steps) if step.name == "midtrain")
    run_steps(steps[:first])
    run_and_kill(steps[first])
    assert not RunDirectory(steps[first].output).is_done
    before = {path: when for path, when in small.times(root).items() if "/midtrain/" not in path}
    small.run_again(steps[:first])
    run_steps(steps[first:])
    return Run(root, steps, before)


# Every file --------------------------------------------------------------------------------------------------


def test_every_step_is_done_and_tells_what_made_it(run: Run) -> None:
    assert {step.output for step in run.steps} == set(run.root.iterdir())
    for step in run.steps:
        directory = RunDirectory(step.output)
        assert directory.is_done, step.name
        stage, config = small.resolved(step)
        assert load_config(type(config), step.output / "config.yaml") == config
        made = json.loads((step.output / "run.json").read_text())
        assert (made["stage"], made["seed"]) == (stage, config.run.seed)
        assert {"git", "torch", "megatron-core", "nemo-toolkit", "nemo-aligner"} <= made["versions"].keys()
    assert not [path for path in run.root.rglob("*") if path.name.endswith((".tmp", "-unfinished"))]


def test_what_was_finished_before_the_kill_was_not_made_again(run: Run) -> None:
    assert run.before_the_kill
    after = small.times(run.root)
    assert {path: after[path] for path in run.before_the_kill} == run.before_the_kill


def test_a_finished_pipeline_is_not_run_again(run: Run) -> None:
    before = small.times(run.root)
    small.run_again(run.steps)
    assert small.times(run.root) == before


RECORDS: list[tuple[str, Kind, list[str]]] = [
    ("verdicts", "verdicts", ["rollouts"]),
    ("curated/midtrain", "conversations", ["verdicts"]),
    ("curated/sft", "conversations", ["verdicts"]),
    ("rows", "rows", ["curated/midtrain"]),
    ("own-verdicts", "verdicts", ["own-rollouts"]),
    ("preferences/pairs", "pairs", ["own-verdicts"]),
    ("preferences/prompts", "prompts", ["own-verdicts"]),
]


@pytest.mark.parametrize(("name", "kind", "inputs"), RECORDS, ids=[name for name, _, _ in RECORDS])
def test_manifests_form_a_chain_of_contents(name: str, kind: Kind, inputs: list[str], run: Run) -> None:
    manifest = read_manifest(run.root / name, kind)
    for source in inputs:
        assert content_of(run.root / source) in manifest.inputs.values()
    for shard, digest in manifest.shards.items():
        assert small.sha256(run.root / name / shard) == digest
    assert read_table(run.root / name, kind).num_rows == manifest.rows


@pytest.mark.parametrize(
    ("stage", "key"), [("midtrain", "data"), ("sft", "data"), ("dpo", "pairs"), ("grpo", "prompts")]
)
def test_training_runs_name_the_data_they_read(stage: str, key: str, run: Run) -> None:
    made = json.loads((run.root / stage / "run.json").read_text())
    source = getattr(run.config(stage), key)
    base = run.config(stage).base
    assert made["made_from"]["inputs"] == {key: content_of(source), "base": content_of(base)}


# Data --------------------------------------------------------------------------------------------------------


def rows_of(directory: Path, kind: Kind) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(directory, kind).to_pylist()
    return rows


def test_the_teacher_is_right_and_wrong_and_every_rollout_is_graded(run: Run) -> None:
    rollouts, verdicts = rows_of(run.root / "rollouts", "rollouts"), rows_of(run.root / "verdicts", "verdicts")
    assert len(rollouts) == small.PROBLEMS * run.config("rollouts").rollouts_per_problem
    assert [{key: row[key] for key in rollouts[0]} for row in verdicts] == rollouts
    names = {row["verdict"] for row in verdicts}
    assert {"correct", "wrong"} <= names <= {"correct", "wrong", "unparsable"}
    # The programmatic teacher ends a right solution with the answer in a box.
    for row in verdicts:
        assert (f"\\boxed{{{row['answer']}}}" in row["response"]) == (row["verdict"] == "correct")


def test_mid_training_takes_every_right_rollout_once_and_sft_a_harder_part(run: Run) -> None:
    right = {
        (row["problem_id"], row["response"]): row["difficulty"]
        for row in rows_of(run.root / "verdicts", "verdicts")
        if row["verdict"] == "correct"
    }
    tiers = run.config("curated").sft.difficulties
    for name in ("midtrain", "sft"):
        rows = rows_of(run.root / "curated" / name, "conversations")
        chosen = [(row["problem_id"], row["response"]) for row in rows]
        assert len(chosen) == len(set(chosen))
        if name == "midtrain":
            # At least as many a problem are kept as the teacher gave.
            assert run.config("curated").midtrain.max_per_problem >= run.config("rollouts").rollouts_per_problem
            assert set(chosen) == right.keys()
        else:
            hard = {key for key, difficulty in right.items() if difficulty in tiers}
            assert set(chosen) <= hard
            assert {problem for problem, _ in chosen} == {problem for problem, _ in hard}


def test_packed_rows_hold_every_conversation_whole(run: Run) -> None:
    tokenizer = load_tokenizer(run.model("base"))
    wanted = sorted(
        tuple(zip(*render_conversation(tokenizer, row["question"], row["response"]), strict=True))
        for row in rows_of(run.root / "curated" / "midtrain", "conversations")
    )
    found = []
    for row in rows_of(run.root / "rows", "rows"):
        assert len(row["input_ids"]) <= small.ROW
        ends = np.cumsum([0, *row["document_lengths"]])
        pairs = list(zip(row["input_ids"], row["loss_mask"], strict=True))
        found += [tuple(pairs[a:b]) for a, b in itertools.pairwise(ends)]
    assert sorted(found) == wanted


def test_pairs_and_prompts_come_from_graded_rollouts_of_one_question(run: Run) -> None:
    verdicts = rows_of(run.root / "own-verdicts", "verdicts")
    graded = {(row["problem_id"], row["response"]): row["verdict"] for row in verdicts}
    pairs = rows_of(run.root / "preferences" / "pairs", "pairs")
    assert pairs
    for pair in pairs:
        assert graded[pair["problem_id"], pair["chosen"]] == "correct"
        assert graded[pair["problem_id"], pair["rejected"]] != "correct"
    for prompt in rows_of(run.root / "preferences" / "prompts", "prompts"):
        marks = [row["verdict"] == "correct" for row in verdicts if row["problem_id"] == prompt["problem_id"]]
        assert prompt["pass_rate"] == sum(marks) / len(marks)
        assert 0 < prompt["pass_rate"] < 1


def test_evaluation_asks_problems_that_nobody_was_trained_on(run: Run) -> None:
    asked = set(read_table(run.root / "evaluate-grpo" / "rollouts", "rollouts").column("question").to_pylist())
    assert asked == set(generate_problems(0, small.HELD_OUT, "heldout").column("question").to_pylist())
    for name in ("rollouts", "own-rollouts"):
        assert not asked & set(read_table(run.root / name, "rollouts").column("question").to_pylist())


# Training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_metrics_have_every_step_once(name: str, run: Run) -> None:
    metrics = list(read_metrics(run.root / name))
    assert [row["step"] for row in metrics if "loss" in row or "reward" in row] == list(range(1, TRAINED[name] + 1))
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert RunDirectory(run.root / name).closing_facts()["steps"] == TRAINED[name]


def test_the_first_losses_are_those_of_models_that_know_nothing_and_prefer_nothing(run: Run) -> None:
    vocabulary = Architecture.from_directory(run.model("base")).vocab_size
    first = {name: next(iter(read_metrics(run.root / name))) for name in TRAINED}
    # Random weights are near the uniform distribution over the vocabulary.
    assert first["midtrain"]["loss"] == pytest.approx(math.log(vocabulary), abs=0.2)
    # DPO starts at its own reference: -log sigma(0).
    assert first["dpo"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["grpo"]["temperature"] == 1.0


@pytest.mark.parametrize("name", STARTS_FROM)
def test_training_changes_every_weight_of_the_model_it_starts_from(name: str, run: Run) -> None:
    before = load_file(run.model(STARTS_FROM[name]) / "model.safetensors")
    after = load_file(run.model(name) / "model.safetensors")
    assert before.keys() == after.keys()
    unchanged = [key for key, tensor in before.items() if torch.equal(tensor, after[key])]
    assert unchanged == []


def test_without_one_right_answer_grpo_changes_nothing(run: Run) -> None:
    """Equal rewards in every group give no gradient: the weights stay to the bit."""
    assert all(row["pass_rate"] == 0 and row["kept"] == 0 for row in read_metrics(run.root / "grpo"))
    assert HFDirectory(run.model("grpo")).weights_hash() == HFDirectory(run.model("dpo")).weights_hash()


# Models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_plain_phi3_directory(name: str, run: Run) -> None:
    directory = run.model(name)
    config = json.loads((directory / "config.json").read_text())
    made = read_origin(directory)
    last = "grpo" if name == "release" else name
    if last == "base":
        assert made == Origin(single_turn=True)
    else:
        stage = run.config(last)
        assert (made.sequence_length, made.longrope) == (stage.sequence_length, stage.model.longrope)
        assert made.single_turn
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert "auto_map" not in config
    assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")  # tied


@pytest.fixture(scope="module")
def megatron_groups() -> Iterator[None]:
    from phimr_nemo.training.distributed import start_process_group, stop_process_group

    start_process_group(ParallelConfig(), seed=0)
    yield
    stop_process_group()


def reference(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        return model(ids).logits


def random_ids(directory: Path, length: int) -> torch.Tensor:
    vocabulary = Architecture.from_directory(directory).vocab_size
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(length))


# Lengths in LongRoPE's short and long regime; transformers chooses by the sequence, the trainer by the run's longest.
LENGTHS = (small.ORIGINAL_LENGTH, small.ROW)


@pytest.mark.usefixtures("megatron_groups")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_megatron_and_transformers_give_the_same_logits(name: str, length: int, run: Run) -> None:
    from native import empty_model, logits

    source, ids = HFDirectory(run.model(name)), random_ids(run.model(name), length)
    model = empty_model(source.architecture, max_length=length)
    load_tensors([model], source.architecture, source)
    assert (logits(model, ids) - reference(run.model(name), ids)).abs().max() < LOGIT_TOLERANCE


PREFIXES = {"midtrain": "module.", "sft": "module.", "dpo": ""}


@pytest.mark.usefixtures("megatron_groups")
@pytest.mark.parametrize("name", PREFIXES)
def test_the_exported_model_is_the_trained_one(name: str, run: Run) -> None:
    """Logits from the trainer's own checkpoint, which knows nothing of the export, equal the exported directory's."""
    from native import empty_model, load_checkpoint, logits

    prefix = PREFIXES[name]
    checkpoint = checkpoints(run.root / name / "checkpoints")[0] / NEMO_WEIGHTS
    directory = run.model(name)
    for length in LENGTHS:
        ids = random_ids(directory, length)
        model = empty_model(Architecture.from_directory(directory), max_length=length)
        load_checkpoint(model, checkpoint, prefix)
        trained = logits(model, ids)
        assert (trained - reference(directory, ids)).abs().max() < LOGIT_TOLERANCE
        # The test can fail: the model that the stage started from is another one.
        assert (trained - reference(run.model(STARTS_FROM[name]), ids)).abs().max() > 10 * LOGIT_TOLERANCE


def test_the_release_generates_in_transformers(run: Run) -> None:
    from transformers import AutoTokenizer, Phi3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(run.model("release"))
    model = Phi3ForCausalLM.from_pretrained(run.model("release"), trust_remote_code=False)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3+4?"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert written[0, : ids.shape[1]].tolist() == ids[0].tolist()
    assert written.shape[1] > ids.shape[1]
    assert HFDirectory(run.model("release")).weights_hash() == HFDirectory(run.model("grpo")).weights_hash()


# Results -----------------------------------------------------------------------------------------------------


def test_scores_are_the_graded_samples(run: Run) -> None:
    for name, _ in ROWS:
        result = json.loads((run.root / f"evaluate-{name}" / "results.json").read_text())
        verdicts = rows_of(run.root / f"evaluate-{name}" / "verdicts", "verdicts")
        assert len(verdicts) == small.HELD_OUT * small.SAMPLES
        assert (result["questions"], result["samples"]) == (small.HELD_OUT, small.SAMPLES)
        assert result["pass1"] == sum(row["verdict"] == "correct" for row in verdicts) / len(verdicts)


def test_the_table_has_a_row_a_stage(run: Run, tmp_path: Path) -> None:
    # An earlier report of the same seeds may lie there.
    seeds = tmp_path / "again"
    seeds.mkdir()
    (seeds / run.root.name).symlink_to(run.root)
    (seeds / f"{run.root.name}-loss.png").touch()
    write_report([seeds], tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    results = [
        (row, 0, small.HELD_OUT, json.loads((run.root / f"evaluate-{name}" / "results.json").read_text())["pass1"])
        for name, row in ROWS
    ]
    assert [(row["row"], row["seed"], row["n"], row["pass1"]) for row in table] == results
    assert "SFT without mid-training" in (tmp_path / "table.md").read_text()
    assert {"accuracy.png", "seed-0-loss.png", "seed-0-reward.png", "seed-0-data.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_card_of_the_release_lists_stages_and_scores(run: Run) -> None:
    card = (run.model("release") / "README.md").read_text()
    for name in ("midtrain", "sft", "dpo", "grpo"):
        assert f"| {name} | {TRAINED[name]} |" in card
    for _, row in ROWS[:-1]:
        assert f"| {row} |" in card
