"""The ablation of DPO's negatives: what it runs, what it computes from finished arms, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from results import plain_result

from phimr_nemo.config import load_config
from phimr_nemo.config.ablations import DPONegativesConfig
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.store.runs import RunDirectory
from recipes.ablations.dpo_negatives import NEEDED, PLOT_FILE, plan, report

QUESTIONS = 4
# pass@1 of each question, by arm and seed.
SCORES = {
    ("sft", 0): [0.0, 0.5, 0.5, 1.0],
    ("near_miss", 0): [0.5, 0.5, 1.0, 1.0],
    ("random", 0): [0.5, 1.0, 0.5, 1.0],
    ("sft", 1): [0.0, 0.0, 0.0, 1.0],
    ("near_miss", 1): [0.0, 0.0, 0.0, 1.0],
    ("random", 1): [1.0, 0.0, 0.0, 1.0],
}


def config(root: Path, *overrides: str) -> DPONegativesConfig:
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}", *overrides]
    path = Path(__file__).resolve().parents[2] / "conf" / "ablations" / "dpo_negatives.yaml"
    return load_config(DPONegativesConfig, path, settings)


def finished_quickstart(root: Path, seeds: tuple[int, ...] = (0, 1)) -> None:
    for seed in seeds:
        root.mkdir(exist_ok=True)
        (root / f"seed-{seed}-data.png").touch()
        for name in NEEDED:
            RunDirectory(root / f"seed-{seed}" / name).finish()


def evaluated(root: Path) -> None:
    for (arm, seed), scores in SCORES.items():
        mean = sum(scores) / QUESTIONS
        error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (QUESTIONS - 1) / QUESTIONS)
        per_question = {f"q{number}": score for number, score in enumerate(scores)}
        result = plain_result(mean, questions=QUESTIONS, stderr=error, per_question=per_question)
        path = root / "out" / f"seed-{seed}" / f"evaluate-{arm}" / "results.json"
        path.parent.mkdir(parents=True)
        write_result(path, result, {"row": arm, "benchmark": "synthetic"})


def test_both_arms_differ_in_the_mode_alone(tmp_path: Path) -> None:
    finished_quickstart(tmp_path / "quickstart")
    steps = [step for step in plan(config(tmp_path)) if step.output.parent.name == "seed-1"]
    assert [step.name for step in steps] == [
        *("evaluate-sft", "pairs-near_miss", "dpo-near_miss", "evaluate-near_miss"),
        *("pairs-random", "dpo-random", "evaluate-random"),
    ]
    one, other = ([str(step) for step in steps[start : start + 3]] for start in (1, 4))
    assert [text.replace("near_miss", "random") for text in one] == other
    assert all("run.seed=1" in step.arguments for step in steps)
    assert f"base={tmp_path / 'quickstart' / 'seed-1' / 'sft' / 'hf'}" in steps[2].arguments


def test_table_and_picture_say_what_the_arms_scored(tmp_path: Path) -> None:
    """Near-miss minus SFT by question is (.5, 0, .5, 0) and 0: means 25 and 0, so 12.5 +- 12.5 over seeds."""
    finished_quickstart(tmp_path / "quickstart")
    evaluated(tmp_path)
    text = report(config(tmp_path))
    assert (tmp_path / "out" / "table.md").read_text("utf-8") == text
    within = 100 * math.sqrt((4 * 0.25**2) / 3 / 4)
    assert (
        f"| DPO, near-miss negatives minus SFT, where both begin | +12.5 | 12.5 | +25.0 ({within:.1f}) | +0.0 (0.0) |"
        in text
    )
    assert "| DPO, random negatives minus SFT, where both begin | +25.0 | 0.0 |" in text
    assert "| DPO, near-miss negatives minus DPO, random negatives | -12.5 | 12.5 |" in text
    assert "| DPO, near-miss negatives | 50.0 |" in text
    assert (tmp_path / "out" / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_unfinished_or_absent_quickstarts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="phimr quickstart"):
        plan(config(tmp_path))
    (tmp_path / "quickstart" / "seed-0" / "sft").mkdir(parents=True)
    with pytest.raises(UserError, match=r"seed-0 has no finished \['sft', 'own-verdicts'\]"):
        plan(config(tmp_path))


def test_a_seed_counts_once(tmp_path: Path) -> None:
    finished_quickstart(tmp_path / "quickstart", (0,))
    finished_quickstart(tmp_path / "again", (0,))
    with pytest.raises(UserError, match="is seed 0 again"):
        plan(config(tmp_path, f"quickstarts=[{tmp_path / 'quickstart'},{tmp_path / 'again'}]"))
