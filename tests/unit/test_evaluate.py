"""Evaluation: the summary against numbers counted by hand, and a whole run on a model that knows half the answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from phimr_nemo.config import EvaluateConfig, parse_config
from phimr_nemo.data.chat import render_conversation, stop_token_ids
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import SCORED_COLUMNS, Result, evaluate_model, read_result, summarise, write_result
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import read_manifest, read_table, rows_to_table
from phimr_nemo.verify import grade

# One letter a response: Correct, Wrong, Unparsable, Timeout; lower case: cut off at the limit.
QUESTIONS = {
    "q1": ("elementary", "CCCW"),
    "q2": ("elementary", "CWWw"),
    "q3": ("college", "WWuu"),
    "q4": (None, "CCTW"),
}
VERDICTS = {"C": "correct", "W": "wrong", "U": "unparsable", "T": "timeout"}


def verdict_table() -> pa.Table:
    rows = [
        {
            "problem_id": question,
            "difficulty": difficulty,
            "verdict": VERDICTS[letter.upper()],
            "extracted": {"C": "right", "W": "7", "U": "", "T": "long"}[letter.upper()],
            "finish_reason": "length" if letter.islower() else "stop",
            "tokens": 10 + index,
        }
        for question, (difficulty, letters) in QUESTIONS.items()
        for index, letter in enumerate(letters)
    ]
    return pa.table({name: [row[name] for row in rows] for name in SCORED_COLUMNS})


def test_the_summary_counts_right() -> None:
    got = summarise(verdict_table())
    accuracies = {"q1": 3 / 4, "q2": 1 / 4, "q3": 0.0, "q4": 2 / 4}
    mean = sum(accuracies.values()) / 4
    spread = math.sqrt(sum((a - mean) ** 2 for a in accuracies.values()) / 3)
    assert (got.questions, got.samples) == (4, 4)
    assert got.per_question == accuracies
    assert got.pass1 == pytest.approx(mean)
    assert got.stderr == pytest.approx(spread / math.sqrt(4))
    assert set(got.pass_at_k) == {1, 2, 4}
    for k in got.pass_at_k:
        solved = [
            any(letter == "C" for letter in draw)
            for _, letters in QUESTIONS.values()
            for draw in itertools.combinations(letters, k)
        ]
        assert got.pass_at_k[k] == pytest.approx(sum(solved) / len(solved))
    # q1: right 3 to 1. q2: "7" 3 to 1. q3: "7", the cut ones have no answer. q4: right 2 to 1 to 1.
    assert got.majority == pytest.approx(2 / 4)
    # One draw is the accuracy, four are the vote of all.
    assert got.majority_at_k is not None
    assert got.majority_at_k[1] == pytest.approx(mean)
    assert got.majority_at_k[4] == pytest.approx(got.majority)
    # Pairs: q1 CC 3, CW 3; q2 CW 3, WW 3; q3 none right; q4 CC 1, CT 2, CW 2, TW 1.
    assert got.majority_at_k[2] == pytest.approx(((3 + 1.5) + 1.5 + 0 + (1 + 1 + 1)) / 6 / 4)
    # Lengths 10, 11, 12, 13 in each of the four questions.
    assert got.lengths is not None
    assert got.lengths.known == 16
    assert got.lengths.quantiles == {0.1: 10, 0.5: 11, 0.9: 13, 0.99: 13, 1.0: 13}
    assert got.lengths.correct == pytest.approx((10 + 11 + 12 + 10 + 10 + 11) / 6)
    # 2^3 <= 10, 11 < 2^3.5 <= 12, 13: classes of half a doubling.
    assert {place: count for place, count in enumerate(got.lengths.bins) if count} == {6: 8, 7: 8}
    assert got.truncated == pytest.approx(3 / 16)
    assert got.stopped == pytest.approx(13 / 16)
    assert got.unparsable == pytest.approx(2 / 16)
    assert got.ungraded == pytest.approx(1 / 16)
    assert got.mean_tokens == pytest.approx(11.5)
    # (3/4, 1/4): sd sqrt(1/8) over sqrt(2).
    assert dataclasses.astuple(got.by_difficulty["elementary"]) == pytest.approx((2, 0.5, 0.25))
    assert got.by_difficulty["college"].pass1 == 0.0
    assert math.isnan(got.by_difficulty["college"].stderr)
    assert got.by_difficulty["unknown"].pass1 == 0.5


def test_gold_answers_that_cannot_be_read_are_counted_apart() -> None:
    rows = verdict_table().to_pylist()
    rows[0]["verdict"] = "gold_unreadable"
    got = summarise(pa.Table.from_pylist(rows))
    assert got.gold_unreadable == pytest.approx(1 / 16)
    assert got.ungraded == pytest.approx(2 / 16)
    assert got.unparsable == pytest.approx(2 / 16)


def test_the_result_reads_back(tmp_path: Path) -> None:
    result = summarise(verdict_table())
    write_result(tmp_path / "results.json", result, {"samples": 4})
    text = (tmp_path / "results.json").read_text()
    values = json.loads(text, parse_constant=pytest.fail)
    assert values["by_difficulty"]["college"]["stderr"] is None
    assert values["settings"] == {"samples": 4}
    back = read_result(tmp_path / "results.json")
    assert math.isnan(back.by_difficulty["college"].stderr)
    assert _comparable(back) == _comparable(result)


def test_unknown_lengths_are_left_out() -> None:
    table = verdict_table()
    some = table.set_column(
        table.schema.get_field_index("tokens"), "tokens", pa.array([-1] * 12 + [7, 7, 9, 9], pa.int64())
    )
    got = summarise(some)
    assert got.mean_tokens == 8.0
    assert got.lengths is not None
    assert (got.lengths.known, got.lengths.quantiles[0.5]) == (4, 7)
    none = table.set_column(table.schema.get_field_index("tokens"), "tokens", pa.array([-1] * 16, pa.int64()))
    assert summarise(none).lengths is None
    assert math.isnan(summarise(none).mean_tokens)


def _comparable(result: Result) -> str:
    """NaN is unequal to itself; its text is not."""
    return json.dumps(dataclasses.asdict(result), sort_keys=True)


def problem(question: str, answer: str, difficulty: str) -> dict[str, Any]:
    return {
        "id": content_id(question),
        "source": "test",
        "question": question,
        "answer": answer,
        "solution": None,
        "domain": None,
        "difficulty": difficulty,
        "metadata": "{}",
    }


# What the model will have learnt to answer, and the gold answer.
LEARNT = {"3+4?": ("7", "7"), "9-5?": ("4", "4"), "6+2?": ("9", "8"), "8-8?": ("1", "0")}


@pytest.fixture(scope="module")
def problems() -> pa.Table:
    rows = [problem(q, gold, "middle" if "+" in q else "college") for q, (_, gold) in LEARNT.items()]
    return rows_to_table(rows, "problems")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has memorised one response to each question, two of them right."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = build_tokenizer(synthetic_corpus(), vocab_size=300, system_prompt="Hi")
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        partial_rotary_factor=0.5,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    responses = {question: f"It is \\boxed{{{said}}}." for question, (said, _) in LEARNT.items()}
    batch = [render_conversation(tokenizer, question, response) for question, response in responses.items()]
    ids = torch.tensor([ids for ids, _ in batch])
    labels = ids.masked_fill(torch.tensor([mask for _, mask in batch]) == 0, -100)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.01
    directory = tmp_path_factory.mktemp("model") / "hf"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def configured(model_dir: Path, out_dir: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "run": {"output": str(out_dir), "seed": 0},
        "model": str(model_dir),
        "problems": {"kind": "file", "path": "unused.jsonl"},
        "samples": 2,
        "prompt": "{question}",
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 24,
        "engine": {"kind": "local", "max_batch": 8, "dtype": "fp32"},
        "shard_questions": 4,
    }
    return parse_config(EvaluateConfig, {**values, **changes})


def run(model_dir: Path, problems: pa.Table, out_dir: Path, **changes: Any) -> Result:
    return evaluate_model(configured(model_dir, out_dir, **changes), problems, {"benchmark": "four"})


def test_a_model_that_knows_half_the_answers_scores_half(model_dir: Path, problems: pa.Table, tmp_path: Path) -> None:
    got = run(model_dir, problems, tmp_path / "out")
    assert got.per_question == {content_id(q): float(said == gold) for q, (said, gold) in LEARNT.items()}
    assert (got.pass1, got.majority, got.stopped, got.truncated) == (0.5, 0.5, 1.0, 0.0)
    # Four questions, two right: sd of (1, 1, 0, 0) over sqrt(4); samples of one question add nothing.
    assert got.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert {name: score.pass1 for name, score in got.by_difficulty.items()} == {"middle": 0.5, "college": 0.5}
    rows = read_table(tmp_path / "out" / "verdicts", "verdicts").to_pylist()
    assert len(rows) == 2 * len(LEARNT)
    for row in rows:
        assert row["response"] == f"It is \\boxed{{{LEARNT[row['question']][0]}}}."
        again = grade(row["response"], row["answer"])
        assert (row["verdict"], row["extracted"]) == (again.verdict, again.extracted)
    assert read_manifest(tmp_path / "out" / "verdicts", "verdicts").counts == {"correct": 4, "wrong": 4}
    assert _comparable(read_result(tmp_path / "out" / "results.json")) == _comparable(got)


def test_short_answers_are_counted_as_truncated(model_dir: Path, problems: pa.Table, tmp_path: Path) -> None:
    got = run(model_dir, problems, tmp_path / "out", max_new_tokens=3)
    assert (got.pass1, got.truncated, got.mean_tokens) == (0.0, 1.0, 3.0)


def test_a_rerun_changes_nothing_and_other_settings_are_refused(
    model_dir: Path, problems: pa.Table, tmp_path: Path
) -> None:
    first = run(model_dir, problems, tmp_path / "out")
    files = {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()}
    assert _comparable(run(model_dir, problems, tmp_path / "out")) == _comparable(first)
    assert {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()} == files
    with pytest.raises(UserError, match="temperature"):
        run(model_dir, problems, tmp_path / "out", temperature=0.5)


def test_a_changed_model_is_not_given_the_old_score(model_dir: Path, problems: pa.Table, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    changed = tmp_path / "changed"
    shutil.copytree(model_dir, changed)
    run(changed, problems, tmp_path / "out")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="teacher"):
        run(changed, problems, tmp_path / "out")


def test_grading_continues_with_the_shards_that_are_missing(
    model_dir: Path, problems: pa.Table, tmp_path: Path
) -> None:
    run(model_dir, problems, tmp_path / "out", shard_questions=1)
    verdicts = tmp_path / "out" / "verdicts"
    whole, counts = read_table(verdicts, "verdicts"), read_manifest(verdicts, "verdicts").counts
    for name in ("manifest.json", "part-00002.json"):
        (verdicts / name).unlink()
    kept = (verdicts / "part-00001.parquet").stat().st_mtime_ns
    run(model_dir, problems, tmp_path / "out", shard_questions=1)
    assert read_table(verdicts, "verdicts") == whole
    assert read_manifest(verdicts, "verdicts").counts == counts
    assert (verdicts / "part-00001.parquet").stat().st_mtime_ns == kept


def test_stop_ids_are_the_tokenizers(model_dir: Path, problems: pa.Table, tmp_path: Path) -> None:
    from phimr_nemo.data.chat import load_tokenizer

    run(model_dir, problems, tmp_path / "out")
    rows = read_table(tmp_path / "out" / "rollouts", "rollouts").to_pylist()
    tokenizer = load_tokenizer(model_dir)
    for row in rows:
        ids, mask = render_conversation(tokenizer, row["question"], row["response"])
        assert ids[-1] in stop_token_ids(tokenizer)
        assert row["tokens"] == sum(mask)
