"""The ablations of GRPO: what they run, what they compute from finished runs, and why one arm equals another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from results import plain_result

from phimr_nemo.config import load_config
from phimr_nemo.config.ablations import GRPORemediesConfig, GRPOSizesConfig, Recipe2026Config
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.losses.advantages import ADVANTAGE_EPSILON, group_advantages
from phimr_nemo.store.runs import METRICS_FILE, RESULTS_FILE, RunDirectory
from recipes.ablations import grpo_remedies, grpo_sizes, recipe2026
from recipes.ablations.grpo_runs import agreement, figures, moving_mean, worst_drop

REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = (0, 1)


def remedies(root: Path, *overrides: str) -> GRPORemediesConfig:
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}", *overrides]
    return load_config(GRPORemediesConfig, REPOSITORY / "conf" / "ablations" / "grpo_remedies.yaml", settings)


def sizes(root: Path) -> GRPOSizesConfig:
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}"]
    return load_config(GRPOSizesConfig, REPOSITORY / "conf" / "ablations" / "grpo_sizes.yaml", settings)


def recipe(root: Path, *overrides: str) -> Recipe2026Config:
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}", *overrides]
    return load_config(Recipe2026Config, REPOSITORY / "conf" / "ablations" / "recipe2026.yaml", settings)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A place with finished quickstarts."""
    for seed in SEEDS:
        for name in {*grpo_remedies.NEEDED, *grpo_sizes.NEEDED, *recipe2026.NEEDED}:
            RunDirectory(tmp_path / "quickstart" / f"seed-{seed}" / name).finish()
    return tmp_path


# ---- an affine reward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_advantages_see_an_affine_reward_through_epsilon_alone(seed: int) -> None:
    """With r' = a r + b a group's centred reward and deviation become a d and a s, so that::

        a d / (a s + e) = d / (s + e) * (s + e) / (s + e / a)

    which tends to 1 with e / s. For +1/-1 against 1/0, a = 2, and the smallest deviation of a group of n is
    1 / sqrt(n): the factor is between 1 and 1 + e sqrt(n) / 2.
    """
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 17, (), generator=generator))
    right = (torch.rand(6, size, generator=generator) < torch.rand(6, 1, generator=generator)).double().flatten()
    groups = torch.arange(6).repeat_interleave(size)
    scale, shift = (3 * torch.rand(2, generator=generator, dtype=torch.float64) + 0.1).tolist()
    plain = group_advantages(right, groups)
    affine = group_advantages(scale * right - shift, groups)
    deviation = right.view(6, size).std(dim=1).repeat_interleave(size)
    factor = (deviation + ADVANTAGE_EPSILON) / (deviation + ADVANTAGE_EPSILON / scale)
    torch.testing.assert_close(affine, plain * factor, rtol=1e-9, atol=1e-12)
    signed = group_advantages(2 * right - 1, groups)
    largest = 1 + ADVANTAGE_EPSILON * math.sqrt(size) / 2
    assert (signed.abs() >= plain.abs() * (1 - 1e-12)).all()
    assert (signed.abs() <= plain.abs() * largest).all()


def test_a_reward_that_is_no_affine_function_is_seen() -> None:
    """The planted fault: half a point for a nearly right answer changes the advantages."""
    groups = torch.zeros(4, dtype=torch.int64)
    plain = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), groups)
    graded = group_advantages(torch.tensor([1.0, 0.5, 0.0, 0.0]), groups)
    assert (plain - graded).abs().max() > 0.5


# ---- figures -----------------------------------------------------------------------------------------------------


def row(step: int, rate: float, **others: float) -> dict[str, float]:
    return {
        "step": step,
        "pass_rate": rate,
        "entropy": 0.1 * step,
        "length_spread": 0.02,
        "zero_gradient_groups": 0.25,
        "temperature": 1.0,
        **others,
    }


def test_figures_of_a_run_are_those_worked_out_by_hand() -> None:
    """Rates 50 60 50 60 50 60: changes +10 -10 +10 -10 +10, mean 2, squares 64 x 3 + 144 x 2 = 480, over 4 = 120."""
    rows = [row(step, 0.5 if step % 2 else 0.6) for step in range(1, 7)]
    rows[0]["grad_norm"], rows[3]["grad_norm"], rows[5]["grad_norm"] = 1.0, 2.0, 6.0
    found = figures(rows)
    assert found["gradient norm"] == pytest.approx(3.0)
    assert found["largest / median gradient norm"] == pytest.approx(3.0)
    assert found["entropy (nats a token)"] == pytest.approx(0.35)
    assert found["groups without gradient (%)"] == pytest.approx(25.0)
    jitter = "step-to-step change of the pass rate, standard deviation (points)"
    assert found[jitter] == pytest.approx(math.sqrt(120))
    assert "gradient norm" not in figures([row(step, 0.5) for step in range(1, 7)])


def test_worst_drop_is_the_deepest_fall_below_the_best_so_far() -> None:
    """Means of two: 1 3 5 4 2 4 6 5; the fall from 5 to 2 is deeper than that from 6 to 5."""
    assert worst_drop([1, 1, 5, 5, 3, 1, 7, 5, 5], 2) == pytest.approx(3.0)
    assert worst_drop([1, 2, 3], 1) == 0.0
    for values in ([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0]):
        means = [sum(values[i : i + 3]) / 3 for i in range(len(values) - 2)]
        brute = max(max(means[: i + 1]) - means[i] for i in range(len(means)))
        assert worst_drop(values, 3) == pytest.approx(brute)


def test_moving_mean_looks_back_only() -> None:
    assert moving_mean([2.0, 4.0, 6.0, 0.0], 2) == [2.0, 3.0, 5.0, 3.0]


def test_agreement_ends_at_the_first_other_pass_rate() -> None:
    first = [row(1, 0.5, grad_norm=2.0), row(2, 0.5), row(3, 0.6, grad_norm=1.0), row(4, 0.7, grad_norm=1.0)]
    second = [row(1, 0.5, grad_norm=2.02), row(2, 0.5), row(3, 0.6, grad_norm=1.0), row(4, 0.8, grad_norm=9.0)]
    assert agreement(first, second) == (3, pytest.approx(0.01))
    assert agreement(first, first) == (4, 0.0)


# ---- plans and reports -------------------------------------------------------------------------------------------


def test_arms_start_alike_and_differ_in_their_settings_alone(root: Path) -> None:
    config = remedies(root)
    steps = [step for step in grpo_remedies.plan(config) if step.output.parent.name == "seed-1"]
    assert [step.name for step in steps] == [f"{kind}{arm}" for arm in config.arms for kind in ("", "evaluate-")]
    trained = {step.name: step.arguments for step in steps[::2]}
    common = trained["annealed"][4:]
    start = root / "quickstart" / "seed-1"
    assert f"base={start / 'dpo' / 'hf'}" in common
    assert f"prompts={start / 'preferences' / 'prompts'}" in common
    for arm, settings in config.arms.items():
        assert trained[arm][3:] == (f"run.output={root / 'out' / 'seed-1' / arm}", *common, *settings)


def test_every_size_goes_through_the_same_steps(root: Path) -> None:
    config = sizes(root)
    steps = [step for step in grpo_sizes.plan(config) if step.output.parent.parent.name == "seed-0"]
    each = {
        size: [str(step).replace(size, "SIZE") for step in steps if step.output.parent.name == size]
        for size in config.sizes
    }
    plain = each["hidden-128"]
    for size, settings in config.sizes.items():
        assert each[size] == [" ".join((plain[0], *settings)), *plain[1:]]
    assert len(plain) == 6 + 2 + 3


def test_an_arm_that_should_be_equal_must_exist(root: Path) -> None:
    with pytest.raises(UserError, match="equal=reward-2"):
        grpo_remedies.plan(remedies(root, "equal=reward-2"))


def finished_arm(out: Path, arm: str, rates: Sequence[float], scores: Sequence[float]) -> None:
    run = out / arm
    run.mkdir(parents=True)
    rows = [row(step, rate, grad_norm=0.5) for step, rate in enumerate(rates, 1)]
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in rows), "utf-8")
    RunDirectory(run).finish()
    evaluated(out / f"evaluate-{arm}", scores)


def evaluated(path: Path, scores: Sequence[float]) -> None:
    mean = sum(scores) / len(scores)
    per_question = {f"q{number}": score for number, score in enumerate(scores)}
    result = plain_result(mean, questions=len(scores), stderr=0.0, per_question=per_question)
    path.mkdir(parents=True)
    write_result(path / RESULTS_FILE, result, {"row": path.name, "benchmark": "synthetic"})


def test_tables_and_pictures_say_what_the_runs_did(root: Path) -> None:
    """ "other" is 25 and 50 points above the first arm in its two seeds: 37.5 +- 12.5."""
    config = replace(remedies(root), arms={"first": (), "other": ("kl=0.1",)}, equal="other", steps=6)
    for seed in SEEDS:
        out = root / "out" / f"seed-{seed}"
        finished_arm(out, "first", [0.5, 0.5, 0.6, 0.6, 0.7, 0.7], [0.0, 0.5, 0.5, 1.0])
        better = [1.0, 1.0, 1.0, 1.0] if seed else [0.5, 0.5, 1.0, 1.0]
        finished_arm(out, "other", [0.5, 0.5, 0.6, 0.7, 0.7, 0.7], better)
    text = grpo_remedies.report(config)
    assert (root / "out" / "table.md").read_text("utf-8") == text
    assert "| other minus first | +37.5 | 12.5 | +25.0" in text
    assert "Seed 0: other and first have the same pass rate in their first 3 of 6 steps" in text
    assert "| first | 50.0 |" in text
    for name in (grpo_remedies.CURVES_FILE, grpo_remedies.DIFFERENCES_FILE):
        assert (root / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_arm_is_named(root: Path) -> None:
    config = replace(remedies(root), arms={"first": ()}, equal="first")
    for seed in SEEDS:
        evaluated(root / "out" / f"seed-{seed}" / "evaluate-first", [0.0, 1.0])
    with pytest.raises(UserError, match=r"seed-0.first has not finished"):
        grpo_remedies.report(config)


def test_sizes_report_every_size_and_arm(root: Path) -> None:
    config = sizes(root)
    for seed in SEEDS:
        for place, size in enumerate(config.sizes):
            out = root / "out" / f"seed-{seed}" / size
            evaluated(out / "evaluate-sft", [0.0, 0.0])
            for arm in config.arms:
                rates = [0.1 * place + 0.05 * seed + 0.01 * step for step in range(8)]
                finished_arm(out, arm, rates, [0.5, 0.5 * place])
    text = grpo_sizes.report(config)
    assert "| hidden-64, sft | 0.0 |" in text
    assert "| hidden-192, no-remedy | 75.0 |" in text
    assert (root / "out" / grpo_sizes.PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def arms_of(config: Recipe2026Config) -> list[str]:
    """The arms of all groups, by hand."""
    groups = {"dpo": config.dpo, "grpo": config.grpo, "two-updates": config.two_updates}
    return [f"{group}-{arm}" for group, arms in groups.items() for arm in arms]


def test_the_recipe_of_2026_goes_end_to_end_and_value_by_value(root: Path) -> None:
    config = recipe(root)
    steps = {step.name: step for step in recipe2026.plan(config) if step.output.parent.name == "seed-1"}
    start, out = root / "quickstart" / "seed-1", root / "out" / "seed-1"
    for stage, arms in (("dpo", config.dpo), ("grpo", config.grpo)):
        first = steps[f"{stage}-paper"].arguments
        assert first[:3] == (stage, "--config", f"conf/{stage}/tiny.yaml")
        for arm, settings in arms.items():
            assert steps[f"{stage}-{arm}"].arguments[4:] == (*first[4:], *settings)
    first, other = (steps[f"two-updates-{arm}"].arguments for arm in ("paper", "cispo"))
    assert first[-1] == "inner_batches=2"
    assert other[4:] == (*first[4:], *config.grpo["cispo"])
    # The whole recipe is its values together: nothing else is in it, and nothing of it is left out.
    for arms in (config.dpo, config.grpo):
        each = {setting for arm, settings in arms.items() if arm != "recipe2026" for setting in settings}
        assert set(arms["recipe2026"]) == each
    pairs, dpo, grpo = (steps[name].arguments for name in ("end-to-end-pairs", "end-to-end-dpo", "end-to-end"))
    assert pairs[-1] == "pairs.mode=random"
    assert f"pairs={out / 'end-to-end-pairs' / 'pairs'}" in dpo
    assert f"base={start / 'sft' / 'hf'}" in dpo
    assert [item for item in grpo if item.startswith("base=")][-1] == f"base={out / 'end-to-end-dpo' / 'hf'}"
    evaluated_models = {name for name in steps if name.startswith("evaluate-")}
    assert evaluated_models == {f"evaluate-{name}" for name in (*arms_of(config), "end-to-end")}


@pytest.mark.parametrize("whole", ["paper-2025", "cispo"])
def test_the_whole_recipe_is_an_arm_of_both_stages(root: Path, whole: str) -> None:
    with pytest.raises(UserError, match=f"whole={whole}"):
        recipe(root, f"whole={whole}")


def test_a_change_is_judged_by_its_error_over_seeds(root: Path) -> None:
    """In seeds 0 and 1: cispo +25, +25; batch-scale +50, 0; no-technique -25, -25; the rest 0."""
    config = recipe(root)
    changes = {"grpo-cispo": (0.25, 0.25), "grpo-batch-scale": (0.5, 0.0), "grpo-no-technique": (-0.25, -0.25)}
    for name in (*arms_of(config), "end-to-end"):
        for seed in SEEDS:
            change = changes.get(name, (0.0, 0.0))[seed]
            evaluated(root / "out" / f"seed-{seed}" / f"evaluate-{name}", [0.5 + change] * 4)
    text = recipe2026.report(config)
    assert "| grpo-cispo minus grpo-paper | helps |" in text
    assert "| two-updates-cispo minus two-updates-paper | not visible at this size |" in text
    assert "| grpo-batch-scale minus grpo-paper | not visible at this size |" in text
    assert "| grpo-no-technique minus grpo-paper | hurts |" in text
    assert "| end-to-end minus grpo-paper | not visible at this size |" in text
    assert "| grpo-batch-scale minus grpo-paper | +25.0 | 25.0 |" in text
    assert recipe2026.verdict([3.0]) == "not visible at this size", "one seed has no error"
    assert (root / "out" / recipe2026.PICTURE).read_bytes().startswith(b"\x89PNG")
