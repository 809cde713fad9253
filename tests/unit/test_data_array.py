"""Curate and prepare as the processes of an array: whoever is killed, the bytes are those of one process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import CurateConfig, PrepareConfig, ShardConfig, load_config, to_yaml
from phimr_nemo.data.curate import decide, pairing, sets, stage, survey
from phimr_nemo.data.curate.stage import run_curate
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.jobs.composed import run_prepare
from phimr_nemo.store import lease
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
    tasks = [subprocess.Popen([*command, f"shard.index={index}", "shard.count=2"]) for index in range(2)]
    assert [one.wait() for one in tasks] == [0, 0]
    rows = {name: read for name, read in outcome(tmp_path / "array").items() if "manifest" in name}
    told = {name: json.loads(value) for name, value in rows.items()}
    expected = {n: json.loads(v) for n, v in outcome(tmp_path / "whole").items() if "manifest" in n}
    # Shards here are of the usual size, so only rows and counts are those of the small ones.
    assert {n: (v[0], v[2]) for n, v in told.items()} == {n: (v[0], v[2]) for n, v in expected.items()}


def prepare_config(repository: Path, root: Path, output: str, *overrides: str) -> PrepareConfig:
    paths = []
    for source in range(3):
        rows = [
            {"question": f"What is {number} plus {source if number % 2 else 7}?", "answer": str(number + source)}
            for number in range(20)
        ]
        path = root / f"source-{source}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        paths.append(f"{{name: s{source}, path: {path}}}")
    own = [f"sources=[{', '.join(paths)}]", f"run.output={root / output}", *overrides]
    return load_config(PrepareConfig, repository / "conf" / "prepare" / "tiny.yaml", own)


def test_prepare_by_tasks_and_processes_is_prepare_by_one(repository: Path, tmp_path: Path) -> None:
    run_prepare(prepare_config(repository, tmp_path, "whole"))
    expected = outcome(tmp_path / "whole")
    run_prepare(prepare_config(repository, tmp_path, "processes", "workers=2"))
    # Another task read a source and died over the rest.
    dead = lease.Leases(tmp_path / "array" / "leases", "task-1")
    for name in ("sources-00001", "reduce-00000"):
        assert dead.take(name)
        path = tmp_path / "array" / "leases" / f"{name}.lease"
        long_ago = path.stat().st_mtime - 2 * lease.LEASE_SECONDS
        os.utime(path, (long_ago, long_ago))
    run_prepare(prepare_config(repository, tmp_path, "array", "shard.index=0", "shard.count=2"))
    assert outcome(tmp_path / "processes") == expected
    assert outcome(tmp_path / "array") == expected
