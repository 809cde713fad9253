"""The stages curate and pack on real directories: right files, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from phimr_nemo.config import CurateConfig, PackConfig, load_config
from phimr_nemo.data.chat import render_conversation
from phimr_nemo.data.stage import run_curate, run_pack
from phimr_nemo.data.synthetic import generate_problems
from phimr_nemo.data.teacher import teacher_rollouts
from phimr_nemo.data.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.store import finish, read_manifest, read_table, rows_to_table, write_shard


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(synthetic_corpus()).save_pretrained(directory)
    return directory


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    rows = teacher_rollouts(generate_problems(1, 120, "train"), 4, 1, 0.4).to_pylist()
    graded = [
        {
            **row,
            "tokens": len(row["response"]),
            "verdict": "correct" if f"\\boxed{{{row['answer']}}}" in row["response"] else "wrong",
            **dict.fromkeys(("extracted", "reason", "grader"), ""),
        }
        for row in rows
    ]
    directory = tmp_path / "verdicts"
    for index in range(2):
        write_shard(
            directory, index, rows_to_table(graded[index * 240 : index * 240 + 240], "verdicts"), kind="verdicts"
        )
    finish(directory, kind="verdicts", config={})
    return directory


def curate_config(repository: Path, verdicts: Path, output: Path, *overrides: str) -> CurateConfig:
    own = [f"verdicts={verdicts}", f"run.output={output}", *overrides]
    return load_config(CurateConfig, repository / "conf" / "curate" / "paper.yaml", own)


def pack_config(repository: Path, conversations: Path, tokenizer: Path, output: Path, length: int) -> PackConfig:
    own = [
        f"conversations={conversations}",
        f"tokenizer={tokenizer}",
        f"run.output={output}",
        f"sequence_length={length}",
    ]
    return load_config(PackConfig, repository / "conf" / "pack" / "tiny.yaml", own)


def test_curate_writes_every_set_and_repeats_nothing(repository: Path, verdicts: Path, tmp_path: Path) -> None:
    config = curate_config(repository, verdicts, tmp_path / "curated")
    facts = run_curate(config)
    assert set(facts) == {"midtrain", "sft", "pairs", "prompts"}
    rows = read_table(verdicts, "verdicts").to_pylist()
    right = {(row["problem_id"], row["response"]) for row in rows if row["verdict"] == "correct"}
    kept = read_table(tmp_path / "curated" / "midtrain", "conversations").to_pylist()
    assert {(row["problem_id"], row["response"]) for row in kept} == right
    counts = read_manifest(tmp_path / "curated" / "midtrain", "conversations").counts
    assert sum(counts.values()) + len(kept) == len(rows)
    sft = read_table(tmp_path / "curated" / "sft", "conversations")
    assert set(sft["difficulty"].to_pylist()) == {"high_school", "college"}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "curated").rglob("*.*")}
    assert run_curate(config) == facts
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "curated").rglob("*.*")} == files


def test_curate_refuses_an_empty_set_and_unfinished_input(repository: Path, verdicts: Path, tmp_path: Path) -> None:
    nothing = curate_config(repository, verdicts, tmp_path / "a", "prompts.min_pass=0.99")
    with pytest.raises(UserError, match=r"the prompts set .* would be empty; dropped: .*prompt too hard"):
        run_curate(nothing)
    assert not (tmp_path / "a" / "prompts").exists()
    with pytest.raises(UserError, match="does not exist"):
        run_curate(curate_config(repository, tmp_path / "none", tmp_path / "b"))
    no_set = dataclasses.replace(nothing, midtrain=None, sft=None, pairs=None, prompts=None)
    with pytest.raises(UserError, match="neither midtrain"):
        run_curate(no_set)


def test_pack_holds_every_conversation_once(
    repository: Path, verdicts: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    from phimr_nemo.data.chat import load_tokenizer

    run_curate(curate_config(repository, verdicts, tmp_path / "curated"))
    conversations = tmp_path / "curated" / "midtrain"
    capacity = 90
    config = pack_config(repository, conversations, tokenizer_directory, tmp_path / "rows", capacity)
    facts = run_pack(config)
    tokenizer = load_tokenizer(tokenizer_directory)
    rendered = [
        render_conversation(tokenizer, row["question"], row["response"])
        for row in read_table(conversations, "conversations").to_pylist()
    ]
    expected = sorted((ids, mask) for ids, mask in rendered if len(ids) <= capacity)
    found = []
    rows = read_table(tmp_path / "rows", "rows").to_pylist()
    for row in rows:
        start = 0
        for length in row["document_lengths"]:
            found.append((row["input_ids"][start : start + length], row["loss_mask"][start : start + length]))
            start += length
        assert start == len(row["input_ids"]) <= capacity
    assert sorted(found) == expected
    assert facts["dropped: longer than a row"] == len(rendered) - len(expected) > 0
    assert facts["documents"] == len(expected)
    assert facts["empty share"] == pytest.approx(1 - sum(len(ids) for ids, _ in expected) / (len(rows) * capacity))


def test_an_interrupted_pack_continues_and_ends_with_the_same_files(
    repository: Path, verdicts: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    run_curate(curate_config(repository, verdicts, tmp_path / "curated"))
    table = read_table(tmp_path / "curated" / "midtrain", "conversations")
    conversations = tmp_path / "two"
    for index in range(2):
        write_shard(conversations, index, table.slice(index * 100, 100), kind="conversations")
    finish(conversations, kind="conversations", config={})
    whole = pack_config(repository, conversations, tokenizer_directory, tmp_path / "whole", 256)
    facts = run_pack(whole)
    part = pack_config(repository, conversations, tokenizer_directory, tmp_path / "part", 256)
    run_pack(part)
    # As if killed between the two shards.
    for name in ("manifest.json", "part-00001.json", "part-00001.parquet", "counts-00001.json"):
        (tmp_path / "part" / name).unlink()
    first = (tmp_path / "part" / "part-00000.parquet").stat().st_mtime_ns
    assert run_pack(part) == facts
    assert (tmp_path / "part" / "part-00000.parquet").stat().st_mtime_ns == first
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text("utf-8")) for name in ("whole", "part")]
    assert manifests[0]["shards"] == manifests[1]["shards"]
    assert manifests[0]["counts"] == manifests[1]["counts"]


def test_pack_refuses_rows_too_short_for_everything(
    repository: Path, verdicts: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    run_curate(curate_config(repository, verdicts, tmp_path / "curated"))
    config = pack_config(repository, tmp_path / "curated" / "midtrain", tokenizer_directory, tmp_path / "rows", 8)
    with pytest.raises(UserError, match=r"no conversation of .* can be packed"):
        run_pack(config)
