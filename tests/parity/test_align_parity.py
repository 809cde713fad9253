"""DPO and GRPO in other layouts, and resumed, equal one uninterrupted process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from align_inputs import make_case, make_inputs
from align_worker import run_case
from distributed import RanksFailed, run_distributed

from phimr_nemo.model.files.hf import HFDirectory

pytestmark = pytest.mark.slow

Weights = dict[str, torch.Tensor]
FINAL_NORM = "model.norm.weight"
STEPS = 4
STOP = 2
WEIGHT_TOLERANCE = 1e-3
"""Root mean square, of the movement's: Adam makes whole steps of gradients that are nothing but rounding, so that
some numbers differ visibly, and all together by less than 1e-4. A vector that stands still is 2e-2."""
CURVE_TOLERANCE = 2e-5
"""Largest relative or absolute difference of a metric between layouts, in float32 after four updates."""

NOT_COMPARED = {
    "time",
    "step_time",
    "sync_seconds",
    "refill_seconds",
    "sample_seconds",
    "reward_seconds",
    "logprob_seconds",
    "train_seconds",
    # Of this machine at that moment.
    "tokens_per_second_per_gpu",
    "valid_tokens_per_second_per_gpu",
    "slots_per_second_per_gpu",
    "model_tflops_per_gpu",
    "memory_gib",
}
# Differences of nearly equal numbers: rounding itself.
ROUNDING = {"logprob_gap", "kl_to_old"}


TP2, PP2, DP2, CP2 = (f"parallel.{part}=2" for part in ("tensor", "pipeline", "data", "context"))
PACKED, ONLINE = "packed=true", "reference.kind=online"
PACKED_LAYOUTS = {"tp2": (TP2,), "sp2": (TP2, "parallel.sequence=true"), "pp2": (PP2,), "dp2": (DP2,), "cp2": (CP2,)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this file, each in the directory of its name."""
    root = tmp_path_factory.mktemp("align")
    make_inputs(root)
    two = [
        make_case(root, "dpo-tp2", "dpo", TP2),
        make_case(root, "dpo-sp2", "dpo", TP2, "parallel.sequence=true"),
        make_case(root, "dpo-pp2", "dpo", PP2),
        make_case(root, "dpo-dp2", "dpo", DP2),
        make_case(root, "dpo-cp2", "dpo", CP2),
        make_case(root, "dpo-zero2", "dpo", DP2, "optim.distributed=false"),
        *(make_case(root, f"dpo-packed-{name}", "dpo", PACKED, *layout) for name, layout in PACKED_LAYOUTS.items()),
        make_case(root, "dpo-online-pp2", "dpo", PP2, ONLINE, PACKED),
        make_case(root, "dpo-pp2-fault", "dpo", PP2, fault="embedding gradients not summed over stages"),
        make_case(root, "dpo-moved", "dpo", TP2, stop=STOP),
        make_case(root, "grpo-tp2", "grpo", TP2),
        make_case(root, "grpo-pp2", "grpo", PP2),
        make_case(root, "grpo-dp2", "grpo", DP2),
        make_case(root, "grpo-dp2-fault", "grpo", DP2, fault="mean over the micro-batch"),
    ]
    one = [
        make_case(root, "dpo", "dpo"),
        make_case(root, "dpo-moved", "dpo"),
        make_case(root, "dpo-resumed", "dpo", stop=STOP),
        make_case(root, "dpo-resumed", "dpo"),
        make_case(root, "dpo-packed", "dpo", PACKED),
        make_case(root, "dpo-packed-resumed", "dpo", PACKED, stop=STOP),
        make_case(root, "dpo-packed-resumed", "dpo", PACKED),
        make_case(root, "dpo-online", "dpo", ONLINE),
        make_case(root, "dpo-online-resumed", "dpo", ONLINE, stop=STOP),
        make_case(root, "dpo-online-resumed", "dpo", ONLINE),
        make_case(root, "dpo-forgetful", "dpo", stop=STOP),
        make_case(root, "dpo-forgetful", "dpo", fault="optimizer not restored"),
        make_case(root, "grpo", "grpo"),
        make_case(root, "grpo-resumed", "grpo", stop=STOP),
        make_case(root, "grpo-resumed", "grpo"),
    ]
    for processes, cases in ((2, two), (1, one)):
        for case in cases:
            run_distributed(run_case, processes, case)
    return root


def curve(run: Path, steps: int = STEPS) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    # Policy and reference are equal at first, so which side of a pair is ahead is rounding.
    rows[0].pop("accuracy", None)
    rows[0].pop("length_margin_correlation", None)
    return [{name: value for name, value in row.items() if name not in NOT_COMPARED} for row in rows]


def largest_difference(first: Path, second: Path) -> float:
    """The largest difference of a metric, relative where it is above 1."""
    differences = [0.0]
    for ours, theirs in zip(curve(first), curve(second), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - ROUNDING:
            # Log-ratios are differences of log-probabilities and as exact as these.
            size = theirs["chosen_logprob"] if name == "kl_to_reference" and "margin" in theirs else theirs[name]
            differences.append(abs(ours[name] - theirs[name]) / max(1.0, abs(size)))
    return max(differences)


def weights_of(run: Path) -> Weights:
    """The exported weights, float64."""
    exported = HFDirectory(run / "hf")
    return {name: exported.read(name).double() for name in exported.names()}


def weights_differ_by(first: Path, second: Path) -> float:
    ours, theirs = HFDirectory(first / "hf"), HFDirectory(second / "hf")
    return max(float((ours.read(name) - theirs.read(name)).abs().max()) for name in ours.names())


@pytest.mark.parametrize("layout", ["tp2", "sp2", "pp2", "dp2", "cp2", "zero2"])
def test_dpo_in_another_layout_equals_one_process(runs: Path, layout: str) -> None:
    assert largest_difference(runs / f"dpo-{layout}", runs / "dpo") < CURVE_TOLERANCE


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_packed_dpo_in_another_layout_equals_one_padded_process(runs: Path, layout: str) -> None:
    """The same pairs in every step: whole curves are the same, whatever shares a row."""
    assert largest_difference(runs / f"dpo-packed-{layout}", runs / "dpo") < CURVE_TOLERANCE


def test_packed_dpo_is_padded_dpo(runs: Path) -> None:
    assert largest_difference(runs / "dpo-packed", runs / "dpo") < CURVE_TOLERANCE
    assert weights_differ_by(runs / "dpo-packed", runs / "dpo") < CURVE_TOLERANCE


@pytest.mark.parametrize("name", ["dpo-online", "dpo-online-pp2"])
def test_an_online_reference_is_the_stored_one(runs: Path, name: str) -> None:
    assert largest_difference(runs / name, runs / "dpo") < CURVE_TOLERANCE
    assert not (runs / name / "reference.safetensors").exists()


@pytest.mark.parametrize("name", ["dpo-packed", "dpo-online"])
def test_packed_and_online_runs_resume_exactly(runs: Path, name: str) -> None:
    assert curve(runs / f"{name}-resumed") == curve(runs / name)
    assert weights_differ_by(runs / f"{name}-resumed", runs / name) == 0.0


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_grpo_in_another_layout_equals_one_process(runs: Path, layout: str) -> None:
    assert largest_difference(runs / f"grpo-{layout}", runs / "grpo") < CURVE_TOLERANCE


@pytest.mark.parametrize("name", ["dpo-pp2-fault", "grpo-dp2-fault"])
def test_a_planted_fault_is_seen(runs: Path, name: str) -> None:
    assert largest_difference(runs / name, runs / name.split("-")[0]) > 10 * CURVE_TOLERANCE


def test_dpo_begins_at_ln_2_and_learns(runs: Path) -> None:
    """Policy and reference are the same model at first: -log sigma(0) = ln 2 for every pair."""
    rows = curve(runs / "dpo")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert rows[-1]["margin"] > 0.1


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_resumed_run_is_the_same_run(runs: Path, stage: str) -> None:
    assert curve(runs / f"{stage}-resumed") == curve(runs / stage)
    assert weights_differ_by(runs / f"{stage}-resumed", runs / stage) == 0.0


def test_a_resume_without_optimizer_state_is_seen(runs: Path) -> None:
    """The fault leaves the step after the resume alone and shows in the one after it."""
    assert weights_differ_by(runs / "dpo-forgetful", runs / "dpo") > 10 * CURVE_TOLERANCE


def test_a_run_begun_on_two_processes_continues_on_one(runs: Path) -> None:
    assert largest_difference(runs / "dpo-moved", runs / "dpo") < CURVE_TOLERANCE


def root_mean_square(one: Weights, other: Weights) -> float:
    """Of the differences of all numbers."""
    squares = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(squares / sum(tensor.numel() for tensor in one.values()))


def test_the_export_is_the_trained_model_in_every_layout(runs: Path) -> None:
    base, trained = weights_of(runs / "base"), weights_of(runs / "dpo")
    moved = root_mean_square(trained, base)
    assert max(float((trained[name] - base[name]).abs().max()) for name in base) > 1e-3
    for layout in ("tp2", "pp2", "dp2", "cp2", "packed-tp2"):
        assert root_mean_square(weights_of(runs / f"dpo-{layout}"), trained) < WEIGHT_TOLERANCE * moved, layout
    # The twin: the smallest tensor is exported as it was before training.
    assert root_mean_square(trained | {FINAL_NORM: base[FINAL_NORM]}, trained) > 10 * WEIGHT_TOLERANCE * moved


def test_sampler_and_trainer_agree_in_every_round(runs: Path) -> None:
    """The same weights in two engines: their log-probabilities differ by rounding, so the weight sync works."""
    for layout in ("grpo", "grpo-tp2", "grpo-pp2"):
        assert all(row["logprob_gap"] < 1e-5 for row in curve(runs / layout))


def test_grpo_moves_the_policy_away_from_its_reference(runs: Path) -> None:
    """The reference stays what the run began with: the mean k3 divergence from it grows with every round."""
    rows = curve(runs / "grpo")
    assert 0.0 < rows[0]["kl"] < rows[1]["kl"]
    assert all(
        0.0 < row["pass_rate"] < 1.0 and row["reward"] == pytest.approx(2 * row["pass_rate"] - 1) for row in rows
    )


def test_grpo_learns_what_is_rewarded(runs: Path) -> None:
    """Rewarded for short responses, the policy writes them: both numbers are means over 48 responses a round."""
    settings = ("steps=20", "prompts_per_step=12", "inner_batches=1", "kl=0", "micro_batch=48", "optim.lr=5e-3")
    case = make_case(runs, "grpo-learns", "grpo", *settings, "temperature.end=1.0", grader="short")
    run_distributed(run_case, 1, case)
    rates = [row["pass_rate"] for row in curve(runs / "grpo-learns", steps=20)]
    assert sum(rates[-4:]) / 4 > sum(rates[:4]) / 4 + 0.3


def test_rounds_without_a_positive_leave_the_model_alone(runs: Path) -> None:
    """Also when such a run is stopped: its checkpoint is from before the first update."""
    run_distributed(run_case, 2, make_case(runs, "grpo-never", "grpo", DP2, grader="never", stop=STOP))
    run_distributed(run_case, 2, make_case(runs, "grpo-never", "grpo", DP2, grader="never"))
    for row in curve(runs / "grpo-never"):
        assert (row["kept"], row["zero_gradient_groups"], row["pass_rate"]) == (0.0, 1.0, 0.0)
    assert weights_differ_by(runs / "grpo-never", runs / "base") == 0.0


def test_dpo_refuses_another_reference_for_a_begun_run(runs: Path) -> None:
    run_distributed(run_case, 1, make_case(runs, "dpo-swapped", "dpo", stop=STOP))
    other = f"base={runs / 'dpo' / 'hf'}"
    with pytest.raises(RanksFailed, match="was computed for another reference"):
        run_distributed(run_case, 1, make_case(runs, "dpo-swapped", "dpo", other))


def test_dpo_reads_the_reference_of_another_run(runs: Path) -> None:
    """A second run on the same base and pairs need not compute it, whatever else is different."""
    given = f"reference.path={runs / 'dpo' / 'reference.safetensors'}"
    run_distributed(run_case, 1, make_case(runs, "dpo-given", "dpo", given, PACKED))
    assert largest_difference(runs / "dpo-given", runs / "dpo") < CURVE_TOLERANCE
    assert not (runs / "dpo-given" / "reference.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reference.path={root}/absent.safetensors", "absent.safetensors does not exist"),
        ("base={root}/dpo/hf", "computed for another reference .base weights"),
        ("sequence_length=64", "computed for another reference .computation"),
        ("overlong=truncate", "sequence_length=40"),
    ],
)
def test_dpo_refuses_a_reference_that_is_not_its_own(runs: Path, change: str, message: str) -> None:
    settings = [f"reference.path={runs / 'dpo' / 'reference.safetensors'}", change.format(root=runs)]
    if change == "overlong=truncate":
        settings.append("sequence_length=40")
    with pytest.raises(RanksFailed, match=message):
        run_distributed(run_case, 1, make_case(runs, "dpo-foreign", "dpo", *settings))


def test_a_diverging_run_stops_with_its_reason(runs: Path) -> None:
    """Steps of 1e20 leave nothing finite; on both pipeline stages the run ends with one message."""
    case = make_case(runs, "dpo-diverged", "dpo", PP2, "optim.lr=1e20", "optim.warmup_fraction=0", "loss.kind=ipo")
    with pytest.raises(RanksFailed, match=r"step \d+ is not trained on .*not finite"):
        run_distributed(run_case, 2, case)


def test_grpo_refuses_to_resume_from_another_base(runs: Path) -> None:
    run_distributed(run_case, 1, make_case(runs, "grpo-swapped", "grpo", stop=STOP))
    other = f"base={runs / 'dpo' / 'hf'}"
    with pytest.raises(RanksFailed, match="belongs to another run"):
        run_distributed(run_case, 1, make_case(runs, "grpo-swapped", "grpo", other))


def test_only_the_newest_checkpoints_stay(runs: Path) -> None:
    settings = ("checkpoint.every=1", "checkpoint.keep=2")
    run_distributed(run_case, 1, make_case(runs, "dpo-keep", "dpo", *settings))
    assert sorted(path.name for path in (runs / "dpo-keep" / "checkpoints").iterdir()) == [
        "step=3",
        "step=4",
    ]
    assert curve(runs / "dpo-keep") == curve(runs / "dpo")
