"""A teacher behind an endpoint: contents, accounts, failures, and a real process killed again and again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from openai_server import Fault, OpenAIServer, Reply, user_text

from phimr_nemo.config import GenerateConfig, load_config
from phimr_nemo.errors import EXIT_PREEMPTED, UserError
from phimr_nemo.generate.stage import run_generate
from phimr_nemo.jobs.changes import check_same_run
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.jobs.preflight import preflight
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import read_manifest, read_table, shard_is_complete

PROBLEMS, SAMPLES, SHARD_SIZE = 11, 3, 4
TOTAL = PROBLEMS * SAMPLES
LATE_SECONDS = 10.0


def teacher(body: dict[str, Any]) -> Reply:
    """A response that depends on prompt and seed alone, with its length, reasoning and end."""
    digest = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).digest()
    words = " ".join(str(byte) for byte in digest[: 2 + digest[0] % 20])
    if digest[1] % 5 == 0:
        return Reply("", words, "length")
    return Reply(f"It is \\boxed{{{digest[2]}}}.", words)


def overrides(problems: Path, url: str, **changes: Any) -> list[str]:
    values = {
        "problems.path": problems,
        "teacher.engine.endpoint.base_urls": f"[{url}]",
        "teacher.engine.endpoint.concurrency": 4,
        "teacher.engine.endpoint.attempts": 5,
        "teacher.engine.endpoint.backoff_seconds": 0.005,
        "teacher.max_new_tokens": 64,
        "rollouts_per_problem": SAMPLES,
        "shard_size": SHARD_SIZE,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{name}={value}" for name, value in values.items()]


def config(out: Path, problems: Path, url: str, **changes: Any) -> GenerateConfig:
    values = [f"run.output={out}", *overrides(problems, url, **changes)]
    return load_config(GenerateConfig, Path("conf/generate/paper.yaml"), values)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"question": f"What is {number} + {number}?", "answer": str(2 * number)} for number in range(PROBLEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def expected(problems: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rollouts of an undisturbed run."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with OpenAIServer(teacher) as server:
        run_generate(config(out, problems, server.url))
        assert len(server.bodies) == TOTAL
    return read_table(out, "rollouts").to_pylist()


def test_rows_are_the_teachers_responses(problems: Path, expected: list[dict[str, Any]]) -> None:
    assert [row["question"] for row in expected] == [
        f"What is {number} + {number}?" for number in range(PROBLEMS) for _ in range(SAMPLES)
    ]
    assert [row["sample_index"] for row in expected] == list(range(SAMPLES)) * PROBLEMS
    assert len({row["id"] for row in expected}) == len({row["seed"] for row in expected}) == TOTAL
    for row in expected:
        asked = f"{row['question']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        said = teacher({"messages": [{"role": "user", "content": asked}], "seed": row["seed"]})
        ended = f"\n</think>\n{said.text}" if said.text else ""
        assert row["response"] == f"<think>\n{said.reasoning}{ended}"
        assert row["finish_reason"] == said.finish_reason
        assert row["tokens"] == len((said.reasoning + said.text).split())
        assert row["teacher"] == "deepseek-ai/DeepSeek-R1"
    assert {row["finish_reason"] for row in expected} == {"stop", "length"}


def test_tokens_and_costs_are_accounted_for(problems: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    prices = {"teacher__engine__endpoint__prices": "{input_per_million: 1000, output_per_million: 20000}"}

    def twice(body: dict[str, Any], attempt: int) -> Fault | None:
        return "500" if attempt < 2 else None

    with OpenAIServer(teacher, fault=twice) as server:
        facts = run_generate(config(tmp_path / "out", problems, server.url, **prices))
    written = sum(row["tokens"] for row in expected)
    counts = read_manifest(tmp_path / "out", "rollouts").counts
    assert counts == {
        "rollouts": TOTAL,
        "stop": sum(row["finish_reason"] == "stop" for row in expected),
        "length": sum(row["finish_reason"] == "length" for row in expected),
        "tokens": written,
        "requests": TOTAL,
        "attempts": 3 * TOTAL,
        "missing": 0,
        "prompt_tokens": 11 * TOTAL,
        "completion_tokens": written,
        "cost_cents": -((-11 * TOTAL * 1000 - written * 20000) // 10_000),
    }
    assert facts == {"rows": TOTAL, **counts}


def test_a_server_that_counts_nothing_leaves_the_tokens_unknown(problems: Path, tmp_path: Path) -> None:
    with OpenAIServer(teacher, counts_tokens=False) as server:
        run_generate(config(tmp_path / "out", problems, server.url))
    assert set(read_table(tmp_path / "out", "rollouts")["tokens"].to_pylist()) == {-1}
    counts = read_manifest(tmp_path / "out", "rollouts").counts
    assert (counts["tokens"], counts["of_unknown_tokens"], counts["prompt_tokens"]) == (0, TOTAL, 0)


def test_faults_of_all_kinds_change_nothing(problems: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    kinds: list[Fault] = ["drop mid-stream", "drop at once", "429", "500", "garbage", "truncated", "no choices"]
    draw = random.Random(3)

    def fault(body: dict[str, Any], attempt: int) -> Fault | None:
        return draw.choice([None, *kinds]) if attempt < 4 else None

    with OpenAIServer(teacher, fault=fault, delay=lambda _: draw.uniform(0.0, 0.02)) as server:
        run_generate(config(tmp_path / "out", problems, server.url, teacher__engine__endpoint__concurrency=16))
    assert read_table(tmp_path / "out", "rollouts").to_pylist() == expected
    assert not list((tmp_path / "out").glob("replies-*"))


def test_processes_share_the_shards(problems: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    with OpenAIServer(teacher) as server:
        for index in (1, 0, 1):
            share = {"shard__index": index, "shard__count": 2}
            facts = run_generate(config(tmp_path / "out", problems, server.url, **share))
            assert (facts is None) == (index == 1 and len(server.bodies) < TOTAL)
        assert len(server.bodies) == TOTAL
    assert read_table(tmp_path / "out", "rollouts").to_pylist() == expected


def test_requests_of_the_next_shard_start_before_a_shard_is_whole(problems: Path, tmp_path: Path) -> None:
    slow = "What is 0 + 0?"

    def delay(body: dict[str, Any]) -> float:
        return 0.5 if user_text(body).startswith(slow) else 0.0

    with OpenAIServer(teacher, delay=delay) as server:
        run_generate(config(tmp_path / "out", problems, server.url))
        order = [user_text(body).split("\n")[0] for body in server.bodies]
    # Four workers, three of which wait for the slow problem of the first shard; the fourth goes on to the others.
    assert order.count(slow) == SAMPLES
    assert len(order) == TOTAL
    assert order.index(f"What is {PROBLEMS - 1} + {PROBLEMS - 1}?") > SHARD_SIZE * SAMPLES


def test_what_fails_for_good_is_counted_and_asked_for_again(
    problems: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    down = {"now": True}

    def fault(body: dict[str, Any], attempt: int) -> Fault | None:
        if not down["now"] or "What is 5 +" not in user_text(body):
            return None
        return "500" if body["seed"] % 2 else "content filter"

    lost = [row for row in expected if row["question"].startswith("What is 5 +")]
    with OpenAIServer(teacher, fault=fault) as server:
        settings = config(tmp_path / "out", problems, server.url, teacher__engine__endpoint__attempts=2)
        with pytest.raises(UserError, match=f"{SAMPLES} of {TOTAL} requests have no response") as caught:
            run_generate(settings)
        for reason, count in (
            ("HTTP 500", sum(r["seed"] % 2 for r in lost)),
            ("withholds", sum(1 - r["seed"] % 2 for r in lost)),
        ):
            assert (f"{count} x" in str(caught.value) and reason in str(caught.value)) or not count
        # The other shards are there, and the failures are listed.
        assert [shard_is_complete(tmp_path / "out", index) for index in range(3)] == [True, False, True]
        failed = json.loads((tmp_path / "out" / "failed-00001.json").read_text())
        assert {item["id"] for item in failed} == {row["id"] for row in lost}
        asked, down["now"] = len(server.bodies), False
        run_generate(settings)
        assert len(server.bodies) - asked == SAMPLES
    assert read_table(tmp_path / "out", "rollouts").to_pylist() == expected
    assert not list((tmp_path / "out").glob("failed-*"))


def test_a_share_may_be_missing_for_good(problems: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    def fault(body: dict[str, Any], attempt: int) -> Fault | None:
        return "content filter" if "What is 5 +" in user_text(body) else None

    with OpenAIServer(teacher, fault=fault) as server:
        # 3 of a shard's 12.
        with pytest.raises(UserError, match="max_missing"):
            run_generate(config(tmp_path / "out", problems, server.url, teacher__engine__max_missing=0.24))
        facts = run_generate(config(tmp_path / "out", problems, server.url, teacher__engine__max_missing=0.25))
    assert facts is not None
    assert facts["missing"] == SAMPLES
    assert facts["rows"] == TOTAL - SAMPLES
    kept = [row for row in expected if not row["question"].startswith("What is 5 +")]
    assert read_table(tmp_path / "out", "rollouts").to_pylist() == kept
    assert (tmp_path / "out" / "failed-00001.json").is_file()


def test_a_server_that_is_gone_ends_the_run_early(problems: Path, tmp_path: Path) -> None:
    with OpenAIServer(teacher, fault=lambda *_: "503") as server:
        settings = config(tmp_path / "out", problems, server.url, teacher__engine__endpoint__attempts=1)
        with pytest.raises(UserError, match="stopped because the last"):
            run_generate(settings)
        # 16 in a row, and what was under way.
        assert 16 <= len(server.bodies) <= 16 + 4


def test_a_wrong_key_or_model_ends_the_run_at_once(problems: Path, tmp_path: Path) -> None:
    with OpenAIServer(teacher, fault=lambda *_: "404") as server:
        with pytest.raises(UserError, match="does not know the model"):
            run_generate(config(tmp_path / "out", problems, server.url))
        assert len(server.bodies) <= 4


def test_settings_are_checked_before_anything_is_written(problems: Path, tmp_path: Path) -> None:
    good = "http://localhost:1/v1"
    for changes, wording in (
        ({"teacher__prompt": "no question"}, "prompt template"),
        ({"teacher__engine__endpoint__api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
        ({"teacher__engine__endpoint__base_urls": "[localhost]"}, "localhost"),
    ):
        with pytest.raises(UserError, match=wording):
            preflight("generate", config(tmp_path / "out", problems, good, **changes))
    assert list(tmp_path.iterdir()) == []


def test_the_server_may_move_but_the_settings_of_sampling_may_not(problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OpenAIServer(teacher) as server:
        run_stage("generate", config(out, problems, server.url, shard__index=0, shard__count=2))
    with OpenAIServer(teacher) as server:
        run_stage(
            "generate",
            config(out, problems, server.url, shard__index=1, shard__count=2, teacher__engine__endpoint__attempts=9),
        )
        for changes in ({"teacher__temperature": 1.0}, {"teacher__engine__endpoint__model": "other"}):
            with pytest.raises(UserError, match=next(iter(changes)).split("__")[-1]):
                check_same_run("generate", RunDirectory(out), config(out, problems, server.url, **changes))
    assert read_manifest(out, "rollouts").rows == TOTAL


# Killed ----------------------------------------------------------------------------------------------


def start(out: Path, problems: Path, url: str, repository: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "phimr_nemo.cli.main",
        "generate",
        f"run.output={out}",
        *overrides(problems, url),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return processes.start(command, ctrl_c=True, cwd=repository, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_killed_at_random_moments_ends_with_the_same_set(
    seed: int, problems: Path, expected: list[dict[str, Any]], tmp_path: Path, repository: Path
) -> None:
    draw = random.Random(seed)
    out, kills = tmp_path / "out", 0

    def delay(body: dict[str, Any]) -> float:
        return draw.choice([0.0, 0.002, 0.05])

    with OpenAIServer(teacher, delay=delay) as server:
        while True:
            process = start(out, problems, server.url, repository)
            # A kill after a few more requests, at a random moment of what follows: streaming, journal, shard.
            goal = len(server.bodies) + draw.randrange(1, 9)
            while len(server.bodies) < goal and process.poll() is None:
                time.sleep(0.001)
            if process.poll() is None:
                time.sleep(draw.uniform(0.0, 0.05))
                process.send_signal(signal.SIGKILL)
                kills += 1
            _, errors = process.communicate()
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, errors
                break
        asked = len(server.bodies)
    assert kills >= 3
    assert read_table(out, "rollouts").to_pylist() == expected
    # What was under way when a process died is asked again, and nothing else.
    assert asked <= TOTAL + 4 * kills
    assert not list(out.glob("replies-*"))


def test_ctrl_c_is_a_stop_that_the_same_command_continues(
    problems: Path, expected: list[dict[str, Any]], tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "out"
    stopping = threading.Event()
    asked = itertools.count()

    def delay(_: dict[str, Any]) -> float:
        # Until it is stopped, half of the answers come at once and the others late enough to be stopped before.
        return LATE_SECONDS if next(asked) >= TOTAL // 2 and not stopping.is_set() else 0.02

    with OpenAIServer(teacher, delay=delay) as server:
        process = start(out, problems, server.url, repository)
        while len(server.bodies) < TOTAL // 2 and process.poll() is None:
            time.sleep(0.001)
        time.sleep(LATE_SECONDS / 10)  # the quick answers arrive
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        stopping.set()
        assert process.returncode == EXIT_PREEMPTED, errors
        assert "Traceback" not in errors
        stopped = len(server.bodies)
        process = start(out, problems, server.url, repository)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert len(server.bodies) - stopped == TOTAL - TOTAL // 2
    assert read_table(out, "rollouts").to_pylist() == expected
