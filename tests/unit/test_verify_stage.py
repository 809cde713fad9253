"""Files and record directories of rollouts -> the same rows with verdicts."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.errors import UserError
from phimr_nemo.store import unpacking
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import finish, read_manifest, read_table, rows_to_table, write_shard
from phimr_nemo.verify import GRADER_VERSION
from phimr_nemo.verify import stage as verify_stage
from phimr_nemo.verify.jsonl import open_json_lines
from phimr_nemo.verify.stage import verify_file, verify_rollouts

ROWS: list[dict[str, Any]] = [
    {"id": 1, "said": r"so \boxed{\frac{1}{2}}", "gold": "0.5", "note": "é\u2028"},
    {"id": 2, "said": r"\boxed{3}", "gold": 4},
    {"id": 3, "said": None, "gold": "7"},
    {"id": 4, "said": r"\boxed{7}", "gold": None},
    {"id": 5, "said": r"\boxed{x+1}", "gold": ["1+x"], "nested": {"a": [1.5, None]}},
    {"id": 6, "said": "\ud800 is 5", "gold": "5.0", "verdict": "an older one"},
]
EXPECTED = [
    ("correct", r"\frac{1}{2}"),
    ("wrong", "3"),
    ("unparsable", ""),
    ("error", "7"),
    ("correct", "x+1"),
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open_json_lines(path, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def verify(source: Path, target: Path) -> dict[str, int]:
    return verify_file(source, target, response="said", answer="gold", workers=1)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json"])
def test_rows_keep_their_order_and_content(tmp_path: Path, suffix: str) -> None:
    source, target = write_lines(tmp_path / f"in{suffix}", ROWS), tmp_path / f"out{suffix}"
    counts = verify(source, target)
    with open_json_lines(target, "r") as stream:
        rows = [json.loads(line) for line in stream]
    assert [(row["verdict"], row["extracted"]) for row in rows][:5] == EXPECTED
    assert rows[5]["verdict"] != "an older one"
    kept = [{name: row[name] for name in row if name not in ("verdict", "extracted")} for row in rows]
    assert kept == [{name: row[name] for name in row if name != "verdict"} for row in ROWS]
    assert counts["rows"] == len(ROWS) == sum(counts[name] for name in counts if name != "rows")


def test_compressed_output_is_what_other_tools_read(tmp_path: Path) -> None:
    verify(write_lines(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl.gz")
    with gzip.open(tmp_path / "out.jsonl.gz", "rt", encoding="utf-8") as stream:
        assert len(stream.readlines()) == len(ROWS)


def test_parquet_in_batches_keeps_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "BATCH_ROWS", 3)
    table = pa.table(
        {
            "id": pa.array(range(8), pa.int16()),
            "said": [rf"\boxed{{{n}}}" for n in range(8)],
            "gold": pa.array([n - n % 2 for n in range(8)], pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    counts = verify(tmp_path / "in.parquet", tmp_path / "out.parquet")
    result = pq.read_table(tmp_path / "out.parquet")
    assert result.select(table.column_names).equals(table)
    assert result["verdict"].to_pylist() == ["correct", "wrong"] * 4
    assert counts == {"rows": 8, "correct": 4, "wrong": 4}


CUT: list[dict[str, Any]] = [
    {"said": "So the volume is 3.", "gold": "3", "finish_reason": "length"},
    {"said": "So the volume is 3.", "gold": "3", "finish_reason": "stop"},
    {"said": "So the volume is 3.", "gold": "3", "finish_reason": None},
    {"said": r"It is \\boxed{3}, as", "gold": "3", "finish_reason": "length"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_tells_which_responses_were_cut_off(tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(CUT), source)
    else:
        write_lines(source, CUT)
    assert verify(source, target) == {"rows": 4, "unparsable": 1, "correct": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"said": "1", "gold": "1"}\n{"said": \n', "line 2"),
        ('{"said": "1", "gold": "1"}\n[1]\n', "line 2: a list"),
        ('{"said": "1"}\n', "line 1 has no column 'gold'"),
        ("", "holds no row"),
        ("[" * 100_000 + "\n", "line 1"),
    ],
)
def test_bad_input_names_the_line_and_leaves_no_output(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(content, "utf-8")
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        verify(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("is_list", [True, False])
def test_the_remedy_for_one_json_document_works_as_printed(tmp_path: Path, is_list: bool, indent: int | None) -> None:
    rows = [{"said": "1", "gold": "1"}, {"said": "2", "gold": "1"}]
    source, out = tmp_path / "my rows.json.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(json.dumps(rows if is_list else rows[0], indent=indent).encode()))
    if is_list or indent:
        with pytest.raises(UserError, match="line 1: one JSON document") as caught:
            verify(source, out)
        command = caught.value.remedy.removeprefix("convert it: ")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(["bash", "-c", command], check=True, env={**os.environ, "PATH": path})
        source = tmp_path / "my rows-lines.jsonl"
    assert verify(source, out) == ({"rows": 2, "correct": 1, "wrong": 1} if is_list else {"rows": 1, "correct": 1})


def test_a_mark_before_the_first_row_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('\ufeff{"said": "1", "gold": "1"}\n', "utf-8")
    assert verify(tmp_path / "in.jsonl", tmp_path / "out.jsonl") == {"rows": 1, "correct": 1}


def test_bytes_that_are_no_text_or_no_gzip_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"said": "\xff"}\n')
    (tmp_path / "in.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "in.parquet").write_bytes(b"no parquet")
    for name, out in (("in.jsonl", "out.jsonl"), ("in.jsonl.gz", "out.jsonl"), ("in.parquet", "out.parquet")):
        with pytest.raises(UserError, match=name):
            verify(tmp_path / name, tmp_path / out)


def test_impossible_names_are_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ROWS)
    for target, message in ((source, "both"), (tmp_path / "out.parquet", "same family")):
        with pytest.raises(UserError, match=message):
            verify(source, target)
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "absent.jsonl", tmp_path / "out.jsonl")


def rollout(number: int) -> dict[str, Any]:
    return {
        "id": content_id("rollout", str(number)),
        "problem_id": content_id("problem", str(number // 2)),
        "question": f"what is {number // 2}?",
        "answer": str(number // 2),
        "response": rf"It is $\boxed{{{number - number // 2}}}$.",
        "teacher": "test",
        "sample_index": number % 2,
        "seed": number,
        "finish_reason": "stop",
        "tokens": -1,
        "domain": None,
        "difficulty": "elementary",
        "metadata": "{}",
    }


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    directory = tmp_path / "rollouts"
    for shard in range(3):
        rows = [rollout(4 * shard + n) for n in range(4)]
        write_shard(directory, shard, rows_to_table(rows, "rollouts"), kind="rollouts")
    finish(directory, kind="rollouts", config={})
    return directory


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("part-*"))}


def test_rollouts_become_verdicts(rollouts: Path, tmp_path: Path) -> None:
    summary = verify_rollouts(rollouts, tmp_path / "verdicts", workers=1)
    assert summary == {"rows": 12, "correct": 6, "wrong": 6}
    table = read_table(tmp_path / "verdicts", "verdicts")
    assert table.select(read_table(rollouts, "rollouts").column_names).equals(read_table(rollouts, "rollouts"))
    assert table["verdict"].to_pylist() == ["correct" if n % 2 == 0 else "wrong" for n in range(12)]
    assert set(table["grader"].to_pylist()) == {GRADER_VERSION}
    manifest = read_manifest(tmp_path / "verdicts", "verdicts")
    assert dict(manifest.counts) == {"correct": 6, "wrong": 6}
    assert manifest.inputs == {"rollouts": read_manifest(rollouts, "rollouts").content}


def test_a_rerun_redoes_only_what_is_missing_or_damaged(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "verdicts"
    verify_rollouts(rollouts, out, workers=1)
    whole = snapshot(out)
    graded: list[int] = []
    grade_shard = verify_stage._grade_shard

    def counting(grader: Any, table: pa.Table) -> pa.Table:
        graded.append(table["seed"][0].as_py() // 4)
        return grade_shard(grader, table)

    monkeypatch.setattr(verify_stage, "_grade_shard", counting)
    verify_rollouts(rollouts, out, workers=1)
    assert graded == []
    (out / "manifest.json").unlink()
    (out / "part-00000.parquet").write_bytes(b"half")
    (out / "part-00002.json").unlink()
    verify_rollouts(rollouts, out, workers=1)
    assert graded == [0, 2]
    assert snapshot(out) == whole


def test_verdicts_of_an_older_grader_are_made_again(
    rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "verdicts"
    with monkeypatch.context() as older:
        for module in ("phimr_nemo.verify.answer", "phimr_nemo.verify.stage"):
            older.setattr(f"{module}.GRADER_VERSION", "phimr-0")
        verify_rollouts(rollouts, out, workers=1)
    assert set(read_table(out, "verdicts")["grader"].to_pylist()) == {"phimr-0"}
    verify_rollouts(rollouts, out, workers=1)
    assert set(read_table(out, "verdicts")["grader"].to_pylist()) == {GRADER_VERSION}


def test_gold_answers_that_cannot_be_read_are_counted_apart(rollouts: Path, tmp_path: Path) -> None:
    rows = [{**rollout(200 + n), "answer": "2 3" if n == 0 else str((200 + n) // 2)} for n in range(4)]
    write_shard(rollouts, 1, rows_to_table(rows, "rollouts"), kind="rollouts")
    finish(rollouts, kind="rollouts", config={})
    summary = verify_rollouts(rollouts, tmp_path / "verdicts", workers=1)
    assert summary == {"rows": 12, "gold_unreadable": 1, "correct": 5, "wrong": 6}


def test_verdicts_of_other_rollouts_are_made_again(rollouts: Path, tmp_path: Path) -> None:
    out = tmp_path / "verdicts"
    verify_rollouts(rollouts, out, workers=1)
    kept = snapshot(out)
    # The second shard's responses are others under the same ids: right is wrong now.
    rows = [{**rollout(4 + n), "response": rollout(5 + n)["response"]} for n in range(4)]
    write_shard(rollouts, 1, rows_to_table(rows, "rollouts"), kind="rollouts")
    finish(rollouts, kind="rollouts", config={})
    verify_rollouts(rollouts, out, workers=1)
    table = read_table(out, "verdicts")
    assert table["response"].to_pylist() == read_table(rollouts, "rollouts")["response"].to_pylist()
    shards = {name: content for name, content in snapshot(out).items() if name.endswith(".parquet")}
    assert [name for name, content in shards.items() if kept[name] != content] == ["part-00001.parquet"]
    # Fewer shards than before.
    shutil.rmtree(rollouts)
    write_shard(rollouts, 0, rows_to_table(rows, "rollouts"), kind="rollouts")
    finish(rollouts, kind="rollouts", config={})
    assert verify_rollouts(rollouts, out, workers=1) == {"rows": 4, **Counter(table["verdict"].to_pylist()[4:8])}


def test_an_array_of_processes_shares_the_shards(rollouts: Path, tmp_path: Path) -> None:
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    first = verify_rollouts(rollouts, shared, workers=1, shard_index=1, shard_count=2)
    assert first is None
    assert [path.name for path in sorted(shared.glob("*.parquet"))] == ["part-00001.parquet"]
    last = verify_rollouts(rollouts, shared, workers=1, shard_index=0, shard_count=2)
    assert last == verify_rollouts(rollouts, alone, workers=1)
    assert snapshot(shared) == snapshot(alone)


def test_a_damaged_shard_of_rollouts_is_named(rollouts: Path, tmp_path: Path) -> None:
    (rollouts / "part-00001.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        verify_rollouts(rollouts, tmp_path / "verdicts", workers=1)
