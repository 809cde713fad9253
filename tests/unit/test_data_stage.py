"""The stages curate and pack on real directories: right files, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import CurateConfig, PackConfig, ShardConfig, load_config
from phimr_nemo.data.chat import render_conversation
from phimr_nemo.data.curate.stage import run_curate
from phimr_nemo.data.rows.stage import run_pack
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.store.check import check_directory, forget_damaged
from phimr_nemo.store.content import content_id
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import finish, read_manifest, read_table, rows_to_table, write_shard

KIND_OF: dict[str, Kind] = {
    "midtrain": "conversations",
    "sft": "conversations",
    "pairs": "pairs",
    "prompts": "prompts",
}


TEACHERS = ("large", "small")
DELTA = ("pairs.delta.strong=large", "pairs.delta.weak=small")


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
            "teacher": TEACHERS[row["sample_index"] % 2],
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
    own = [f"verdicts={verdicts}", f"run.output={output}", "workers=1", *overrides]
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
    config = curate_config(repository, verdicts, tmp_path / "curated", "prompts.max_length_spread=null")
    facts = run_curate(config)
    assert set(facts) == {"midtrain", "sft", "pairs", "prompts"}
    rows = read_table(verdicts, "verdicts").to_pylist()
    right = {(row["problem_id"], row["response"]) for row in rows if row["verdict"] == "correct"}
    kept = read_table(tmp_path / "curated" / "midtrain", "conversations").to_pylist()
    assert {(row["problem_id"], row["response"]) for row in kept} == right
    assert [row["id"] for row in kept] == [
        content_id("conversation", row["id"]) for row in rows if content_id("conversation", row["id"]) in ids_of(kept)
    ]
    sft = read_table(tmp_path / "curated" / "sft", "conversations")
    assert set(sft["difficulty"].to_pylist()) == {"high_school", "college"}
    marks: dict[str, list[bool]] = {row["problem_id"]: [] for row in rows}
    for row in rows:
        marks[row["problem_id"]].append(row["verdict"] == "correct")
    prompts = read_table(tmp_path / "curated" / "prompts", "prompts").to_pylist()
    rates = {name: sum(mark) / len(mark) for name, mark in marks.items() if 0 < sum(mark) < len(mark)}
    assert {row["problem_id"]: row["pass_rate"] for row in prompts} == rates
    assert all(row["hard"] == (row["pass_rate"] < 0.5) for row in prompts)
    # The order is that of the problems in the verdicts.
    assert [row["problem_id"] for row in prompts] == [name for name in marks if name in rates]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "curated").rglob("*.*")}
    assert run_curate(config) == facts
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "curated").rglob("*.*")} == files


def ids_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["id"] for row in rows}


def test_what_is_kept_and_dropped_sums_to_what_came_in(repository: Path, verdicts: Path, tmp_path: Path) -> None:
    config = curate_config(repository, verdicts, tmp_path / "curated", "sft.size=20", "pairs.max_per_problem=1")
    facts = run_curate(config)
    rollouts = read_table(verdicts, "verdicts")
    problems = len(set(rollouts["problem_id"].to_pylist()))
    for name, came_in, of_a_row in (
        ("midtrain", rollouts.num_rows, 1),
        ("sft", rollouts.num_rows, 1),
        ("pairs", rollouts.num_rows, 2),
        ("prompts", problems, 1),
    ):
        counts = read_manifest(tmp_path / "curated" / name, KIND_OF[name]).counts
        dropped = sum(count for reason, count in counts.items() if reason.startswith("dropped: "))
        assert facts[name] * of_a_row + dropped == came_in
        assert counts["input: problems" if name == "prompts" else "input: rollouts"] == came_in
    assert facts["sft"] == 20
    shapes = json.loads((tmp_path / "curated" / "midtrain" / "shape.json").read_text("utf-8"))
    assert sum(map(sum, shapes["kept"])) == facts["midtrain"]
    of_pairs = json.loads((tmp_path / "curated" / "pairs" / "shape.json").read_text("utf-8"))
    assert sum(of_pairs["chosen"]) == sum(of_pairs["rejected"]) == facts["pairs"]


def sets_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: read_table(directory / name, kind).to_pylist() for name, kind in KIND_OF.items()}


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets and shards of a few rows, so that every table here has many."""
    monkeypatch.setattr("phimr_nemo.data.outofcore.GROUP_ROWS", 50)
    monkeypatch.setattr("phimr_nemo.data.curate.survey.READ_ROWS", 7)
    monkeypatch.setattr("phimr_nemo.data.curate.narrow.BATCH_ROWS", 7)
    monkeypatch.setattr("phimr_nemo.data.curate.sets.MAX_SHARD_ROWS", 11)
    monkeypatch.setattr("phimr_nemo.data.curate.sets.MAX_SHARD_BYTES", 1500)


def test_buckets_shards_and_workers_change_nothing(
    repository: Path, verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_curate(curate_config(repository, verdicts, tmp_path / "whole"))
    run_curate(curate_config(repository, verdicts, tmp_path / "processes", "workers=2"))
    small_shards(monkeypatch)
    run_curate(curate_config(repository, verdicts, tmp_path / "cut"))
    whole = sets_of(tmp_path / "whole")
    assert sets_of(tmp_path / "processes") == whole
    assert sets_of(tmp_path / "cut") == whole
    assert len(read_manifest(tmp_path / "cut" / "pairs", "pairs").shards) > 5


@pytest.mark.parametrize("mode", ["near_miss", "random", "delta"])
def test_the_order_of_rollouts_changes_no_set(repository: Path, verdicts: Path, tmp_path: Path, mode: str) -> None:
    """Rollouts of a problem scattered over shards and directories, as several sampling rounds leave them."""
    rows = read_table(verdicts, "verdicts").to_pylist()
    random.Random(0).shuffle(rows)
    for name, part in (("one", rows[:200]), ("two", rows[200:])):
        for index in range(2):
            shard = rows_to_table(part[index::2], "verdicts")
            write_shard(tmp_path / name, index, shard, kind="verdicts")
        finish(tmp_path / name, kind="verdicts", config={})
    joined = f"verdicts=[{tmp_path / 'one'},{tmp_path / 'two'}]"
    mine = [f"pairs.mode={mode}", *(DELTA if mode == "delta" else ())]
    run_curate(curate_config(repository, verdicts, tmp_path / "whole", *mine))
    run_curate(curate_config(repository, verdicts, tmp_path / "scattered", *mine, joined))
    whole, scattered = sets_of(tmp_path / "whole"), sets_of(tmp_path / "scattered")
    for name in whole:
        by_id = [sorted(rows, key=lambda row: row["id"]) for rows in (whole[name], scattered[name])]
        assert [row["id"] for row in by_id[0]] == [row["id"] for row in by_id[1]]
        assert [{**row, "length_spread": 0} for row in by_id[0]] == [{**row, "length_spread": 0} for row in by_id[1]]


LOOSE = ("pairs.max_length_ratio=null", "pairs.max_repetition=1", "pairs.difficulties=null")


def test_delta_pairs_are_a_strong_models_response_beside_a_weak_ones(
    repository: Path, verdicts: Path, tmp_path: Path
) -> None:
    """Two responses of each teacher to a question: no possible pair is left out, and no text is both sides."""
    rows = read_table(verdicts, "verdicts").to_pylist()
    of: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        side = of.setdefault((row["problem_id"], row["teacher"]), {})
        if row["finish_reason"] == "stop":
            side[row["response"]] = row["verdict"]
    problems = {row["problem_id"] for row in rows}
    for graded in (False, True):
        out = tmp_path / f"graded-{graded}"
        only = ("midtrain=null", "sft=null", "prompts=null", "pairs.mode=delta", f"pairs.delta.by_verdict={graded}")
        run_curate(curate_config(repository, verdicts, out, *only, *DELTA, *LOOSE))
        pairs = read_table(out / "pairs", "pairs").to_pylist()
        for problem in problems:
            strong, weak = (of[problem, teacher] for teacher in TEACHERS)
            right = [text for text, name in strong.items() if name == "correct" or not graded]
            wrong = [text for text, name in weak.items() if name != "correct" or not graded]
            mine = [(pair["chosen"], pair["rejected"]) for pair in pairs if pair["problem_id"] == problem]
            could_be = {(one, other) for one in right for other in wrong if one != other}
            assert set(mine) <= could_be
            assert len({one for one, _ in mine}) == len({other for _, other in mine}) == len(mine)
            assert not {(one, other) for one, other in could_be if all(one != a and other != b for a, b in mine)}
        assert {(pair["mode"], pair["chosen_teacher"], pair["rejected_teacher"]) for pair in pairs} == {
            ("delta", *TEACHERS)
        }
        counts = read_manifest(out / "pairs", "pairs").counts
        dropped = sum(count for reason, count in counts.items() if reason.startswith("dropped: "))
        assert 2 * len(pairs) + dropped == len(rows)
    assert {pair["chosen_verdict"] for pair in pairs} == {"correct"}
    assert {pair["rejected_verdict"] for pair in pairs} == {"wrong"}


def test_a_teacher_of_no_rollout_is_named_with_those_there_are(
    repository: Path, verdicts: Path, tmp_path: Path
) -> None:
    mine = ("pairs.mode=delta", "pairs.delta.strong=large", "pairs.delta.weak=huge")
    with pytest.raises(UserError, match=r"(?s)no rollout of huge.*large, small.*verdicts="):
        run_curate(curate_config(repository, verdicts, tmp_path / "out", *mine))


@pytest.mark.parametrize(
    "mine",
    [("pairs.mode=delta",), DELTA, ("pairs.mode=delta", "pairs.delta.strong=large", "pairs.delta.weak=large")],
    ids=["no delta", "another mode", "one model"],
)
def test_a_delta_names_two_models(mine: tuple[str, ...], repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weak"):
        curate_config(repository, tmp_path, tmp_path / "out", *mine)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "half"])
@pytest.mark.parametrize("name", ["midtrain", "sft", "pairs", "prompts"])
def test_only_the_damaged_shard_of_a_set_is_made_again(
    name: str, damage: str, repository: Path, verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch)
    config = curate_config(repository, verdicts, tmp_path / "curated")
    facts = run_curate(config)
    before = sets_of(tmp_path / "curated")
    directory = tmp_path / "curated" / name
    assert len(list(directory.glob("part-*.parquet"))) > 2
    spoil(directory / "part-00001.parquet", damage)
    with pytest.raises(UserError, match=r"(?s)part-00001\.parquet.*phimr data check"):
        sets_of(tmp_path / "curated")
    kept = mtimes(tmp_path / "curated", "part-*.parquet", but=directory / "part-00001.parquet")
    redo(directory)
    assert run_curate(config) == facts
    assert sets_of(tmp_path / "curated") == before
    assert mtimes(tmp_path / "curated", "part-*.parquet", but=directory / "part-00001.parquet") == kept


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "half":
        # The file stands, the sidecar was never written.
        path.write_bytes(data[:-1])
        path.with_suffix(".json").unlink()
    else:
        path.unlink()


def mtimes(directory: Path, pattern: str, *, but: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob(pattern) if path != but}


def redo(directory: Path) -> None:
    (found,) = check_directory(directory)
    assert found.shards == ["part-00001.parquet"]
    forget_damaged(found)


def test_a_damaged_survey_is_made_again_and_a_damaged_verdict_named(
    repository: Path, verdicts: Path, tmp_path: Path
) -> None:
    config = curate_config(repository, verdicts, tmp_path / "curated")
    facts = run_curate(config)
    narrow = tmp_path / "curated" / "survey" / "narrow-00000.parquet"
    whole = narrow.read_bytes()
    for data in (whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        narrow.write_bytes(data)
        (tmp_path / "curated" / "sft" / "manifest.json").unlink()
        assert run_curate(config) == facts
        assert narrow.read_bytes() == whole
    spoil(verdicts / "part-00001.parquet", "flip")
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        run_curate(curate_config(repository, verdicts, tmp_path / "other"))


def test_a_set_of_other_verdicts_is_made_again(repository: Path, verdicts: Path, tmp_path: Path) -> None:
    config = curate_config(repository, verdicts, tmp_path / "curated")
    before = run_curate(config)
    rows = read_table(verdicts, "verdicts").to_pylist()
    for row in rows[:100]:
        row["verdict"] = "wrong"
    write_shard(verdicts, 0, rows_to_table(rows[:240], "verdicts"), kind="verdicts")
    finish(verdicts, kind="verdicts", config={"again": True})
    after = run_curate(config)
    assert after["midtrain"] < before["midtrain"]
    run_curate(curate_config(repository, verdicts, tmp_path / "new"))
    assert sets_of(tmp_path / "curated") == sets_of(tmp_path / "new")


def test_curate_refuses_an_empty_set_and_unfinished_input(repository: Path, verdicts: Path, tmp_path: Path) -> None:
    nothing = curate_config(repository, verdicts, tmp_path / "a", "prompts.min_pass=0.99")
    with pytest.raises(UserError, match=r"the prompts set .* would be empty; dropped: .*prompt too hard"):
        run_curate(nothing)
    assert not (tmp_path / "a" / "prompts").exists()
    with pytest.raises(UserError, match="does not exist"):
        run_curate(curate_config(repository, tmp_path / "none", tmp_path / "b"))
    # Found before the verdicts are read.
    with pytest.raises(UserError, match=r"min_pass=0\.7 prompts\.max_pass=0\.7"):
        run_curate(
            curate_config(repository, verdicts, tmp_path / "c", "prompts.min_pass=0.7", "prompts.max_pass=0.7")
        )
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="none of midtrain"):
        dataclasses.replace(nothing, midtrain=None, sft=None, pairs=None, prompts=None)


def test_pack_holds_every_conversation_once(
    repository: Path, verdicts: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    from phimr_nemo.data.chat import load_tokenizer

    run_curate(curate_config(repository, verdicts, tmp_path / "curated"))
    conversations = tmp_path / "curated" / "midtrain"
    capacity = 90
    config = pack_config(repository, conversations, tokenizer_directory, tmp_path / "rows", capacity)
    facts = run_pack(config)
    assert facts is not None
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


def many_conversations(verdicts: Path, directory: Path) -> Path:
    table = read_table(verdicts, "verdicts").select(
        ["id", "problem_id", "question", "response", "domain", "difficulty"]
    )
    for index in range(5):
        write_shard(directory, index, table.slice(index * 96, 96), kind="conversations")
    finish(directory, kind="conversations", config={})
    return directory


def parts(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("part-*.parquet"))}


def test_processes_and_array_tasks_pack_the_same_rows(
    repository: Path, verdicts: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    source = many_conversations(verdicts, tmp_path / "conversations")
    one = pack_config(repository, source, tokenizer_directory, tmp_path / "one", 256)
    facts = run_pack(one)
    two = dataclasses.replace(one, run=dataclasses.replace(one.run, output=tmp_path / "two"), workers=2)
    assert run_pack(two) == facts
    tasks = [
        dataclasses.replace(
            one, run=dataclasses.replace(one.run, output=tmp_path / "tasks"), shard=ShardConfig(index=index, count=3)
        )
        for index in range(3)
    ]
    # In any order; whoever finds everything there closes the directory.
    assert [run_pack(tasks[index]) for index in (2, 0)] == [None, None]
    assert run_pack(tasks[1]) == facts
    assert parts(tmp_path / "one") == parts(tmp_path / "two") == parts(tmp_path / "tasks")


def test_rows_of_other_conversations_are_packed_again(
    repository: Path, verdicts: Path, tokenizer_directory: Path, tmp_path: Path
) -> None:
    source = many_conversations(verdicts, tmp_path / "conversations")
    config = pack_config(repository, source, tokenizer_directory, tmp_path / "rows", 256)
    run_pack(config)
    before = mtimes(tmp_path / "rows", "part-*.parquet", but=Path())
    write_shard(source, 3, read_table(source, "conversations").slice(0, 10), kind="conversations")
    finish(source, kind="conversations", config={})
    facts = run_pack(config)
    assert facts is not None
    assert facts["documents"] == 4 * 96 + 10
    after = mtimes(tmp_path / "rows", "part-*.parquet", but=Path())
    assert [path.name for path in before if before[path] != after[path]] == ["part-00003.parquet"]
