"""`phimr status`: what is read from run directories against what was written into them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, GRPOConfig, load_config, to_yaml
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.status import QUIET_SECONDS, find_runs, read_status, slurm_queue, status
from phimr_nemo.store.claims import LOCK_FILE, claimed
from phimr_nemo.store.runs import METRICS_FILE, RUN_FILE, RunDirectory
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

STEPS = 40
SECONDS_A_STEP = 7.0


def start(path: Path, stage: str = "grpo") -> RunDirectory:
    run = RunDirectory(path)
    needed = [f"run.output={path}", "run.seed=0", "base=b", "prompts=p", f"steps={STEPS}"]
    needed += ["teacher.path=t"] if stage == "distill" else []
    is_rounds = stage in ("grpo", "distill")
    config = to_yaml(load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), needed)) if is_rounds else "{}\n"
    run.describe(stage=stage, config_yaml=config, seed=0, facts={})
    return run


def write_steps(path: Path, steps: range, **values: float) -> None:
    lines = [{"step": s, "time": 1000.0 + SECONDS_A_STEP * s, **values} for s in steps]
    with (path / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for file in path.iterdir():
        os.utime(file, (then, then))


def test_a_running_stage(tmp_path: Path) -> None:
    path = start(tmp_path / "grpo").path
    write_steps(path, range(1, 11), reward=0.25, tokens_per_second_per_gpu=500.0)
    write_steps(path, range(11, 12), loss=1.5)
    with (path / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write('{"step": 12, "rew')  # a line cut by a kill
    found = read_status(path, now=time.time(), queue={})
    assert (found.stage, found.state, found.step, found.steps, found.starts) == ("grpo", "running", 11, STEPS, 1)
    assert found.eta_seconds == pytest.approx(SECONDS_A_STEP * (STEPS - 11))
    assert (found.reward, found.loss, found.tokens_per_second_per_gpu) == (0.25, 1.5, 500.0)


def test_a_distillation_stands_where_its_steps_are(tmp_path: Path) -> None:
    path = start(tmp_path / "distill", "distill").path
    write_steps(path, range(1, 11), reverse_kl=0.5, loss=0.75)
    found = read_status(path, now=time.time(), queue={})
    assert (found.stage, found.state, found.step, found.steps, found.loss) == ("distill", "running", 10, STEPS, 0.75)


def test_the_pace_is_that_of_the_newest_steps(tmp_path: Path) -> None:
    path = start(tmp_path / "grpo").path
    slow = [{"step": s, "time": 100.0 * s} for s in range(1, 11)]
    fast = [{"step": 10 + s, "time": 5000.0 + 2.0 * s} for s in range(1, 21)]
    (path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in slow + fast))
    assert read_status(path, now=time.time(), queue={}).eta_seconds == pytest.approx(2.0 * (STEPS - 30))


def test_states(tmp_path: Path) -> None:
    path = start(tmp_path / "grpo").path
    later = time.time() + 2 * QUIET_SECONDS
    assert read_status(path, now=time.time(), queue={}).state == "running"
    assert read_status(path, now=later, queue={}).state == "stopped"
    assert read_status(path, now=later, queue={}).eta_seconds is None
    RunDirectory(path).finish(seconds=1)
    assert read_status(path, now=later, queue={}).state == "done"


def test_who_ends_in_order_is_known_to_have_stopped_at_once(tmp_path: Path) -> None:
    """A stop leaves an empty lock; a process that was killed leaves its name in it, and the clock decides."""
    path = start(tmp_path / "grpo").path
    with claimed(path):
        assert read_status(path, now=time.time(), queue={}).state == "running"
        killed = (path / LOCK_FILE).read_bytes()
    assert killed
    assert read_status(path, now=time.time(), queue={}).state == "stopped"
    (path / LOCK_FILE).write_bytes(killed)
    assert read_status(path, now=time.time(), queue={}).state == "running"


@pytest.mark.parametrize(("queued", "state"), [("RUNNING", "running"), ("PENDING", "stopped")])
def test_the_queue_knows_better_than_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued: str, state: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    path = start(tmp_path / "grpo").path
    for seconds in (0.0, 2 * QUIET_SECONDS):
        age(path, seconds)
        found = read_status(path, now=time.time(), queue={"17": queued, "18": "RUNNING"})
        assert (found.state, found.job, found.queue) == (state, "17", queued)


def test_every_start_is_counted(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        path = start(tmp_path / "run").path
        assert read_status(path, now=time.time(), queue={}).starts == count


def test_shards_are_counted(tmp_path: Path) -> None:
    path = start(tmp_path / "rows", "pack").path
    row = {"input_ids": [1], "loss_mask": [1], "document_lengths": [1]}
    for index in range(3):
        write_shard(path, index, rows_to_table([row], "rows"), kind="rows")
    (path / ".part-00003.parquet.tmp").write_bytes(b"begun")
    assert read_status(path, now=time.time(), queue={}).shards == 3
    finish(path, kind="rows", config={})
    assert read_status(path, now=time.time(), queue={}).shards == 3


def test_a_damaged_run_hides_no_other(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        start(tmp_path / name)
    (tmp_path / "b" / RUN_FILE).write_text("{")
    assert [(Path(item.path).name, item.state) for item in status(tmp_path)] == [
        ("a", "running"),
        ("b", "unreadable"),
        ("c", "running"),
    ]


def test_runs_in_runs_are_found_and_half_made_ones_are_not(tmp_path: Path) -> None:
    for name in ("quick/seed-0/sft", "quick/seed-0/dpo", "quick", ".quick.1.tmp"):
        start(tmp_path / name)
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["quick", "quick/seed-0/dpo", "quick/seed-0/sft"]


def test_no_directory_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no directory"):
        list(find_runs(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '17 RUNNING'; echo '18 PENDING'", {"17": "RUNNING", "18": "PENDING"}),
        ("true", {}),
        ("echo 'slurm_load_jobs error' >&2; exit 1", {}),
    ],
)
def test_squeue_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: dict[str, str]
) -> None:
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert slurm_queue() == expected


def test_without_slurm_there_is_no_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_queue() == {}


def test_the_command(tmp_path: Path) -> None:
    path = start(tmp_path / "a run [b]x[/b]").path
    write_steps(path, range(1, 5), reward=0.5)
    text = tmp_path / "metrics" / "phimr.prom"
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json", "--prometheus", str(text)])
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)
    assert one == dataclasses.asdict(status(tmp_path)[0])
    samples = {
        (sample.name, sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(text.read_text("utf-8"))
        for sample in family.samples
    }
    assert samples[("phimr_run_state", "running")] == 1
    assert samples[("phimr_run_step", None)] == 4
    assert samples[("phimr_run_steps", None)] == STEPS
    assert samples[("phimr_run_reward", None)] == 0.5
    assert ("phimr_run_loss", None) not in samples
    table = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "a run [b]x[/b]" in table
    assert f"4 / {STEPS}" in table


BROKEN: list[tuple[str, bytes]] = [
    (RUN_FILE, b"[]"),
    (RUN_FILE, b"\xff\xfe"),
    (RUN_FILE, b"[" * 100_000),
    (RUN_FILE, b'{"stage": "grpo", "starts": 3}'),
    (METRICS_FILE, b"7\n"),
    (METRICS_FILE, b"[1, 2]\n"),
    (METRICS_FILE, b'{"step": "one", "time": 1}\n'),
    (METRICS_FILE, b'{"step": 1, "time": 1, "loss": {"a": 1}}\n'),
    (METRICS_FILE, b'{"step": NaN, "time": 1}\n{"step": 2, "time": 2}\n'),
    (METRICS_FILE, b'{"step": 1}\n'),
    (METRICS_FILE, b'{"step": 1e300, "time": 1}\n'),
    (METRICS_FILE, b"\xff\xfe\n"),
    (RUN_FILE, json.dumps({"stage": "x" * 5000, "starts": ["a"]}).encode()),
    (RUN_FILE, json.dumps({"stage": "grpo", "starts": ["a"], "slurm_job": "7" * 5000}).encode()),
]


def test_a_run_keeps_its_name_in_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = start(tmp_path / "quickstart" / "seed-0" / "grpo").path
    write_steps(path, range(1, 11), reward=0.25, loss=1.5, tokens_per_second_per_gpu=12_345.0)
    lines = CliRunner().invoke(app, ["status", str(tmp_path)]).output.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "quickstart/seed-0/grpo"]


@pytest.mark.parametrize(
    ("name", "content"), BROKEN, ids=[f"{name} {number}" for number, (name, _) in enumerate(BROKEN)]
)
def test_a_broken_file_is_one_bad_row(name: str, content: bytes, tmp_path: Path) -> None:
    for run in ("a", "b", "c"):
        start(tmp_path / run)
    (tmp_path / "b" / name).write_bytes(content)
    done = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert [row["state"] for row in json.loads(done.stdout)] == ["running", "unreadable", "running"]
    assert CliRunner().invoke(app, ["status", str(tmp_path)]).exit_code == 0


def test_files_that_are_no_files_and_links_to_nowhere_stop_nothing(tmp_path: Path) -> None:
    run = start(tmp_path / "a").path
    (run / "link").symlink_to(tmp_path / "nowhere")
    (run / "itself").symlink_to(run)
    start(tmp_path / "b")
    (tmp_path / "b" / METRICS_FILE).mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / RUN_FILE).mkdir()
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / RUN_FILE)
    assert [row.state for row in status(tmp_path)] == ["running", "running", "unreadable", "unreadable"]


def test_a_number_of_any_size_leaves_the_other_columns_in_the_table(tmp_path: Path) -> None:
    write_steps(start(tmp_path / "a").path, range(3), loss=1e300, reward=0.25)
    lines = CliRunner().invoke(app, ["status", str(tmp_path)]).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert {"a", "grpo", "1e+300", "0.250"} <= set(lines[1].split())


ANCHORS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in zip("abcdefg", "bcdefgh", strict=True)
)
"""Ten lines that are a hundred million values."""


@pytest.mark.parametrize("text", [ANCHORS, "a: &a\n  b: *a\n", "parallel: &p {tensor: 1}\nmodel: *p\n", "[", "7"])
def test_a_configuration_with_anchors_hides_neither_its_run_nor_others(text: str, tmp_path: Path) -> None:
    for run in ("a", "b"):
        start(tmp_path / run)
    (tmp_path / "a" / "config.yaml").write_text(text)
    found = status(tmp_path)
    assert [(row.state, row.steps) for row in found] == [("running", None), ("running", STEPS)]


def test_anchors_that_are_a_few_values_are_read_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "grpo.yaml"
    plain = Path("conf/grpo/tiny.yaml").read_text("utf-8")
    path.write_text(plain.replace("start: 1.0 ", "start: &one 1.0 ").replace("correct: 1.0 ", "correct: &two 1.0 "))
    needed = [f"run.output={tmp_path}", "base=b", "prompts=p"]
    assert load_config(GRPOConfig, path, needed) == load_config(GRPOConfig, Path("conf/grpo/tiny.yaml"), needed)
    path.write_text(plain + ANCHORS)
    with pytest.raises(UserError, match="anchors that make more than"):
        load_config(GRPOConfig, path, needed)
