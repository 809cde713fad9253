"""The ablation of verification and of solutions a question: arms differ in what is named, and train equally long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results import plain_result

from phimr_nemo.config import load_config
from phimr_nemo.config.ablations import SolutionsConfig
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.store.records import Kind, schemas
from phimr_nemo.store.runs import RESULTS_FILE, RunDirectory
from phimr_nemo.store.shards import finish, write_shard
from phimr_nemo.verify import Grader
from recipes.ablations import solutions

CONF = Path(solutions.__file__).resolve().parents[2] / "conf" / "ablations" / "solutions.yaml"


def config(root: Path, *overrides: str) -> SolutionsConfig:
    RunDirectory(root / "quickstart" / "seed-0" / "midtrain").finish()
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}"]
    return load_config(SolutionsConfig, CONF, [*settings, *overrides])


def words_of(steps: list[solutions.Step], name: str) -> list[str]:
    (step,) = (step for step in steps if step.name == name)
    return list(step.arguments)


def test_every_arm_asks_for_one_total_and_trains_for_the_same_steps(tmp_path: Path) -> None:
    made = config(tmp_path)
    steps = solutions.ablation_steps(made)
    assert len(solutions.arms(made)) == 8
    for count in (1, 2, 4, 8):
        words = words_of(steps, f"rollouts-{count}")
        asked = next(int(word.split("=")[1]) for word in words if word.startswith("problems.count="))
        assert asked * count == made.total
        assert f"rollouts_per_problem={count}" in words
    for name in solutions.arms(made):
        assert f"max_steps={made.steps}" in words_of(steps, f"midtrain-{name}")


def test_verified_and_unverified_differ_in_the_grader_alone(tmp_path: Path) -> None:
    steps = solutions.ablation_steps(config(tmp_path))
    one, other = words_of(steps, "verdicts-4-verified"), words_of(steps, "verdicts-4-unverified")
    assert [word.replace("unverified", "verified") for word in other if word not in one][1:] == [
        f"grader={solutions.ACCEPTS_EVERYTHING}".replace("unverified", "verified")
    ]
    with Grader(workers=1, function=solutions.ACCEPTS_EVERYTHING) as grader:
        verdicts = grader.grade_many([("so \\boxed{5}", "4"), ("", "4")])
    assert [verdict.verdict for verdict in verdicts] == ["correct", "correct"]


def test_a_total_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple"):
        config(tmp_path, "solutions=[1,7]")


def test_the_table_is_made_of_what_the_steps_leave(tmp_path: Path) -> None:
    made = config(tmp_path, "solutions=[1,2]")
    for step in solutions.ablation_steps(made):
        kind: Kind = "conversations" if step.name.startswith("curated") else "rows"
        directory = step.output / "midtrain" if kind == "conversations" else step.output
        if step.name.startswith(("curated", "rows")):
            write_shard(directory, 0, schemas()[kind].empty_table(), kind=kind)
            finish(directory, kind=kind, config={}, counts={"tokens": 7})
        if step.name.startswith("evaluate"):
            right = step.name.endswith("-verified")
            result = plain_result(float(right), per_question={"q": float(right), "p": 0.0})
            write_result(step.output / RESULTS_FILE, result, {})
        RunDirectory(step.output).finish()
    solutions.report(made)
    told = json.loads((made.output / solutions.TABLE_JSON).read_text("utf-8"))
    assert {name: measures[solutions.PASS1] for name, measures in told["table"].items()} == {
        name: [100.0 if kind == solutions.VERIFIED else 0.0] for name, (_, kind) in solutions.arms(made).items()
    }
    assert told["table"]["2-verified"][solutions.QUESTIONS] == [made.total // 2]
    assert {name: each[0][0] for name, each in told["pass1_points"].items()} == {
        "1-unverified minus 1-verified": -50.0,
        "2-unverified minus 2-verified": -50.0,
        "2-verified minus 1-verified": 0.0,
    }
