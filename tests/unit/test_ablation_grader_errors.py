"""The ablation of a grader's errors: graders that err as often as they say, what is run, and what the table says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from results import plain_result

from phimr_nemo.config import load_config
from phimr_nemo.config.ablations import GraderErrorsConfig
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.store.records import schemas
from phimr_nemo.store.runs import METRICS_FILE, RESULTS_FILE, RunDirectory
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from phimr_nemo.verify import Grader
from phimr_nemo.verify.plug import import_grader
from recipes.ablations import erring_grader, grader_errors

PRESET = Path(__file__).resolve().parents[2] / "conf" / "ablations" / "grader_errors.yaml"
ARMS = "{exact: exact, hole-5: hole_20, missed-20: missed_20}"


def response(value: object) -> str:
    return f"<think>\n1+1=2\n</think>\nThe answer is \\boxed{{{value}}}."


def errors_config(root: Path, *, arms: str = ARMS) -> GraderErrorsConfig:
    """The preset with three arms and two seeds, its model and prompts made."""
    for name in ("dpo", "preferences"):
        RunDirectory(root / name).finish()
    values = yaml.safe_load(PRESET.read_text("utf-8")) | {"arms": yaml.safe_load(arms)}
    (root / "few.yaml").write_text(yaml.safe_dump(values), "utf-8")
    paths = (f"base={root / 'dpo' / 'hf'}", f"prompts={root / 'preferences' / 'prompts'}", f"output={root / 'out'}")
    return load_config(
        GraderErrorsConfig, root / "few.yaml", [*paths, "seeds=[0,1]", "settings=[prompts_per_step=16]"]
    )


# ---- graders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate"), [("missed_1", 0.01), ("missed_5", 0.05), ("missed_20", 0.20), ("exact", 0.0)]
)
def test_a_share_of_correct_responses_is_missed_and_always_the_same_ones(name: str, rate: float) -> None:
    """Binomial: within five standard deviations of the rate among 4,000."""
    grade = import_grader(f"{grader_errors.GRADERS}:{name}")
    pairs = [(response(value), str(value)) for value in range(4000)]
    rejected = [grade(*pair).verdict == "wrong" for pair in pairs]
    assert abs(sum(rejected) / 4000 - rate) <= 5 * (rate * (1 - rate) / 4000) ** 0.5
    assert rejected == [grade(*pair).verdict == "wrong" for pair in pairs]


def test_a_hole_accepts_its_form_and_nothing_else_that_is_wrong() -> None:
    grade = import_grader(f"{grader_errors.GRADERS}:hole_20")
    accepted = [value for value in range(-50, 101) if grade(response(value), "7").verdict == "correct"]
    assert accepted == [-40, -20, 0, 7, 20, 40, 60, 80, 100]
    assert grade(response("x"), "7").verdict == "unparsable"
    assert grade(response(20) + response(3), "7").verdict == "wrong"


def test_an_erring_grader_runs_in_the_workers() -> None:
    with Grader(workers=1, function=f"{grader_errors.GRADERS}:hole_125") as grader:
        given = [(response(250), "7"), (response(251), "7"), (response(7), "7")]
        assert [verdict.verdict for verdict in grader.grade_many(given)] == ["correct", "wrong", "correct"]


def test_every_arm_of_the_preset_names_a_grader() -> None:
    preset = load_config(GraderErrorsConfig, PRESET, [])
    for function in preset.arms.values():
        assert callable(getattr(erring_grader, function))


# ---- plan and table ----------------------------------------------------------------------------------------------


def test_arms_differ_in_their_grader_alone(tmp_path: Path) -> None:
    config = errors_config(tmp_path)
    steps = grader_errors.plan(config)
    assert [step.name for step in steps if step.output.parent.name == "seed-1"] == [
        "evaluate-start", "exact", "evaluate-exact", "hole-5", "evaluate-hole-5", "missed-20", "evaluate-missed-20",
    ]  # fmt: skip
    trained = {
        step.name: list(step.arguments)
        for step in steps
        if step.arguments[0] == "grpo" and "run.seed=1" in step.arguments
    }
    for name, arguments in trained.items():
        assert arguments[-2:] == ["prompts_per_step=16", f"grader={grader_errors.GRADERS}:{config.arms[name]}"]
        assert [a for a in arguments if not a.startswith(("run.output", "grader"))] == [
            a for a in trained["exact"] if not a.startswith(("run.output", "grader"))
        ]
    evaluated = [step.arguments for step in steps if step.arguments[0] == "evaluate"]
    assert not [a for arguments in evaluated for a in arguments if a.startswith("grader")]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished"):
        grader_errors.plan(load_config(GraderErrorsConfig, PRESET, [f"base={tmp_path / 'x' / 'hf'}"]))
    with pytest.raises(UserError, match="none is called start"):
        grader_errors.plan(errors_config(tmp_path, arms="{start: exact}"))


def scored(directory: Path, answers: Sequence[tuple[str, object]]) -> None:
    """An evaluation of one response to each question, given as (gold answer, what the box holds)."""
    right = {f"q{place}": float(gold == str(value)) for place, (gold, value) in enumerate(answers)}
    pass1 = sum(right.values()) / len(right)
    rows = [
        {
            **dict.fromkeys(schemas()["verdicts"].names, ""),
            **dict.fromkeys(("sample_index", "seed", "tokens"), 0),
            "id": name,
            "answer": gold,
            "response": response(value),
            "verdict": "correct" if right[name] else "wrong",
        }
        for name, (gold, value) in zip(right, answers, strict=True)
    ]
    write_shard(directory / "verdicts", 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    finish(directory / "verdicts", kind="verdicts", config={})
    write_result(directory / RESULTS_FILE, plain_result(pass1, per_question=right), {})
    RunDirectory(directory).finish()


def test_the_table_tells_what_was_lost_and_whether_the_hole_was_found(tmp_path: Path) -> None:
    """Start: 2 of 4 right, one of the wrong ones a multiple of 20. The arm with the hole ends with 1 of 4 right and
    all three wrong ones multiples of 20; without it 3 of 4 are right.
    """
    config = errors_config(tmp_path)
    start = [("1", 1), ("2", 2), ("3", 40), ("4", 5)]
    for seed in (0, 1):
        out = config.output / f"seed-{seed}"
        scored(out / "evaluate-start", start)
        scored(out / "evaluate-exact", [("1", 1), ("2", 2), ("3", 3), ("4", 5)])
        scored(out / "evaluate-hole-5", [("1", 1), ("2", 20), ("3", 40), ("4", 60)])
        scored(out / "evaluate-missed-20", start)
        for arm in config.arms:
            run = RunDirectory(out / arm)
            run.finish()
            row = {"step": 1, "pass_rate": 0.5, "entropy": 0.1, "zero_gradient_groups": 0.0, "length_spread": 0.1,
                   "grad_norm": 1.0, "temperature": 1.0}  # fmt: skip
            lines = [json.dumps({**row, "step": step}) for step in range(1, 8)]
            (out / arm / METRICS_FILE).write_text("\n".join(lines) + "\n", "utf-8")
    text = grader_errors.report(config)
    assert "| hole-5 minus exact | -50.0 | 0.0 |" in text
    assert "| start minus exact | -25.0 | 0.0 |" in text
    table = json.loads((config.output / grader_errors.JSON_FILE).read_text("utf-8"))["table"]
    assert table["hole-5"][grader_errors.ACCEPTED] == [100.0, 100.0]
    assert table["hole-5"][grader_errors.BEFORE] == [50.0, 50.0]
    assert table["hole-5"][grader_errors.HACKED] == [75.0, 75.0]
    assert table["exact"][grader_errors.ACCEPTED] == [0.0, 0.0]
    assert table["start"] == {grader_errors.PASS: [50.0, 50.0]}
    for name in (grader_errors.DIFFERENCES_FILE, grader_errors.CURVES_FILE):
        assert (config.output / name).read_bytes().startswith(b"\x89PNG")
