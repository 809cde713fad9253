"""The plan of the quickstart: every step reads what an earlier one wrote, and a finished step is not run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import STAGES, EvaluateConfig, GenerateConfig, QuickstartConfig, SyntheticProblems, load_config
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.jobs import quickstart as pipeline
from phimr_nemo.jobs.preflight import file_inputs, record_inputs
from phimr_nemo.jobs.quickstart import ROWS, Step, plan_quickstart, run_quickstart, run_step, seed_steps
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
    """Stands for the processes: marks a step's run as done, stops where it is told to."""

    def __init__(self, stop_at: str | None = None, error: BaseException | None = None) -> None:
        self.ran: list[str] = []
        self.stop_at, self.error = stop_at, error

    def __call__(self, step: Step) -> None:
        if step.name == self.stop_at and self.error is not None:
            raise self.error
        self.ran.append(step.name)
        RunDirectory(step.output).finish()


@pytest.mark.parametrize(
    "error", [Preempted("later"), KeyboardInterrupt(), RuntimeError("broken"), UserError("a", rule="b", remedy="c")]
)
def test_an_interrupted_quickstart_continues_at_the_step_it_was_in(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "write_report", lambda _, out: (out / "table.md").write_text("table"))
    monkeypatch.setattr(pipeline, "answers", lambda _: iter(()))
    names = [step.name for step in steps(tmp_path)]
    first, second, third = Recorder("dpo", error), Recorder(), Recorder()
    monkeypatch.setattr(pipeline, "run_step", first)
    with pytest.raises(type(error)):
        run_quickstart(QUICKSTART, [0], tmp_path, [], redo=False)
    assert first.ran == names[: names.index("dpo")]
    assert not (tmp_path / "table.md").exists()
    monkeypatch.setattr(pipeline, "run_step", second)
    run_quickstart(QUICKSTART, [0], tmp_path, [], redo=False)
    assert second.ran == names[names.index("dpo") :]
    assert (tmp_path / "table.md").exists()
    monkeypatch.setattr(pipeline, "run_step", third)
    run_quickstart(QUICKSTART, [0], tmp_path, [], redo=False)
    assert third.ran == []


def test_a_step_that_refuses_its_input_is_the_users_mistake(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step = Step(
        "broken", ("verify", "--config", "conf/verify/tiny.yaml", f"rollouts={tmp_path}/none"), tmp_path / "o"
    )
    with pytest.raises(UserError) as caught:
        run_step(step)
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
        run_step(Step("some", ("report",), tmp_path))


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished evaluation"):
        pipeline.write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
