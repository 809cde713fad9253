"""Empty replies of a teacher are asked again and counted, and never are responses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer, Reply, user_text

from phimr_nemo.config import GenerateConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.generate.stage import run_generate
from phimr_nemo.store.shards import read_manifest, read_table

EMPTY = Reply("  \n")


def config(tmp_path: Path, url: str, questions: list[str]) -> GenerateConfig:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": one, "answer": "4"}) + "\n" for one in questions), "utf-8")
    values = {
        "run.output": tmp_path / "out",
        "problems.path": path,
        "teacher.engine.endpoint.base_urls": f"[{url}]",
        "teacher.engine.endpoint.attempts": 4,
        "teacher.engine.endpoint.backoff_seconds": 0.005,
        "teacher.max_new_tokens": 64,
        "rollouts_per_problem": 1,
        "shard_size": 8,
    }
    return load_config(
        GenerateConfig, Path("conf/generate/paper.yaml"), [f"{name}={value}" for name, value in values.items()]
    )


@pytest.mark.parametrize("streams", [True, False])
def test_an_empty_reply_is_asked_again_and_counted(tmp_path: Path, streams: bool) -> None:
    replies = itertools.chain(
        [EMPTY, Reply(""), Reply("", finish_reason="length")], itertools.repeat("So \\boxed{4}")
    )
    with OpenAIServer(lambda _: next(replies), streams=streams) as server:
        run_generate(config(tmp_path, server.url, ["What is 2+2?"]))
    (row,) = read_table(tmp_path / "out", "rollouts").to_pylist()
    assert row["response"] == "So \\boxed{4}"
    counts = read_manifest(tmp_path / "out", "rollouts").counts
    assert counts["empty replies, asked again"] == 3
    assert counts["attempts"] == 4


def test_a_teacher_that_stays_silent_is_an_error_and_no_response(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Reply | str:
        return EMPTY if "silent" in user_text(body) else "So \\boxed{4}"

    with OpenAIServer(answer) as server:
        settings = config(tmp_path, server.url, ["What is 2+2?", "A silent question?"])
        with pytest.raises(UserError, match="1 x the reply is empty"):
            run_generate(settings)
        allowed = load_config(
            GenerateConfig,
            Path("conf/generate/paper.yaml"),
            [
                *(f"run.output={tmp_path / 'other'}", f"problems.path={tmp_path / 'problems.jsonl'}"),
                *(f"teacher.engine.endpoint.base_urls=[{server.url}]", "teacher.engine.endpoint.attempts=4"),
                *("teacher.engine.endpoint.backoff_seconds=0.005", "teacher.max_new_tokens=64"),
                *("rollouts_per_problem=1", "shard_size=8", "teacher.engine.max_missing=0.5"),
            ],
        )
        run_generate(allowed)
    assert read_table(tmp_path / "other", "rollouts").num_rows == 1
    counts = read_manifest(tmp_path / "other", "rollouts").counts
    assert (counts["missing"], counts["empty replies, asked again"]) == (1, 4)


def test_an_answer_in_the_reasoning_field_is_named(tmp_path: Path) -> None:
    with OpenAIServer(lambda _: Reply("", "So it is \\boxed{4}.")) as server:
        run_generate(config(tmp_path, server.url, ["What is 2+2?"]))
    counts = read_manifest(tmp_path / "out", "rollouts").counts
    assert counts["finished replies with nothing but reasoning"] == 1
    (row,) = read_table(tmp_path / "out", "rollouts").to_pylist()
    assert row["response"] == "<think>\nSo it is \\boxed{4}."
