"""The plan of the quickstart: every step reads what an earlier one wrote, and a finished step is not run again."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import processes
import pytest

from phimr_nemo.config import STAGES, EvaluateConfig, GenerateConfig, QuickstartConfig, SyntheticProblems, load_config
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.jobs import quickstart as pipeline
from phimr_nemo.jobs.preflight import file_inputs, record_inputs
from phimr_nemo.jobs.quickstart import ROWS, SECONDS, plan_quickstart, run_quickstart, seed_steps
from phimr_nemo.jobs.steps import schedule as scheduler
from phimr_nemo.jobs.steps.order import Order
from phimr_nemo.jobs.steps.schedule import Starter, run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.progress import duration
from phimr_nemo.store.runs import RunDirectory

QUICKSTART = Path("conf/quickstart/tiny.yaml")


def stage_and_config(step: Step) -> tuple[str, Any]:
    stage, flag, preset, *overrides = step.arguments
    assert flag == "--config"
    return stage, load_config(STAGES[stage], Path(preset), overrides)


def steps(root: Path, seed: int = 0, *overrides: str) -> list[Step]:
    return seed_steps(load_config(QuickstartConfig, QUICKSTART, overrides), seed, root)


def test_every_step_reads_only_what_an_earlier_one_writes(tmp_path: Path) -> None:
    written: list[Path] = []
    for step in steps(tmp_path):
        stage, config = stage_and_config(step)
        inputs = [*(path for path, _ in record_inputs(stage, config)), *file_inputs(config)]
        for path in inputs:
            assert any(path == output or output in path.parents for output in written), f"{step.name} reads {path}"
        assert step.output not in written
        assert config.run.output == step.output
        written.append(step.output)


def test_the_stages_follow_the_paper(tmp_path: Path) -> None:
    """Each training stage starts from the model of the one before; the control row skips mid-training."""
    configs = {step.name: stage_and_config(step)[1] for step in steps(tmp_path)}
    bases = {name: configs[name].base.parent.name for name in ("midtrain", "sft", "dpo", "grpo")}
    assert bases == {"midtrain": "base", "sft": "midtrain", "dpo": "sft", "grpo": "dpo"}
    control, sft = configs["sft-without-midtrain"], configs["sft"]
    assert control.base.parent.name == "base"
    assert control.data == sft.data
    assert control.optim == sft.optim
    # Rollouts for preferences come from the model that DPO starts from.
    assert configs["own-rollouts"].teacher.path == configs["dpo"].base
    assert configs["release"].model.parent.name == "grpo"


def test_training_and_evaluation_ask_other_problems(tmp_path: Path) -> None:
    for seed in (0, 3):
        configs = [stage_and_config(step)[1] for step in steps(tmp_path, seed)]
        asked = [c for c in configs if isinstance(c, GenerateConfig)]
        evaluated = [c for c in configs if isinstance(c, EvaluateConfig)]
        assert [c.run.seed for c in asked] == [seed, seed + pipeline.OWN_PROBLEMS_SEED_OFFSET]
        assert all(isinstance(c.problems, SyntheticProblems) and c.problems.split == "train" for c in asked)
        assert len(evaluated) == len(ROWS)
        # One set of questions for every row of a table.
        assert len({(c.problems, c.run.seed, c.samples) for c in evaluated}) == 1
        assert isinstance(evaluated[0].problems, SyntheticProblems)
        assert evaluated[0].problems.split == "heldout"


def test_sizes_of_the_quickstart_reach_its_steps(tmp_path: Path) -> None:
    sizes = ["train_problems=11", "heldout_problems=12", "rl_problems=13", "evaluation_samples=14"]
    configs = {step.name: stage_and_config(step)[1] for step in steps(tmp_path, 0, *sizes)}
    assert configs["rollouts"].problems.count == 11
    assert configs["evaluate-grpo"].problems.count == 12
    assert configs["own-rollouts"].problems.count == 13
    assert configs["evaluate-grpo"].samples == 14


def test_packed_rows_fit_the_midtraining(tmp_path: Path) -> None:
    configs = {step.name: stage_and_config(step)[1] for step in steps(tmp_path)}
    assert configs["rows"].sequence_length == configs["midtrain"].sequence_length
    assert configs["rows"].tokenizer == configs["midtrain"].base


def test_seeds_share_nothing(tmp_path: Path) -> None:
    plan = plan_quickstart(QUICKSTART, [0, 5], tmp_path, [])
    one, other = plan[: len(plan) // 2], plan[len(plan) // 2 :]
    assert [step.name for step in one] == [step.name for step in other]
    assert {step.output.parent for step in one} == {tmp_path / "seed-0"}
    assert {step.output.parent for step in other} == {tmp_path / "seed-5"}
    assert not any("seed-0" in argument for step in other for argument in step.arguments)


def test_a_step_reads_as_the_command_that_a_user_types(tmp_path: Path) -> None:
    step = steps(tmp_path / "with space")[0]
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {step}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == ["phimr", *step.arguments]


class Recorder:
    """Stands for the processes: marks a step's run as done, ends with another code where it is told to."""

    def __init__(self, stop_at: str | None = None, code: int = 0) -> None:
        self.ran: list[str] = []
        self.stop_at, self.code = stop_at, code

    def start(self, step: Step, output: object = None) -> Recorder.Ended:
        if step.name == self.stop_at:
            return Recorder.Ended(self.code)
        self.ran.append(step.name)
        RunDirectory(step.output).finish()
        return Recorder.Ended(0)

    class Ended:
        """A process that has ended."""

        def __init__(self, code: int) -> None:
            self.code = code

        def poll(self) -> int:
            return self.code


@pytest.mark.parametrize(("code", "error"), [(3, Preempted), (1, RuntimeError), (-9, RuntimeError), (2, UserError)])
def test_an_interrupted_quickstart_continues_at_the_step_it_was_in(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "write_report", lambda _, out: (out / "table.md").write_text("table"))
    monkeypatch.setattr(pipeline, "answers", lambda _: iter(()))
    names = [step.name for step in steps(tmp_path)]
    first, second, third = Recorder("dpo", code), Recorder(), Recorder()
    monkeypatch.setattr(Starter, "start", lambda _, *started: first.start(*started))
    with pytest.raises(error, match="dpo"):
        run_quickstart(QUICKSTART, [0], tmp_path, [], redo=False)
    assert {*names[: names.index("dpo")]} <= {*first.ran}
    assert not {"dpo", "grpo", "evaluate-dpo", "evaluate-grpo", "release"} & {*first.ran}
    assert not (tmp_path / "table.md").exists()
    monkeypatch.setattr(Starter, "start", lambda _, *started: second.start(*started))
    run_quickstart(QUICKSTART, [0], tmp_path, [], redo=False)
    assert {*first.ran} | {*second.ran} == {*names}
    assert len(first.ran) + len(second.ran) == len(names)
    assert (tmp_path / "table.md").exists()
    monkeypatch.setattr(Starter, "start", lambda _, *started: third.start(*started))
    run_quickstart(QUICKSTART, [0], tmp_path, [], redo=False)
    assert third.ran == []


def test_every_step_has_its_share_of_the_time_to_go(tmp_path: Path) -> None:
    planned = steps(tmp_path)
    assert {step.name for step in planned} == SECONDS.keys()
    # The teacher needs no model; evaluations and the row without mid-training run beside the main row.
    row = ("rollouts", "verdicts", "curated", "rows", "midtrain", "sft", "own-rollouts", "own-verdicts")
    longest = (*row, "preferences", "dpo", "grpo", "evaluate-grpo", "release")
    way = Order(planned, 1, SECONDS).way
    by_name = {step.name: way[step] for step in planned}
    assert max(way.values()) == by_name["rollouts"] == sum(SECONDS[name] for name in longest)
    assert by_name["evaluate-grpo"] == SECONDS["evaluate-grpo"] + SECONDS["release"]
    assert by_name["release"] == SECONDS["release"]
    # What has the terminal is always longer than what runs beside it.
    aside = {name for name in by_name if name.startswith("evaluate-") or name == "sft-without-midtrain"}
    row_ways = [by_name[name] for name in longest]
    assert row_ways == sorted(row_ways, reverse=True)
    assert max(by_name[name] for name in aside) < by_name["midtrain"]


def test_steps_side_by_side_wait_for_what_they_read_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The long row first; beside it, in its own words when it is done, what nothing waits for."""
    planned = steps(tmp_path)
    in_all = Order(planned, 2, SECONDS).makespan(planned, {})
    running: dict[str, int] = {}
    most = 0

    class Ticking:
        """A process of a few looks."""

        def __init__(self, step: Step, output: Any) -> None:
            self.step, self.looks = step, 3
            if output is not None:
                output.write(f"beside: {step.name}\n".encode())
                output.flush()
            running[step.name] = 1

        def poll(self) -> int | None:
            self.looks -= 1
            if self.looks:
                return None
            running.pop(self.step.name)
            RunDirectory(self.step.output).finish()
            return 0

    begun: list[str] = []

    def start(_: Starter, step: Step, output: Any = None) -> Ticking:
        nonlocal most
        for other in planned:
            assert not step.reads(other) or RunDirectory(other.output).is_done
        begun.append(step.name)
        process = Ticking(step, output)
        most = max(most, len(running))
        return process

    monkeypatch.setattr(Starter, "start", start)
    run_steps(planned, at_once=2, seconds=SECONDS)
    assert sorted(begun) == sorted(step.name for step in planned)
    assert most == 2
    assert begun.index("evaluate-midtrain") < begun.index("dpo")
    said = capfd.readouterr().out
    assert "beside: evaluate-midtrain\n" in said
    assert "beside: midtrain\n" not in said
    assert "beside: grpo\n" not in said
    assert said.split("\n")[0].endswith(f", about {duration(in_all)} to go in all")


def test_two_ranks_share_what_all_wait_for_and_nothing_else_changes(tmp_path: Path) -> None:
    config = load_config(QuickstartConfig, QUICKSTART, [])
    alone, shared = seed_steps(config, 0, tmp_path), seed_steps(config, 0, tmp_path, ranks=2)
    for one, two in zip(alone, shared, strict=True):
        assert two.processes == (2 if one.name in {"midtrain", "sft"} else 1)
        assert one.processes == 1
        assert two.arguments == (*one.arguments, *(["parallel.data=2"] if two.processes == 2 else []))
        stage_and_config(two)  # the batches divide


def test_the_time_to_go_follows_a_step_that_takes_longer_than_it_usually_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`long` usually takes 100 s and is at work for 300 s when the next one is announced: `after`, which reads it and
    usually takes 100 s as well, is then told to take 300 s, and `long` itself to be about to end."""
    now = 0.0
    long, short, next_ = (Step(name, ("some",), tmp_path / name) for name in ("long", "short", "next"))
    after = Step("after", ("some", f"base={tmp_path / 'long' / 'hf'}"), tmp_path / "after")
    ends = {"long": 310.0, "short": 300.0, "next": 301.0, "after": 700.0}

    class Timed:
        """A process that ends at a time."""

        def __init__(self, step: Step) -> None:
            self.step = step

        def poll(self) -> int | None:
            return 0 if now >= ends[self.step.name] else None

    def sleep(_: float) -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(Starter, "start", lambda _, step, __: Timed(step))
    monkeypatch.setattr(scheduler, "_is_to_run", lambda *_, **__: True)
    monkeypatch.setattr(scheduler, "time", types.SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    run_steps([long, short, next_, after], at_once=2, seconds={"long": 100, "after": 100})
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split(": ")[1].split(",")[0].split(" (")[0] for line in said] == ["long", "short", "next", "after"]
    assert said[0].endswith(f", about {duration(200)} to go in all")
    assert said[2].endswith(f", about {duration(300)} to go in all")


def test_what_runs_beside_a_step_that_fails_is_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes: one refuses, the other would sleep for ever."""
    one, two = (Step(name, ("some",), tmp_path / name) for name in ("refuses", "sleeps"))
    programs = {"refuses": "raise SystemExit(2)", "sleeps": "import time; time.sleep(600)"}
    monkeypatch.setattr(
        Starter,
        "start",
        lambda _, step, output: processes.start([sys.executable, "-c", programs[step.name]], stdout=output),
    )
    monkeypatch.setattr(scheduler, "_is_to_run", lambda *_, **__: True)
    another = processes.start([sys.executable, "-c", programs["sleeps"]])
    with pytest.raises(UserError, match="refuses"):
        run_steps([two, one], at_once=2)
    # No step: the caller's own.
    assert another.poll() is None
    another.kill()
    another.wait()


def test_a_step_that_refuses_its_input_is_the_users_mistake(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step = Step(
        "broken", ("verify", "--config", "conf/verify/tiny.yaml", f"rollouts={tmp_path}/none"), tmp_path / "o"
    )
    with pytest.raises(UserError) as caught:
        run_steps([step])
    assert "'broken'" in caught.value.problem
    assert f"rollouts={tmp_path}/none" in caught.value.remedy
    assert f"{tmp_path}/none does not exist" in capfd.readouterr().err


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (3, Preempted), (1, RuntimeError), (-9, RuntimeError)])
def test_the_exit_code_of_a_step_says_what_happened(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{f'exit {code}' if code >= 0 else f'kill -{-code} $$'}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(error):
        run_steps([Step("some", ("verify", "--config", "conf/verify/tiny.yaml", "rollouts=none"), tmp_path / "o")])


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished evaluation"):
        pipeline.write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
