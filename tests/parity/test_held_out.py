"""Held-out measures of DPO and GRPO: right, resumed exactly, and what `best` goes by; responses kept for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distributed import RanksFailed
from floor_runs import STEPS, go, make_inputs, same_weights, settings
from rollout_server import RolloutServer
from transformers import AutoModelForCausalLM

from phimr_nemo.align.dpo.pairs import Pairs, held_out_pairs, load_pairs
from phimr_nemo.align.dpo.validation import validation_batches
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.rows.batches import Row
from phimr_nemo.errors import UserError
from phimr_nemo.generate.serving.weights import LOGPROBS, UNSYNCED, Identity, tokenizer_hash
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.regime import LONG_WITH_ITS_LENGTH
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.store.shards import read_table
from phimr_nemo.training.metrics import Stage
from phimr_nemo.training.seal import checkpoint_step, checkpoints

VALIDATION = 6
BETA = 0.1
SEQUENCE = 256
GRADER = "even_length:grade"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grader's processes find the grader of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("held-out"))


def evaluation(every: int) -> list[str]:
    values = {
        "every": every,
        "samples": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 8,
        "grader": GRADER,
        "problems": "{kind: synthetic, count: 5, split: heldout}",
    }
    return [f"evaluation.{name}={value}" for name, value in values.items()]


WILD = ["optim.lr=0.05", "optim.min_lr=0.05", "optim.schedule=constant", "optim.warmup_fraction=0"]
"""Steps that are too large: the last weights are not the best."""
MEASURED: dict[Stage, tuple[str, list[str]]] = {
    "dpo": (
        "val_accuracy",
        [f"validation_pairs={VALIDATION}", "validate_every=1", "epochs=2", f"max_steps={STEPS}", *evaluation(2)],
    ),
    "grpo": ("pass1", [*evaluation(1), "monitor.responses_every=2", "monitor.responses=1000", "ahead=1",
                       "correction.kind=truncated", "correction.cap=2"]),
}  # fmt: skip


def held_out(stage: Stage, inputs: Path, output: Path, *more: str) -> list[str]:
    """A run that is judged by a held-out measure, and writes a checkpoint only where that says so, and at its end."""
    metric, measures = MEASURED[stage]
    best = ["checkpoint.best=true", f"checkpoint.metric={metric}", "checkpoint.keep=1"]
    overrides = [*settings(stage, inputs, output, *WILD), "checkpoint.every=100"]
    return [*overrides, *measures, *best, "tracking.wandb.project=held-out", "tracking.wandb.mode=offline", *more]


def rows_with(output: Path, name: str) -> dict[int, dict[str, Any]]:
    rows = [row for row in read_metrics(output) if name in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step was measured twice"
    return {row["step"]: row for row in rows}


def values(output: Path, *names: str) -> list[tuple[Any, ...]]:
    """What was measured, without times."""
    return [(row["step"], *(row.get(name) for name in names)) for row in read_metrics(output)]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Stage, Path]:
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        for stage in MEASURED:
            go(stage, held_out(stage, inputs, root / stage))
    return {stage: root / stage for stage in MEASURED}


@pytest.mark.parametrize("stage", MEASURED)
def test_the_best_by_a_held_out_measure_is_saved_kept_and_exported(
    stage: Stage, inputs: Path, whole: dict[Stage, Path], tmp_path: Path
) -> None:
    name = MEASURED[stage][0]
    measured = {step: row[name] for step, row in rows_with(whole[stage], name).items()}
    assert list(measured) == list(range(1, STEPS + 1))
    best = max(measured, key=lambda step: (measured[step], -step))
    assert best < STEPS, "the last step is the best: the test shows nothing"
    facts = RunDirectory(whole[stage]).closing_facts()
    assert (facts["steps"], facts["exported_step"]) == (STEPS, best)
    assert facts["measure"] == {"metric": name, "value": measured[best]}
    assert [checkpoint_step(path) for path in checkpoints(whole[stage] / "checkpoints")] == [STEPS, best]
    # Nothing that is measured has a say in the training: its weights are those of a run that ends there.
    ends = f"{'steps' if stage == 'grpo' else 'max_steps'}={best}"
    plain = [item for item in MEASURED[stage][1] if not item.startswith(("evaluation", "monitor", "validate_every"))]
    go(stage, [*settings(stage, inputs, tmp_path / "short", *WILD), *plain, ends])
    assert same_weights(whole[stage], tmp_path / "short")


@pytest.mark.parametrize("stage", MEASURED)
def test_a_run_that_is_stopped_measures_the_same_once(
    stage: Stage, inputs: Path, whole: dict[Stage, Path], tmp_path: Path
) -> None:
    """Told to stop after step 2, which is measured when the run continues."""
    output = tmp_path / "run"
    overrides = held_out(stage, inputs, output)
    assert go(stage, overrides, stop_after=2).preempted
    names = ("pass1", "pass1_stderr", "pass1_stopped", "val_loss", "val_accuracy", "loss", "lr")
    assert not [row for row in read_metrics(output) if row["step"] == 2 and MEASURED[stage][0] in row]
    go(stage, overrides)
    assert values(output, *names) == values(whole[stage], *names)
    assert same_weights(output, whole[stage])
    facts = [RunDirectory(path).closing_facts() for path in (output, whole[stage])]
    for name in ("exported_step", "measure", "steps"):
        assert facts[0][name] == facts[1][name]


def response_logprobs(model: Path, rows: Sequence[Row]) -> list[float]:
    """Sums over the response's tokens, by transformers."""
    network = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    sums = []
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.long)
        with torch.no_grad():
            logprobs = network(ids[None]).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[1:, None])[:, 0]
        sums.append(float(picked[torch.tensor(row.loss_mask[1:]).bool()].sum()))
    return sums


def test_the_validation_loss_is_that_of_the_exported_model(inputs: Path, whole: dict[Stage, Path]) -> None:
    """By transformers: mean over the held-out pairs of -log sigmoid of beta times the difference of log-ratios."""
    base, output = inputs / "align" / "base" / "hf", whole["dpo"]
    pairs = load_pairs(inputs / "align" / "pairs", load_tokenizer(base), SEQUENCE, "drop")
    training, validation = held_out_pairs(pairs, VALIDATION, 0)
    assert len(validation) == VALIDATION
    margins = [0.0] * len(validation)
    for sign, model in ((1, output / "hf"), (-1, base)):
        chosen = response_logprobs(model, [pairs.chosen[n] for n in validation])
        rejected = response_logprobs(model, [pairs.rejected[n] for n in validation])
        margins = [m + sign * BETA * (c - r) for m, c, r in zip(margins, chosen, rejected, strict=True)]
    exported = RunDirectory(output).closing_facts()["exported_step"]
    row = rows_with(output, "val_loss")[exported]
    assert row["val_loss"] == pytest.approx(fmean(math.log1p(math.exp(-m)) for m in margins), rel=1e-3)
    assert row["val_accuracy"] == pytest.approx(fmean(m > 0 for m in margins))
    assert row["val_margin"] == pytest.approx(fmean(margins), rel=1e-2, abs=1e-3)
    facts = RunDirectory(output).closing_facts()
    assert (facts["pairs"], facts["validation_pairs"]) == (len(training), VALIDATION)


@pytest.mark.parametrize("stage", MEASURED)
def test_pass1_is_what_the_written_responses_score(stage: Stage, whole: dict[Stage, Path]) -> None:
    """Recomputed from the file of each step: shares of right answers by question, and the error between questions."""
    rows = rows_with(whole[stage], "pass1")
    assert list(rows) == ([1, 2, 3, 4] if stage == "grpo" else [2, 4])
    texts = set()
    for step, row in rows.items():
        table = json.loads((whole[stage] / "evaluation" / f"step-{step:08d}.json").read_text("utf-8"))
        by_question: dict[str, list[bool]] = {}
        for response in table["responses"]:
            right = len(response["response"]) % 2 == 0
            assert response["verdict"] == ("correct" if right else "wrong")
            by_question.setdefault(response["problem_id"], []).append(right)
        shares = [fmean(each) for each in by_question.values()]
        assert [len(each) for each in by_question.values()] == [2] * 5
        assert row["pass1"] == pytest.approx(fmean(shares))
        variance = sum((share - fmean(shares)) ** 2 for share in shares) / (len(shares) - 1)
        assert row["pass1_stderr"] == pytest.approx(math.sqrt(variance / len(shares)))
        texts.add(json.dumps(table["responses"]))
    assert len(texts) == len(rows), "other weights answer otherwise"


def test_responses_are_kept_with_what_became_of_them(whole: dict[Stage, Path]) -> None:
    """All of a round are kept here, so they are the round's means."""
    rows = {row["step"]: row for row in read_metrics(whole["grpo"]) if "reward" in row}
    files = sorted((whole["grpo"] / "responses").iterdir())
    assert [file.name for file in files] == ["step-00000002.parquet", "step-00000004.parquet"]
    for file, step in zip(files, (2, 4), strict=True):
        kept = pq.read_table(file).to_pylist()
        assert len(kept) == 6 * 4
        assert fmean(row["reward"] for row in kept) == pytest.approx(rows[step]["reward"])
        assert fmean(row["verdict"] == "correct" for row in kept) == pytest.approx(rows[step]["pass_rate"])
        assert fmean(row["trained"] for row in kept) == pytest.approx(rows[step]["kept"])
        assert fmean(row["tokens"] for row in kept) == pytest.approx(rows[step]["response_length"])
        assert fmean(row["truncated"] for row in kept) == pytest.approx(rows[step]["truncated"])
        assert all(row["verdict"] == ("wrong" if len(row["response"]) % 2 else "correct") for row in kept)
        assert all(row["question"].startswith("Compute ") and row["answer"].isdigit() for row in kept)
    tables = list((whole["grpo"] / "wandb").glob("offline-run-*/files/media/table/responses_*.table.json"))
    assert len(tables) == 2


# ---- which pairs are held out ------------------------------------------------------------------------------


def pairs_of(*questions: str) -> Pairs:
    return Pairs([None] * len(questions), [None] * len(questions), questions=questions)  # type: ignore[list-item]


def test_no_question_is_trained_on_and_validated_with() -> None:
    pairs = pairs_of(*"aabbbcddeeeef")
    for count in range(1, 10):
        training, validation = held_out_pairs(pairs, count, seed=1)
        assert sorted([*training, *validation]) == list(range(13))
        assert not {pairs.questions[n] for n in training} & {pairs.questions[n] for n in validation}
        # One question fewer would not be enough.
        sizes = [pairs.questions.count(question) for question in {pairs.questions[n] for n in validation}]
        assert len(validation) >= count > len(validation) - max(sizes)
    assert held_out_pairs(pairs, 0, seed=1) == (list(range(13)), [])
    assert held_out_pairs(pairs, 5, seed=1) != held_out_pairs(pairs, 5, seed=2)


def test_the_choice_does_not_depend_on_the_order_of_the_pairs() -> None:
    one, other = pairs_of(*"abcdefgh"), pairs_of(*"hgfedcba")
    found = [{pairs.questions[n] for n in held_out_pairs(pairs, 3, 0)[1]} for pairs in (one, other)]
    assert found[0] == found[1]


def test_validation_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"validation_pairs=2 of 3 pairs, of 1 questions"):
        held_out_pairs(pairs_of("a", "a", "a"), 2, seed=0)


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (8, [8]), (15, [15]), (16, [8, 8]), (17, [9, 8])])
def test_every_validation_batch_is_large_enough_for_the_ranks(count: int, sizes: list[int]) -> None:
    batches = validation_batches(list(range(count)), 8)
    assert [len(batch) for batch in batches] == sizes
    assert [number for batch in batches for number in batch] == list(range(count))


@pytest.mark.parametrize("stage", MEASURED)
def test_questions_that_are_trained_on_are_not_held_out(stage: Stage, inputs: Path, tmp_path: Path) -> None:
    question = read_table(inputs / "align" / "prompts", "prompts", ["question"])["question"][3].as_py()
    rows = [{"question": text, "answer": "1"} for text in ("What is 3?", question)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    problems = f"evaluation.problems={{kind: file, path: {tmp_path / 'problems.jsonl'}}}"
    overrides = [item for item in evaluation(1) if "problems" not in item]
    with pytest.raises(RanksFailed, match=r"1 of 2 questions of evaluation\.problems are trained on"):
        go(stage, [*settings(stage, inputs, tmp_path / "run"), *overrides, problems])


# ---- engines -----------------------------------------------------------------------------------------------


def server_of(base: Path, sequence_length: int) -> RolloutServer:
    """A server as `phimr serve BASE --max-length SEQUENCE_LENGTH` starts it."""
    known = HFDirectory(base).weights_hash(), tokenizer_hash(base)
    return RolloutServer(base, Identity(*known, UNSYNCED, sequence_length, LONG_WITH_ITS_LENGTH, LOGPROBS))


def written(output: Path) -> list[Any]:
    return [json.loads(path.read_text("utf-8"))["responses"] for path in sorted((output / "evaluation").iterdir())]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_servers_answer_as_the_built_in_engine_does(stage: Stage, inputs: Path, tmp_path: Path) -> None:
    """They are sent the weights of every step that is evaluated."""
    base = inputs / ("align" if stage == "dpo" else "supervised") / "base" / "hf"
    common = [*evaluation(2), f"sequence_length={SEQUENCE}", "checkpoint.every=100"]
    go(stage, settings(stage, inputs, tmp_path / "local", *common))
    with server_of(base, SEQUENCE) as server:
        engine = {
            "kind": "vllm_server",
            "base_urls": f"[{server.url}]",
            "in_flight": 4,
            "request_seconds": 60,
            "attempts": 4,
            "probe_seconds": 0.2,
            "recovery_seconds": 60,
            "bucket_mb": 1,
        }
        asked = [f"evaluation.engine.{name}={value}" for name, value in engine.items()]
        go(stage, settings(stage, inputs, tmp_path / "served", *common, *asked))
        assert server.answered == 2 * 2 * 5
    assert written(tmp_path / "served") == written(tmp_path / "local")
    assert written(tmp_path / "local")[0] != written(tmp_path / "local")[1]
    assert same_weights(tmp_path / "served", tmp_path / "local")
