"""Curate and prepare as the processes of an array: whoever is killed, the bytes are those of one process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import start

from phimr_nemo.config import CurateConfig, PrepareConfig, ShardConfig, load_config, to_yaml
from phimr_nemo.data.curate import decide, pairing, sets, stage, survey
from phimr_nemo.data.curate.stage import run_curate
from phimr_nemo.data.prepare import candidates
from phimr_nemo.data.sources import rawfiles, source
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.jobs.composed import run_prepare
from phimr_nemo.store import atomic, lease
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

TASKS = 3
RUN = """
import sys
from phimr_nemo.config import CurateConfig, load_config
from phimr_nemo.data.curate import stage
from pathlib import Path
stage.run_curate(load_config(CurateConfig, Path(sys.argv[1]), sys.argv[2:]))
"""


@pytest.fixture
def config(repository: Path, tmp_path: Path) -> CurateConfig:
    rows = [
        {
            **row,
            "tokens": len(row["response"]),
            "verdict": "correct" if f"\\boxed{{{row['answer']}}}" in row["response"] else "wrong",
            **dict.fromkeys(("extracted", "reason", "grader"), ""),
        }
        for row in teacher_rollouts(generate_problems(1, 60, "train"), 4, 1, 0.4).to_pylist()
    ]
    for index in range(5):
        part = rows_to_table(rows[index * 48 : index * 48 + 48], "verdicts")
        write_shard(tmp_path / "verdicts", index, part, kind="verdicts")
    finish(tmp_path / "verdicts", kind="verdicts", config={})
    own = [f"verdicts={tmp_path / 'verdicts'}", f"run.output={tmp_path / 'whole'}", "workers=1"]
    own += ["sft.size=20", "pairs.size=15", "prompts.max_length_spread=null", "pairs.difficulties=null"]
    return load_config(CurateConfig, repository / "conf" / "curate" / "paper.yaml", own)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "MAX_SHARD_ROWS", 11)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)


def task(config: CurateConfig, output: Path, index: int) -> CurateConfig:
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, output=output), shard=ShardConfig(index=index, count=TASKS)
    )


def outcome(directory: Path) -> dict[str, str]:
    """The bytes of every shard and sidecar, and what the manifests say of their content."""
    hashes = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("part-*"))
    }
    for path in sorted(directory.rglob("manifest.json")):
        told = json.loads(path.read_text("utf-8"))
        hashes[str(path.relative_to(directory))] = json.dumps([told["rows"], told["shards"], told["counts"]])
    return hashes


class Killed(BaseException):
    """As a signal that cannot be caught."""


def dying(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die at the `after`-th write of any kind, before or after it."""
    writes = [after]

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        def writing(*arguments: Any, **named: Any) -> Any:
            writes[0] -= 1
            if writes[0] == 0 and after % 2:
                raise Killed
            done = write(*arguments, **named)
            if writes[0] == 0:
                raise Killed
            return done

        return writing

    for module, name in (
        (survey, "write_json"),
        (survey, "atomic_file"),
        (decide, "atomic_file"),
        (stage, "write_json"),
        (stage, "finish"),
        (sets, "write_shard"),
        (sets, "write_json"),
        (pairing, "atomic_file"),
        (pairing, "write_shard"),
        (pairing, "write_json"),
    ):
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))


def test_tasks_that_are_killed_anywhere_leave_the_bytes_of_one_process(
    config: CurateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_curate(config)
    expected = outcome(tmp_path / "whole")
    assert sum(name.endswith(".parquet") for name in expected) > 10
    deaths = 0
    for number, after in enumerate((1, 4, 9, 12, 15, 22, 10**6)):
        with monkeypatch.context() as patch:
            dying(after, patch)
            try:
                run_curate(task(config, tmp_path / "array", number % TASKS))
            except Killed:
                deaths += 1
    assert deaths >= 5
    assert outcome(tmp_path / "array") == expected
    # A task that comes late finds nothing to do.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "array").rglob("part-*")}
    run_curate(task(config, tmp_path / "array", 1))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "array").rglob("part-*")} == before
    assert not (tmp_path / "array" / "leases").exists()


def test_a_dead_task_s_work_is_taken_over(config: CurateConfig, tmp_path: Path) -> None:
    """It held a shard of the survey and the decisions when it died, long ago."""
    run_curate(config)
    dead = lease.Leases(tmp_path / "array" / "leases", "task-7")
    for name in ("survey-00002", "decisions-00000", "pairs-00000"):
        assert dead.take(name)
        path = tmp_path / "array" / "leases" / f"{name}.lease"
        long_ago = path.stat().st_mtime - 2 * lease.LEASE_SECONDS
        os.utime(path, (long_ago, long_ago))
    run_curate(task(config, tmp_path / "array", 0))
    assert outcome(tmp_path / "array") == outcome(tmp_path / "whole")


def test_tasks_at_once_share_the_work(config: CurateConfig, tmp_path: Path) -> None:
    run_curate(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config), "utf-8")
    command = [sys.executable, "-c", RUN, str(tmp_path / "config.yaml"), f"run.output={tmp_path / 'array'}"]
    tasks = [start([*command, f"shard.index={index}", "shard.count=2"]) for index in range(2)]
    assert [one.wait() for one in tasks] == [0, 0]
    rows = {name: read for name, read in outcome(tmp_path / "array").items() if "manifest" in name}
    told = {name: json.loads(value) for name, value in rows.items()}
    expected = {n: json.loads(v) for n, v in outcome(tmp_path / "whole").items() if "manifest" in n}
    # Shards here are of the usual size, so only rows and counts are those of the small ones.
    assert {n: (v[0], v[2]) for n, v in told.items()} == {n: (v[0], v[2]) for n, v in expected.items()}


def question(number: int) -> str:
    words = ("red", "blue", "green", "tall", "wide", "old", "new")
    word = words[number % len(words)] if number % 3 else "plain"
    return (
        f"A farmer fills tank {number % 17} with 30 litres of water and his {word} boat carries 12 apples "
        "along the garden rope today."
    )


def prepare_config(repository: Path, root: Path, output: str, *overrides: str) -> PrepareConfig:
    """Every kind of source that is read in pieces: lines, row groups, files of a directory, a saved dataset."""
    if not (root / "lines.jsonl").exists():
        write_sources(root)
    sources = [
        f"{{name: lines, path: {root / 'lines.jsonl'}, response: tries}}",
        f"{{name: groups, path: {root / 'groups.parquet'}, response: tries}}",
        f"{{name: files, path: {root / 'files'}}}",
        f"{{name: saved, path: {root / 'saved'}}}",
    ]
    own = [f"sources=[{', '.join(sources)}]", f"run.output={root / output}", "shard_size=13", *overrides]
    return load_config(PrepareConfig, repository / "conf" / "prepare" / "tiny.yaml", own)


def write_sources(root: Path) -> None:
    def row(number: int, answer: int) -> dict[str, Any]:
        tries = [f"<think>\nHm {number % 5}.\n</think>\n\\boxed{{{answer}}}", f"It is \\boxed{{{number % 4}}}."]
        return {"question": question(number), "answer": str(answer), "tries": tries}

    lines = [json.dumps(row(number, number % 17)) for number in range(40)]
    lines[7], lines[20] = "", '{"question": "No answer?"}'
    (root / "lines.jsonl").write_text("\n".join(lines), "utf-8")
    table = pa.Table.from_pylist([row(number, number % 11) for number in range(30)])
    pq.write_table(table, root / "groups.parquet", row_group_size=7)
    (root / "files").mkdir()
    for file in range(2):
        rows = [{"question": f"Task {file}: {question(n)}", "answer": "3"} for n in range(file, 24, 2)]
        (root / "files" / f"{file}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"What is {number} plus 1?", "answer": str(number + 1)} for number in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "saved"))


def prepared(directory: Path) -> dict[str, str]:
    return outcome(directory) | {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("drops.jsonl", "conflicts.jsonl")
    }


@pytest.fixture
def whole(repository: Path, tmp_path: Path) -> dict[str, str]:
    """What one process makes of sources that it reads in one piece each."""
    run_prepare(prepare_config(repository, tmp_path, "whole"))
    expected = prepared(tmp_path / "whole")
    assert sum(name.endswith(".parquet") for name in expected) > 8
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "whole" / "drops.jsonl").open(encoding="utf-8")]
    assert {"exact duplicate", "exact duplicate with another answer", "near duplicate"} < set(reasons)
    return expected


def in_small_pieces(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rawfiles, "PART_BYTES", 900)
    patch.setattr(source, "DATASET_ROWS", 6)
    patch.setattr(candidates, "SHARD_ROWS", 2)


def test_pieces_are_those_of_one_process(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    run_prepare(prepare_config(repository, tmp_path, "processes", "workers=2"))
    assert prepared(tmp_path / "processes") == whole
    in_small_pieces(monkeypatch)
    config = prepare_config(repository, tmp_path, "pieces")
    pieces = [len(list(source.pieces_of(one))) for one in config.sources]
    assert min(pieces) >= 3
    run_prepare(config)
    assert prepared(tmp_path / "pieces") == whole


def test_a_row_that_is_lost_at_a_cut_is_seen(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    """The planted fault: one of the parts of a file of lines is passed over."""
    in_small_pieces(monkeypatch)
    cut = rawfiles._parts_of_lines

    def faulty(*arguments: Any) -> Any:
        return (part for number, part in enumerate(cut(*arguments)) if number != 1)

    monkeypatch.setattr(rawfiles, "_parts_of_lines", faulty)
    run_prepare(prepare_config(repository, tmp_path, "faulty"))
    assert prepared(tmp_path / "faulty") != whole


def test_prepare_killed_anywhere_by_any_number_of_tasks(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    in_small_pieces(monkeypatch)
    deaths = 0
    for number, after in enumerate((1, 6, 11, 30, 3, 44, 17, 8, 59, 2, 23, 70, 41, 10**6)):
        count = (1, 2, 5)[number % 3]
        own = (f"shard.count={count}", f"shard.index={number * 3 % count}")
        config = prepare_config(repository, tmp_path, "array", *own)
        with monkeypatch.context() as patch:
            calls = [after]

            def dying(path: Path, calls: list[int] = calls) -> None:
                """Called before and after a file gets its name."""
                calls[0] -= 1
                if calls[0] == 0:
                    raise Killed

            patch.setattr(atomic, "_fsync", dying)
            try:
                run_prepare(config)
            except Killed:
                deaths += 1
    assert deaths >= 8
    assert prepared(tmp_path / "array") == whole
    assert not (tmp_path / "array" / "leases").exists()
    assert not (tmp_path / "array" / "candidates").exists()


RUN_PREPARE = """
import os, signal, sys
from pathlib import Path
from phimr_nemo.config import PrepareConfig, load_config
from phimr_nemo.data.prepare import candidates
from phimr_nemo.data.sources import rawfiles, source
from phimr_nemo.jobs.composed import run_prepare
from phimr_nemo.store import atomic, lease

rawfiles.PART_BYTES, source.DATASET_ROWS, candidates.SHARD_ROWS = 900, 6, 2
lease.LEASE_SECONDS, lease.POLL_SECONDS = 2.0, 0.1
fsync, left = atomic._fsync, int(sys.argv[2])

def killed(path):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(path)

atomic._fsync = killed
run_prepare(load_config(PrepareConfig, Path(sys.argv[1]), sys.argv[3:]))
"""


def test_prepare_under_sigkill_and_by_tasks_at_once(repository: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    """What a killed task holds is taken over once its lease has expired."""
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(prepare_config(repository, tmp_path, "array")), "utf-8")

    def task(kill: int, index: int, count: int) -> Any:
        own = [f"shard.index={index}", f"shard.count={count}"]
        return start([sys.executable, "-c", RUN_PREPARE, str(config), str(kill), *own])

    for kill, index, count in ((9, 4, 5), (31, 1, 2), (70, 0, 1)):
        assert task(kill, index, count).wait() == -signal.SIGKILL
    tasks = [task(10**6, index, 2) for index in (1, 0)]
    assert [one.wait() for one in tasks] == [0, 0]
    assert prepared(tmp_path / "array") == whole


def test_a_dead_task_of_prepare_is_taken_over(repository: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    """It held a source, a piece and the reduce when it died, long ago."""
    dead = lease.Leases(tmp_path / "array" / "leases", "task-1")
    for name in ("sources-00001", "pieces-00002", "reduce-00000"):
        assert dead.take(name)
        path = tmp_path / "array" / "leases" / f"{name}.lease"
        long_ago = path.stat().st_mtime - 2 * lease.LEASE_SECONDS
        os.utime(path, (long_ago, long_ago))
    run_prepare(prepare_config(repository, tmp_path, "array", "shard.index=0", "shard.count=2", "workers=2"))
    assert prepared(tmp_path / "array") == whole
