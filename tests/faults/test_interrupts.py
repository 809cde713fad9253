"""Ctrl-C in a real terminal, in every kind of stage and through every way to start one.

The first is a stop like the scheduler's: what was done is kept, the exit code is 3, the message says where, and no
process is left. The second ends everything at once. In the long form every stage is stopped through every entry.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fault_length import LONG
from processes import MOST_CHARACTERS, PATIENCE_SECONDS, Terminal, left_of, start, tree, wait_for

from phimr_nemo.jobs.launch import start_stage
from phimr_nemo.store.runs import RunDirectory, read_metrics

pytestmark = pytest.mark.slow

Injected = Callable[[str, str, int, str], None]
END_SECONDS = 120.0
SIZE = (
    *("num_hidden_layers=1", "hidden_size=32", "intermediate_size=64", "num_attention_heads=4"),
    "num_key_value_heads=2",
)
PYTHON = (sys.executable, "-m")
PHIMR = (*PYTHON, "phimr_nemo.cli")
RANKS = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "phimr_nemo.cli")
# How the stage is started, further values, the exit code: torchrun alone answers 1 to everything.
ENTRIES: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "phimr": (PHIMR, (), 3),
    "phimr, 2 ranks": (PHIMR, ("parallel.data=2",), 3),
    "launcher, 2 ranks": ((*PYTHON, "phimr_nemo.jobs.node", *RANKS), ("parallel.data=2",), 3),
    "torchrun, 2 ranks": ((*PYTHON, "torch.distributed.run", *RANKS), ("parallel.data=2",), 1),
}
TRAINED = ("midtrain", "sft", "dpo", "grpo", "distill")
SHORT = (
    ("midtrain", "phimr"),
    ("sft", "launcher, 2 ranks"),
    ("dpo", "phimr, 2 ranks"),
    ("grpo", "phimr"),
    ("distill", "phimr"),
    ("sft", "torchrun, 2 ranks"),
)
CASES = tuple((stage, entry) for stage in TRAINED for entry in ENTRIES) if LONG else SHORT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Two models of 30 K parameters, and for every stage data that lasts longer than the test."""
    root = tmp_path_factory.mktemp("inputs")
    before = Path.cwd()
    os.chdir(repository)
    try:
        for seed, name in enumerate(("base", "another")):
            start_stage("base", Path("conf/base/tiny.yaml"), [f"run.output={root / name}", f"run.seed={seed}", *SIZE])
        for name, preset, *values in (
            ("teacher", "tiny", "problems.count=200"),
            ("own", "tiny-rollouts", "problems.count=40", "teacher.mistake_rate=0.5", "rollouts_per_problem=4"),
        ):
            teacher = ["teacher.kind=programmatic"] if preset != "tiny" else []
            make = [f"run.output={root / name / 'rollouts'}", *teacher, *values]
            start_stage("generate", Path(f"conf/generate/{preset}.yaml"), make)
            verdicts = [f"rollouts={root / name / 'rollouts'}", f"run.output={root / name / 'verdicts'}"]
            start_stage("verify", Path("conf/verify/tiny.yaml"), verdicts)
            sets = [f"verdicts={root / name / 'verdicts'}", f"run.output={root / name / 'sets'}"]
            start_stage("curate", Path(f"conf/curate/{preset}.yaml"), sets)
        rows = [f"conversations={root / 'teacher/sets/midtrain'}", f"tokenizer={root / 'base/hf'}"]
        start_stage(
            "pack", Path("conf/pack/tiny.yaml"), [*rows, f"run.output={root / 'rows'}", "sequence_length=256"]
        )
    finally:
        os.chdir(before)
    return root


def arguments(stage: str, inputs: Path, output: Path) -> list[str]:
    """Of a training stage that would go on for a very long time."""
    rounds = (f"prompts={inputs / 'own/sets/prompts'}", "steps=10000", "prompts_per_step=4", "group_size=4")
    short = ("max_new_tokens=12", "micro_batch=8")
    own = {
        "midtrain": (f"data={inputs / 'rows'}", "sequence_length=256", "validation_rows=4", "epochs=10000"),
        "sft": (f"data={inputs / 'teacher/sets/sft'}", "validation_rows=4", "epochs=10000"),
        "dpo": (f"pairs={inputs / 'own/sets/pairs'}", "epochs=10000"),
        "grpo": (*rounds, *short),
        "distill": (*rounds, *short, f"teacher.path={inputs / 'another/hf'}"),
    }[stage]
    sizes = () if stage in ("grpo", "distill") else ("global_batch=4", "micro_batch=2")
    quiet = ("validate_every=100000",) if stage in ("midtrain", "sft") else ()
    common = (f"base={inputs / 'base/hf'}", f"run.output={output}", "run.log_every=1", "checkpoint.every=1000")
    return [stage, "--config", f"conf/{stage}/tiny.yaml", *common, *own, *sizes, *quiet]


def has_steps(output: Path, steps: int = 2) -> bool:
    return any(line["step"] >= steps for line in read_metrics(output))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


HANG_SECONDS = 90
"""Longer than a loaded machine keeps a living rank from beating."""
STOOD_STILL = TRAINED if LONG else ("dpo",)


@dataclass(frozen=True)
class Stopped:
    """A job of two ranks, one of which stands still.

    Attributes:
        launcher: its own process.
        processes: all of it.
        output: its run directory.
    """

    launcher: subprocess.Popen[str]
    processes: list[psutil.Process]
    output: Path


@pytest.fixture(scope="module")
def standing_still(
    inputs: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Stopped]]:
    """A job of each of these stages, begun before the other tests: they have time to run while it waits."""
    found = {}
    try:
        for stage in STOOD_STILL:
            output = tmp_path_factory.mktemp("still") / "run"
            launcher = start(
                [*PHIMR, *arguments(stage, inputs, output), "parallel.data=2"],
                cwd=repository,
                env={**environment(), "PHIMR_HANG_SECONDS": str(HANG_SECONDS)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            found[stage] = Stopped(launcher, [], output)
            try:
                wait_for(lambda: has_steps(output), launcher)  # noqa: B023 - called at once
            except AssertionError as error:
                launcher.kill()
                raise AssertionError(f"{error}: {launcher.communicate()[1][-MOST_CHARACTERS:]}") from error
            processes = found[stage].processes
            processes += tree(launcher)
            (rank,) = (other for other in processes if other.environ().get("RANK") == "1" and is_rank(other))
            rank.suspend()
        yield found
    finally:
        for job in found.values():
            job.launcher.kill()
            job.launcher.communicate()


@pytest.mark.usefixtures("standing_still")
@pytest.mark.parametrize(("stage", "entry"), CASES)
def test_the_first_ctrl_c_saves_says_where_and_leaves_nothing(
    stage: str, entry: str, inputs: Path, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    output = tmp_path / "run"
    program, values, code = ENTRIES[entry]
    command = [*program, *arguments(stage, inputs, output), *values]
    with Terminal(command, cwd=repository, env=environment()) as terminal:
        terminal.wait_for(lambda: has_steps(output))
        processes = tree(terminal.process)
        terminal.press_ctrl_c()
        assert terminal.end(END_SECONDS) == code, terminal.text[-2000:]
        assert left_of(processes, END_SECONDS) == []
    (checkpoint,) = (path for path in (output / "checkpoints").iterdir() if path.is_dir())
    # Without it, 1,000 steps would have been lost.
    assert int(checkpoint.name.replace("=", "-").split("-")[-1]) >= 2
    assert not RunDirectory(output).is_done
    if code == 3:
        text = "".join(terminal.text.split())
        assert "runthesamecommandtocontinue" in text
        assert str(checkpoint) in text
        assert "Traceback" not in terminal.text
    injected(stage, f"Ctrl-C, {entry}", 1, f"exit code {code}; the checkpoint of the step")


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank itself and none of the processes that a rank starts."""
    parent = process.parent()
    return parent is not None and "RANK" not in parent.environ()


@pytest.mark.parametrize("entry", ["phimr", "phimr, 2 ranks"])
def test_the_second_ctrl_c_ends_everything_at_once(
    entry: str, inputs: Path, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    """Its ranks are made to stand still, so that the first one is never answered."""
    output = tmp_path / "run"
    program, values, _ = ENTRIES[entry]
    command = [*program, *arguments("midtrain", inputs, output), "checkpoint.every=1", *values]
    with Terminal(command, cwd=repository, env=environment()) as terminal:
        terminal.wait_for(lambda: has_steps(output))
        processes = tree(terminal.process)
        if values:
            for process in processes[1:]:
                process.suspend()
        terminal.press_ctrl_c()
        if values:
            time.sleep(1)
            assert terminal.process.poll() is None
        terminal.press_ctrl_c()
        assert terminal.end(END_SECONDS) == 3
        assert left_of(processes, END_SECONDS) == []
    assert "kept:" in terminal.text
    injected("midtrain", f"Ctrl-C twice, {entry}", 1, "ends at once; the last checkpoint")


@pytest.mark.parametrize(
    ("number", "step", "problems"),
    [(signal.SIGINT, "midtrain", 400), (signal.SIGTERM, "rollouts", 60_000)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_quickstart_passes_a_stop_on_to_its_step(
    number: signal.Signals, step: str, problems: int, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    """The step stops in order, with what it has done; it has a session of its own, and still nothing is left."""
    command: list[str | Path] = [*PHIMR, "quickstart", "--out", tmp_path / "out", f"train_problems={problems}"]
    output = tmp_path / "out" / "seed-0" / step
    with Terminal(command, cwd=repository, env=environment()) as terminal:
        terminal.wait_for(
            lambda: has_steps(output, 10) or (output / "part-00001.json").exists(), 2 * PATIENCE_SECONDS
        )
        processes = tree(terminal.process)
        if number == signal.SIGINT:
            terminal.press_ctrl_c()
        else:
            terminal.process.send_signal(number)
        assert terminal.end(END_SECONDS) == 3, terminal.text[-2000:]
        assert left_of(processes, END_SECONDS) == []
    assert f"stopped in {step}" in terminal.text
    assert str(output) in "".join(terminal.text.partition("kept:")[2].split())
    injected(step, f"{number.name}, quickstart", 1, "exit code 3; the checkpoint, or the finished shards")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("stage", ["generate", "verify"])
def test_a_data_stage_keeps_its_finished_shards(
    stage: str, number: signal.Signals, inputs: Path, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    output = tmp_path / "run"
    values = {
        "generate": ("problems.count=20000", "shard_size=20"),
        "verify": (f"rollouts={inputs / 'many'}", "workers=1"),
    }[stage]
    if stage == "verify" and not (inputs / "many").exists():
        many = [f"run.output={inputs / 'many'}", "problems.count=8000", "shard_size=20"]
        start_stage("generate", repository / "conf/generate/tiny.yaml", many)
    command = [*PHIMR, stage, "--config", f"conf/{stage}/tiny.yaml", f"run.output={output}", *values]
    with Terminal(command, cwd=repository, env=environment()) as terminal:
        terminal.wait_for(lambda: (output / "part-00001.json").exists())
        processes = tree(terminal.process)
        if number == signal.SIGINT:
            terminal.press_ctrl_c()
        else:
            terminal.process.send_signal(number)
        assert terminal.end(END_SECONDS) == 3, terminal.text[-2000:]
        assert left_of(processes, END_SECONDS) == []
    shards = len(list(output.glob("part-*.json")))
    assert f"kept: {shards} finished shards" in terminal.text
    assert "Traceback" not in terminal.text
    injected(stage, number.name, 1, "exit code 3; the finished shards")


def test_a_stop_before_the_first_step_is_one_too(
    inputs: Path, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    """While the libraries are imported, which takes longer than anything else of a short run."""
    output = tmp_path / "run"
    with Terminal([*PHIMR, *arguments("sft", inputs, output)], cwd=repository, env=environment()) as terminal:
        terminal.wait_for((output / "config.yaml").exists)
        time.sleep(1)
        terminal.press_ctrl_c()
        assert terminal.end(END_SECONDS) == 3, terminal.text[-2000:]
    assert "kept: nothing yet" in terminal.text
    assert "Traceback" not in terminal.text
    injected("sft", "Ctrl-C before the first step", 1, "exit code 3; nothing was done yet")


def test_the_ranks_of_a_launcher_that_was_killed_save_and_end(
    inputs: Path, repository: Path, tmp_path: Path, injected: Injected
) -> None:
    output = tmp_path / "run"
    launcher = start(
        [*PHIMR, *arguments("midtrain", inputs, output), "parallel.data=2"], cwd=repository, env=environment()
    )
    try:
        try:
            wait_for(lambda: has_steps(output), launcher)
        except AssertionError as error:
            launcher.kill()
            raise AssertionError(f"{error}: {launcher.communicate()[1][-MOST_CHARACTERS:]}") from error
        processes = tree(launcher)
    finally:
        launcher.kill()
        launcher.wait()
    assert len(processes) >= 3
    assert left_of(processes, END_SECONDS) == []
    injected("midtrain", "SIGKILL of the process that started the ranks", 1, "no process is left")


@pytest.mark.parametrize("stage", STOOD_STILL)
def test_a_rank_that_stands_still_ends_the_job_and_is_named(
    stage: str, standing_still: Mapping[str, Stopped], injected: Injected
) -> None:
    """It is not dead, so nobody sees an exit code, and its peer waits in a collective."""
    job = standing_still[stage]
    _, errors = job.launcher.communicate(timeout=PATIENCE_SECONDS)
    assert job.launcher.returncode == 1, errors
    assert f"rank 1 stood still for {HANG_SECONDS} s and was ended" in errors
    assert left_of(job.processes, END_SECONDS) == []
    assert not RunDirectory(job.output).is_done
    injected(stage, "SIGSTOP of one of two ranks", 1, "the job ends and names the rank; no process is left")
