"""An output belongs to one configuration, a finished run is not run again, a refused one leaves nothing behind."""

from __future__ import annotations

import errno
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import start

from phimr_nemo.config import GenerateConfig, SFTConfig, load_config, to_dict, to_yaml
from phimr_nemo.errors import EXIT_USER, Preempted, UserError, exit_with_message
from phimr_nemo.jobs.changes import check_same_run, made_from
from phimr_nemo.jobs.continuing import kept
from phimr_nemo.jobs.launch import launch, run_stage, start_stage
from phimr_nemo.store.lease import Leases
from phimr_nemo.store.provenance import MADE_FROM
from phimr_nemo.store.runs import CONFIG_FILE, RunDirectory
from phimr_nemo.store.shards import read_table
from phimr_nemo.training.seal import write_seal

PROBLEMS, ROLLOUTS, SHARD = 7, 2, 3


def generate(output: Path, *overrides: str) -> GenerateConfig:
    sizes = [f"problems.count={PROBLEMS}", f"rollouts_per_problem={ROLLOUTS}", f"shard_size={SHARD}"]
    return load_config(GenerateConfig, Path("conf/generate/tiny.yaml"), [f"run.output={output}", *sizes, *overrides])


def sft(output: Path, *overrides: str) -> SFTConfig:
    return load_config(SFTConfig, Path("conf/sft/tiny.yaml"), [f"run.output={output}", *overrides])


def begin(run: RunDirectory, config: SFTConfig | GenerateConfig) -> None:
    """Describe a run as its stage does."""
    facts = {MADE_FROM: made_from(config).to_json()}
    run.describe(stage="sft", config_yaml=to_yaml(config), seed=config.run.seed, facts=facts)


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a directory with its time of writing and its content."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "override", ["run.seed=5", "optim.lr=0.5", "epochs=9", "model.dtype=bf16", "global_batch=64"]
)
def test_another_setting_is_named_with_both_values(override: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    before, now = sft(run.path), sft(run.path, override)
    begin(run, before)
    check_same_run("sft", run, before)
    with pytest.raises(UserError) as caught:
        check_same_run("sft", run, now)
    key = override.partition("=")[0]
    assert f"({key}: {value_of(before, key)!r} there, {value_of(now, key)!r} now)" in caught.value.problem


def value_of(config: SFTConfig, key: str) -> object:
    """A value by its dotted key, as YAML has it."""
    value: object = to_dict(config)
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def test_settings_that_change_no_number_may_change(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    begin(run, sft(run.path))
    free = ["run.log_every=99", "parallel.tensor=2", "parallel.sequence=true", "checkpoint.every=3", "micro_batch=8"]
    check_same_run("sft", run, sft(run.path, *free))
    with pytest.raises(UserError, match=r"\(optim\.lr: [^;]*\)"):
        check_same_run("sft", run, sft(run.path, *free, "optim.lr=0.5"))


def test_two_settings_are_both_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    begin(run, generate(run.path))
    with pytest.raises(UserError) as caught:
        check_same_run("generate", run, generate(run.path, "teacher.mistake_rate=0.75", "problems.split=heldout"))
    assert re.search(r"teacher\.mistake_rate: [\d.]+ there, 0\.75 now", caught.value.problem)
    assert "problems.split: 'train' there, 'heldout' now" in caught.value.problem
    assert str(run.path) in caught.value.problem


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    config = generate(tmp_path / "run")
    run_stage("generate", config)
    rows = PROBLEMS * ROLLOUTS
    facts = RunDirectory(config.run.output).closing_facts()
    assert facts["rows"] == rows == read_table(config.run.output, "rollouts").num_rows
    before = files(config.run.output)
    assert {f"part-{i:05d}.parquet" for i in range(-(-PROBLEMS // SHARD))} <= before.keys()
    run_stage("generate", config)
    assert files(config.run.output) == before


def test_the_run_directory_tells_what_made_it(tmp_path: Path) -> None:
    config = generate(tmp_path / "run")
    run_stage("generate", config)
    assert load_config(GenerateConfig, config.run.output / CONFIG_FILE) == config
    made = json.loads((config.run.output / "run.json").read_text())
    assert (made["stage"], made["seed"]) == ("generate", 0)
    assert {"python", "phimr-nemo", "git", "pyarrow"} <= made["versions"].keys()


def test_tasks_that_share_the_shards_make_what_one_process_makes(tmp_path: Path) -> None:
    run_stage("generate", generate(tmp_path / "one"))
    # Another task of the array is at work on two of the shards: this one does the rest, and leaves them to it.
    held = ("shard-00000", "shard-00002")
    with Leases(tmp_path / "three" / "leases", "task-0") as other:
        assert all(map(other.take, held))
        run_stage("generate", generate(tmp_path / "three", "shard.index=2", "shard.count=3"))
        made = {path.name for path in (tmp_path / "three").glob("part-*.parquet")}
        everything = {path.name for path in (tmp_path / "one").glob("part-*.parquet")}
        assert everything - made == {"part-00000.parquet", "part-00002.parquet"}
        assert not RunDirectory(tmp_path / "three").is_done
        # The other one was killed, and starts again under its name: it goes on at once.
        run_stage("generate", generate(tmp_path / "three", "shard.index=0", "shard.count=3"))
    assert RunDirectory(tmp_path / "three").is_done
    assert read_table(tmp_path / "three", "rollouts") == read_table(tmp_path / "one", "rollouts")


CLAIM = """
import sys
from pathlib import Path
from phimr_nemo.store.claims import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("job", [None, "7"])
def test_two_processes_do_not_work_in_one_run_directory(
    job: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor after the first was killed does anything stand in the way; two steps of one Slurm job are two processes."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    output = tmp_path / "run"
    other = start([sys.executable, "-c", CLAIM, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(UserError, match=re.escape(f"another process is at work in {output}")) as caught:
            run_stage("generate", generate(output))
        in_job = "" if job is None else " (Slurm job 7)"
        assert f"process {other.pid} on {platform.node()}{in_job}, since 20" in caught.value.problem
        assert not (output / CONFIG_FILE).exists()
    finally:
        other.kill()
        other.communicate()
    run_stage("generate", generate(output))
    assert RunDirectory(output).is_done


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Recorded solutions of which the third row is malformed."""
    row = json.dumps({"question": "1+1?", "answer": "2", "response": "2"})
    path = tmp_path / "recorded.jsonl"
    path.write_text(f'{row}\n{row}\n{{"question": \n{row}\n')
    return path


def test_a_refused_run_leaves_nothing_behind_and_the_corrected_one_runs(tmp_path: Path, recorded: Path) -> None:
    output = tmp_path / "new" / "run"
    overrides = ["problems=null", "teacher.kind=recorded"]
    with pytest.raises(UserError, match="line 3"):
        run_stage("generate", generate(output, *overrides, f"teacher.path={recorded}"))
    assert not output.exists()
    corrected = tmp_path / "corrected.jsonl"
    corrected.write_text("".join(recorded.read_text().splitlines(keepends=True)[:2]))
    run_stage("generate", generate(output, *overrides, f"teacher.path={corrected}"))
    assert read_table(output, "rollouts").num_rows == 2


def test_a_refused_run_touches_nothing_that_was_there(tmp_path: Path, recorded: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        run_stage("generate", generate(output, "problems=null", "teacher.kind=recorded", f"teacher.path={recorded}"))
    assert (output / "notes.txt").read_text() == "mine"


def test_a_rank_hands_its_error_to_the_launcher(
    tmp_path: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        to_yaml(generate(tmp_path / "run", "problems=null", "teacher.kind=recorded", f"teacher.path={recorded}"))
    )

    def rank() -> int | str | None:
        with pytest.raises(SystemExit) as ended, exit_with_message():
            start_stage("generate", path, [])
        return ended.value.code

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert rank() == EXIT_USER
    assert capsys.readouterr().err == ""
    told = json.loads((tmp_path / "error.json").read_text())
    # torchrun's own report shows the message; our launcher raises the parts again.
    assert "line 3" in told["message"]
    assert told["user_error"][1] == "every row is an object in which a name stands once"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert rank() == EXIT_USER
    assert capsys.readouterr().err.count("line 3") == 1


@pytest.mark.parametrize("stage", ["generate", "base"])
def test_the_rank_of_another_program_says_nothing_to_a_stage_without_a_layout(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    small = {"generate": ["problems.count=2"], "base": ["num_hidden_layers=1"]}
    path = Path("conf") / stage / "tiny.yaml"
    start_stage(stage, path, [f"run.output={tmp_path / 'run'}", *small[stage]])
    assert RunDirectory(tmp_path / "run").is_done


def test_the_error_of_several_ranks_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = sft(tmp_path / "run", "parallel.data=2", "micro_batch=1", f"base={tmp_path / 'no-base'}")
    with pytest.raises(UserError, match="no-base") as caught:
        launch("sft", config)
    assert caught.value.remedy
    assert "no-base" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("has_made", ["nothing", "a checkpoint"])
def test_ranks_that_are_stopped_before_they_made_anything_leave_no_settings_behind(
    has_made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft(tmp_path / "run", "parallel.data=2", "micro_batch=1")

    def stopped(stage: str, resolved: Path, processes: int) -> None:
        assert resolved.is_file()
        if has_made != "nothing":
            (resolved.parent / "checkpoint").write_text("step 1")
        raise Preempted("asked to stop")

    monkeypatch.setattr("phimr_nemo.jobs.launch._launch_ranks", stopped)
    with pytest.raises(Preempted, match="asked to stop"):
        launch("sft", config)
    assert (tmp_path / "run").exists() == (has_made != "nothing")


def no_space(code: int) -> RuntimeError:
    """An error as Megatron's checkpoint writer raises it: the disk's own inside."""
    error = RuntimeError("Worker failure")
    error.__cause__ = OSError(code, "the disk")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (no_space(errno.ENOSPC), UserError),
        (no_space(errno.EDQUOT), UserError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), UserError),
        (no_space(errno.EIO), RuntimeError),
        (RuntimeError("shapes do not match"), RuntimeError),
        (OSError(errno.ENOSPC, "the disk"), UserError),
    ],
)
def test_a_full_disk_inside_a_library_is_one_message(
    error: Exception, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(config: GenerateConfig) -> None:
        raise error

    monkeypatch.setattr("phimr_nemo.jobs.launch.stage_function", lambda _: stage)
    with pytest.raises(expected) as caught:
        run_stage("generate", generate(tmp_path / "run"))
    assert type(caught.value) is expected
    assert (expected is UserError) == ("no space left" in str(caught.value))


def test_what_is_kept_is_the_newest_whole_checkpoint_or_the_finished_shards(tmp_path: Path) -> None:
    assert kept(tmp_path) == f"nothing yet in {tmp_path}"
    for number in range(3):
        (tmp_path / "sets").mkdir(exist_ok=True)
        (tmp_path / "sets" / f"part-{number:05d}.json").touch()
    assert kept(tmp_path) == f"3 finished shards in {tmp_path}"
    for step, has_ended in ((9, True), (10, True), (11, False)):
        checkpoint = tmp_path / "checkpoints" / f"step={step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text("w" * step)
        if has_ended:
            write_seal(checkpoint, {})
    # The process ended in the middle of the eleventh.
    assert kept(tmp_path) == str(tmp_path / "checkpoints" / "step=10")
    (tmp_path / "checkpoints" / "step=10" / "weights").write_text("cut")
    assert kept(tmp_path) == str(tmp_path / "checkpoints" / "step=9")
