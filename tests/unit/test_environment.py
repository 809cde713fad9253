"""Switches of the environment that people set: each through one command in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from openai_server import OpenAIServer, user_text

from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.shards import read_manifest, read_table

PHIMR = [sys.executable, "-m", "phimr_nemo.cli"]
SECONDS = 300
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")
COMMIT = "a" * 40


def run(arguments: list[str], repository: Path, **variables: str) -> tuple[int, str]:
    """Run a command with a terminal for its output; its exit status and what it showed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TQDM_DISABLE", "LC_ALL")}
    environment = {**kept, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    ours, theirs = pty.openpty()
    shown = bytearray()

    def listen() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                return
            if not piece:
                return
            shown.extend(piece)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        done = subprocess.run(
            [*PHIMR, *arguments],
            cwd=repository,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            timeout=SECONDS,
            check=False,
        )
    finally:
        os.close(theirs)
        listener.join(10)
        os.close(ours)
    return done.returncode, shown.decode("utf-8", "replace")


def sources(path: Path | str, **settings: object) -> str:
    told = {"name": "s", "path": str(path), **settings}
    return "sources=[{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in told.items()) + "}]"


def prepare(out: Path, source: str) -> list[str]:
    return ["prepare", "--config", "conf/prepare/tiny.yaml", f"run.output={out}", source]


def test_tqdm_disable_hides_the_bar_and_nothing_else(tmp_path: Path, repository: Path) -> None:
    """The rollouts come from an endpoint, which counts what an interrupted run has left done."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "What is 2+2?", "answer": "4"}\n', "utf-8")
    with OpenAIServer(lambda body: f"So \\boxed{{4}} {len(user_text(body))}") as server:
        settings = {
            "run.output": tmp_path / "out",
            "problems.path": problems,
            "teacher.engine.endpoint.base_urls": f"[{server.url}]",
            "teacher.max_new_tokens": 64,
            "rollouts_per_problem": 2,
            "shard_size": 4,
        }
        arguments = ["generate", "--config", "conf/generate/paper.yaml"]
        arguments += [f"{name}={value}" for name, value in settings.items()]
        status, shown = run(arguments, repository, TQDM_DISABLE="1")
    assert status == 0, shown
    assert read_table(tmp_path / "out", "rollouts").num_rows == 2
    assert "rollout/s" not in shown
    assert "%|" not in shown


def test_no_color_shows_no_colours(repository: Path) -> None:
    status, plain = run(["prepare", "--help"], repository, NO_COLOR="1")
    assert status == 0, plain
    assert not COLOUR.search(plain)
    assert "sources" in plain


def test_the_hub_offline_is_one_clear_error(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("datasets")
    arguments = prepare(tmp_path / "out", sources("nobody/nothing", hub=True))
    status, shown = run(arguments, repository, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert status == 2, shown
    assert "Traceback" not in shown
    assert "nobody/nothing" in shown
    assert "remedy:" in shown


def cached(root: Path) -> None:
    """A dataset of the hub in the cache of `datasets`, as a download leaves it."""
    datasets = pytest.importorskip("datasets")
    from datasets.arrow_writer import ArrowWriter

    directory = root / "mine___sums" / "default" / "0.0.0" / COMMIT
    directory.mkdir(parents=True)
    rows = datasets.Dataset.from_list([{"question": "What is 2+3?", "answer": "5"}])
    with ArrowWriter(path=str(directory / "sums-train.arrow"), features=rows.features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    version = {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}
    split = {"name": "train", "num_bytes": 10, "num_examples": 1, "dataset_name": "sums"}
    info = {
        "features": {name: {"dtype": "string", "_type": "Value"} for name in ("question", "answer")},
        "builder_name": "sums",
        "dataset_name": "sums",
        "config_name": "default",
        "version": version,
        "splits": {"train": split},
        "download_size": 1,
        "dataset_size": 10,
    }
    (directory / "dataset_info.json").write_text(json.dumps(info), "utf-8")


def test_the_datasets_cache_serves_offline_and_a_pinned_revision_is_kept(tmp_path: Path, repository: Path) -> None:
    cached(tmp_path / "cache")
    variables = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    status, shown = run(
        prepare(tmp_path / "out", sources("mine/sums", hub=True, revision=COMMIT)), repository, **variables
    )
    assert status == 0, shown
    assert read_table(tmp_path / "out" / "problems", "problems")["answer"].to_pylist() == ["5"]
    inputs = read_manifest(tmp_path / "out" / "problems", "problems").inputs
    assert inputs == {"hub/mine/sums/train": COMMIT}
    status, shown = run(
        prepare(tmp_path / "other", sources("mine/sums", hub=True, revision="b" * 40)), repository, **variables
    )
    assert status == 2, shown
    assert "Traceback" not in shown
    assert COMMIT in "".join(shown.split())


def test_the_c_locale_reads_and_writes_every_letter(tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "中文.jsonl"
    path.write_text(
        '{"question": "一共有多少个苹果？", "answer": "5"}\n{"question": "Où est-il?", "answer": null}\n', "utf-8"
    )
    status, shown = run(prepare(tmp_path / "out", sources(path)), repository, LC_ALL="C", LANG="C")
    assert status == 0, shown
    assert read_table(tmp_path / "out" / "problems", "problems")["question"].to_pylist() == ["一共有多少个苹果？"]
    (told,) = read_manifest(tmp_path / "out" / "problems", "problems").inputs.values()
    assert told == content_of(path)


def test_warnings_as_errors_stop_nothing(tmp_path: Path, repository: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"question": "What is 1+1?", "answer": "2"}\n{"question": "What is 2+2?", "answer": "4"}\n', "utf-8"
    )
    status, shown = run(prepare(tmp_path / "out", sources(path)), repository, PYTHONWARNINGS="error")
    assert status == 0, shown
    assert read_manifest(tmp_path / "out" / "problems", "problems").rows == 2
