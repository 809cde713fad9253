"""What a stage says at its end: the figures are those of its files, and the next command is one that can be typed."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from results import plain_result
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.jobs.closing import closing_lines, next_command
from phimr_nemo.jobs.quickstart import seed_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.runs import RESULTS_FILE, MetricsWriter, RunDirectory

TINY = "tiny.yaml"


def said(stage: str, run: Path, *, is_part: bool = False) -> list[str]:
    config = SimpleNamespace(run=SimpleNamespace(output=run))
    return list(closing_lines(stage, config, Path("conf") / stage / TINY, 65.0, is_part=is_part))


def quickstart_steps(root: Path) -> list[Step]:
    from phimr_nemo.config import QuickstartConfig

    return seed_steps(load_config(QuickstartConfig, Path("conf/quickstart/tiny.yaml")), 0, root)


def facts_of(name: str) -> dict[str, Any]:
    return {"pairs": 10} if name == "preferences" else {}


FOLLOWS = {
    "rollouts": "verdicts",
    "verdicts": "curated",
    "curated": "rows",
    "rows": "midtrain",
    "midtrain": "sft",
    "sft": "own-rollouts",
    "own-rollouts": "own-verdicts",
    "own-verdicts": "preferences",
    "preferences": "dpo",
    "dpo": "grpo",
}


@pytest.mark.parametrize("name", FOLLOWS)
@pytest.mark.parametrize("root", ["runs", "elsewhere/mine"])
def test_the_next_command_is_the_recipes_next_step(name: str, root: str) -> None:
    """Typed one after the other the commands are the quickstart: same stages, same inputs, same outputs."""
    steps = {step.name: step for step in quickstart_steps(Path(root))}
    done, after = steps[name], steps[FOLLOWS[name]]
    words = shlex.split(next_command(done.arguments[0], done.output, Path(done.arguments[2]), facts_of(name)))
    assert words[:4] == ["phimr", *after.arguments[:3]]
    typed = load_config(STAGES[words[1]], Path(words[3]), words[4:])
    planned = load_config(STAGES[words[1]], Path(words[3]), after.arguments[3:])
    assert typed.run.output == planned.run.output
    for key in ("base", "data", "pairs", "prompts", "rollouts", "verdicts", "conversations", "tokenizer"):
        assert getattr(typed, key, None) == getattr(planned, key, None)


@pytest.mark.parametrize(
    ("stage", "facts", "command"),
    [
        ("base", {}, "phimr generate --config conf/generate/tiny.yaml"),
        ("prepare", {"rollouts": 3}, "phimr verify --config conf/verify/tiny.yaml rollouts=runs/x/rollouts"),
        ("grpo", {}, "phimr evaluate --config conf/evaluate/tiny.yaml model=runs/x/hf"),
        ("distill", {}, "phimr evaluate --config conf/evaluate/tiny.yaml model=runs/x/hf"),
        ("evaluate", {}, "phimr report runs/x"),
        ("export", {}, "phimr chat runs/x/hf"),
    ],
)
def test_the_next_command_elsewhere(stage: str, facts: dict[str, Any], command: str) -> None:
    assert next_command(stage, Path("runs/x"), Path("conf") / stage / TINY, facts) == command


def test_prepared_problems_go_to_a_teacher() -> None:
    words = shlex.split(next_command("prepare", Path("runs/x"), Path("conf/prepare/tiny.yaml"), {"problems": 3}))
    config = load_config(STAGES["generate"], Path("conf/generate/paper.yaml"), words[2:])
    assert (config.problems.kind, config.problems.path) == ("records", Path("runs/x/problems"))
    assert config.teacher.engine.kind == "endpoint"


def test_a_training_stage_tells_of_its_newest_tenth(tmp_path: Path) -> None:
    losses = [10.0] * 90 + [1.0, 2.0] * 5
    with MetricsWriter(tmp_path) as writer:
        for step, loss in enumerate(losses, 1):
            writer.write(step, {"loss": loss})
        writer.write(100, {"val_loss": 7.0})
    RunDirectory(tmp_path).finish(steps=100, hf="hf")
    assert said("midtrain", tmp_path)[:2] == [
        "midtrain: steps 100, loss 1.5, val_loss 7; 1 min 05 s",
        f"  made: {tmp_path}/hf",
    ]


def test_an_evaluation_tells_its_score(tmp_path: Path) -> None:
    write_result(tmp_path / RESULTS_FILE, plain_result(0.5, questions=8, samples=4, stderr=0.25), {"row": "x"})
    RunDirectory(tmp_path).finish(questions=8, samples=4, pass1=0.5)
    assert said("evaluate", tmp_path)[0] == "evaluate: pass@1 50.0 ± 25.0 %, questions 8, samples 4; 1 min 05 s"


def test_counts_and_shares_of_the_data_steps(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "a").finish(rows=200, correct=150, wrong=40, unparsable=10)
    assert said("verify", tmp_path / "a")[0].startswith("verify: answers 200, correct 75.0%, wrong 20.0%;")
    RunDirectory(tmp_path / "e").finish(rows=200, wrong=20, error=120, gold_unreadable=60)
    assert said("verify", tmp_path / "e")[0].startswith(
        "verify: answers 200, correct 0.0%, wrong 10.0%, gold_unreadable 30.0%, error 60.0%;"
    )
    RunDirectory(tmp_path / "p").finish(problems=3, rollouts=7, read=40, trajectories=9, **{"mine: read": 40})
    assert said("prepare", tmp_path / "p")[0].startswith("prepare: read 40, problems 3, rollouts 7;")
    RunDirectory(tmp_path / "b").finish(rows=5, b=2, c=9, d=3)
    assert said("generate", tmp_path / "b")[0].startswith("generate: rows 5, c 9, d 3;")


def test_a_part_of_another_command_names_no_next_one(tmp_path: Path) -> None:
    RunDirectory(tmp_path).finish(rows=1)
    assert [line.split(":")[0] for line in said("generate", tmp_path, is_part=True)] == ["generate", "  made"]


def test_an_unfinished_share_says_so(tmp_path: Path) -> None:
    assert said("generate", tmp_path) == [
        "generate: this process's share is done in 1 min 05 s; shards of others are still to come"
    ]


def test_the_command_says_it_and_says_it_again(tmp_path: Path) -> None:
    """A second call finds the work done and is not silent either."""
    output = tmp_path / "rollouts"
    command = ["generate", "--config", "conf/generate/tiny.yaml", f"run.output={output}", "problems.count=4"]
    for is_again in (False, True):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        lines = done.stdout.splitlines()
        if is_again:
            assert lines.pop(0).startswith("generate: has finished already ")
        assert lines[0].startswith("generate: rows 8, ")
        following = next_command("generate", output, Path(command[2]), {})
        assert lines[1:] == [f"  made: {output}", f"  next: {following}"]
