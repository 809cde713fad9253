"""One floor under four stages: damaged checkpoints, the best one, learning rates, guard, early stopping, tracking.

Every test is the same for mid-training, SFT, DPO and GRPO; the runs are four steps long.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import RanksFailed
from floor_runs import LR, MIN_LR, STAGES, STEPS, go, logged, make_inputs, same_weights, settings

from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.training.metrics import METRICS, Stage, metrics_of
from phimr_nemo.training.seal import SEAL_FILE, checkpoint_step, checkpoints, is_sealed

STOP = 3
LOGGED_IN_ALL = (
    *("loss", "lr", "grad_norm", "step_time", "tokens_per_second_per_gpu", "valid_tokens_per_second_per_gpu"),
    *("slots_per_second_per_gpu", "model_tflops_per_gpu", "memory_gib"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("floor"))


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Stage, Path]:
    """One run of each stage, to its end."""
    root = tmp_path_factory.mktemp("undisturbed")
    for stage in STAGES:
        go(stage, settings(stage, inputs, root / stage))
    return {stage: root / stage for stage in STAGES}


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Stage, Path]:
    """The same, told to stop after STOP steps: checkpoints 1 to STOP are there."""
    root = tmp_path_factory.mktemp("stopped")
    for stage in STAGES:
        assert go(stage, settings(stage, inputs, root / stage / "run"), stop_after=STOP).preempted
        steps = [checkpoint_step(path) for path in checkpoints(root / stage / "run" / "checkpoints")]
        assert steps == [3, 2, 1]
    return {stage: root / stage / "run" for stage in STAGES}


# ---- damage ------------------------------------------------------------------------------------------------


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.rglob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_bit(checkpoint: Path) -> None:
    shard = largest_shard(checkpoint)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def cut_a_shard_to_half(checkpoint: Path) -> None:
    shard = largest_shard(checkpoint)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def lose_a_file(checkpoint: Path) -> None:
    next(checkpoint.rglob("common.pt")).unlink()


def leave_it_half_written(checkpoint: Path) -> None:
    (checkpoint / SEAL_FILE).unlink()
    cut_a_shard_to_half(checkpoint)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flip": (flip_a_bit, "is damaged"),
    "shard cut to half": (cut_a_shard_to_half, "is damaged"),
    "file missing": (lose_a_file, "is damaged"),
    "half-written": (leave_it_half_written, "was not finished"),
}


def copied(source: Path, place: Path, settings_of: Callable[[Path], list[str]]) -> list[str]:
    """A copy of a run in another place, and its settings there."""
    shutil.copytree(source, place)
    overrides = settings_of(place)
    config = place / "config.yaml"
    config.write_text(config.read_text("utf-8").replace(str(source), str(place)), "utf-8")
    return overrides


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    stage: Stage,
    damage: str,
    inputs: Path,
    undisturbed: dict[Stage, Path],
    stopped: dict[Stage, Path],
    tmp_path: Path,
) -> None:
    overrides = copied(stopped[stage], tmp_path / "run", lambda place: settings(stage, inputs, place))
    newest = tmp_path / "run" / "checkpoints" / f"step={STOP}"
    break_it, words = DAMAGE[damage]
    break_it(newest)
    said = go(stage, overrides).said
    assert [message for message in said if f"{newest} {words}" in message and "passed over" in message], said
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == list(range(1, STEPS + 1))
    assert same_weights(tmp_path / "run", undisturbed[stage])
    assert all(is_sealed(path) for path in checkpoints(tmp_path / "run" / "checkpoints"))


def fingerprint(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("checkpoints", "metrics.jsonl")
        for path in ([directory / part] if (directory / part).is_file() else (directory / part).rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_when_no_checkpoint_is_whole_the_run_ends_and_nothing_is_lost(
    stage: Stage, inputs: Path, stopped: dict[Stage, Path], tmp_path: Path
) -> None:
    overrides = copied(stopped[stage], tmp_path / "run", lambda place: settings(stage, inputs, place))
    found = checkpoints(tmp_path / "run" / "checkpoints")
    for checkpoint, break_it in zip(found, (flip_a_bit, cut_a_shard_to_half, lose_a_file), strict=True):
        break_it(checkpoint)
    before = fingerprint(tmp_path / "run")
    with pytest.raises(RanksFailed, match=r"no checkpoint in .* is whole") as caught:
        go(stage, overrides)
    assert all(str(checkpoint) in str(caught.value) for checkpoint in found)
    assert fingerprint(tmp_path / "run") == before
    assert not (tmp_path / "run" / "hf").exists()


def test_without_the_checksums_a_flipped_bit_goes_unseen(
    inputs: Path,
    undisturbed: dict[Stage, Path],
    stopped: dict[Stage, Path],
    tmp_path: Path,
) -> None:
    """The planted fault: the seal is written anew after the damage."""
    from phimr_nemo.training.seal import write_seal

    overrides = copied(stopped["dpo"], tmp_path / "run", lambda place: settings("dpo", inputs, place))
    newest = tmp_path / "run" / "checkpoints" / f"step={STOP}"
    flip_a_bit(newest)
    (newest / SEAL_FILE).unlink()
    write_seal(newest, {})
    assert not [message for message in go("dpo", overrides).said if "damaged" in message]
    assert not same_weights(tmp_path / "run", undisturbed["dpo"])


# ---- learning rates ----------------------------------------------------------------------------------------

RATES: dict[str, list[float]] = {
    # Warm-up over two steps: 1/2, 1. Then from the full rate at step 1 to the smallest, which step 4 would have.
    "constant": [LR / 2, LR, LR, LR],
    "linear": [LR / 2, LR, LR - (LR - MIN_LR) / 3, LR - (LR - MIN_LR) * 2 / 3],
    "cosine": [LR / 2, LR, *(MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * k / 3)) / 2 for k in (1, 2))],
    # The last quarter decays: step 2 is the last one at the full rate, step 3 half-way to the smallest.
    "wsd": [LR / 2, LR, LR, (LR + MIN_LR) / 2],
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("schedule", RATES)
def test_every_step_is_made_with_the_schedules_rate(
    stage: Stage, schedule: str, inputs: Path, undisturbed: dict[Stage, Path], tmp_path: Path
) -> None:
    """And the metric says which: the line of a step has the rate of that step."""
    output = undisturbed[stage]
    if schedule != "linear":
        output = tmp_path / "run"
        decay = ["optim.decay_fraction=0.25"] if schedule == "wsd" else []
        quick = ["checkpoint.every=100", f"optim.schedule={schedule}", *decay]
        go(stage, settings(stage, inputs, output, *quick))
    assert logged(output, "lr") == pytest.approx(RATES[schedule], rel=1e-12)


# ---- metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_logged_metric_stands_in_the_table(stage: Stage, undisturbed: dict[Stage, Path]) -> None:
    rows = list(read_metrics(undisturbed[stage]))
    names = {name for row in rows for name in row} - {"step", "time"}
    assert names <= metrics_of(stage).keys()
    assert set(LOGGED_IN_ALL) <= names
    assert all(math.isfinite(row[name]) for row in rows for name in LOGGED_IN_ALL)
    assert all(metric.unit and metric.meaning for metric in METRICS)
    facts = RunDirectory(undisturbed[stage]).closing_facts()
    assert (facts["exported_step"], facts["converged"], facts["skipped_batches"]) == (STEPS, False, 0)


# ---- the best checkpoint -----------------------------------------------------------------------------------

WILD: dict[Stage, tuple[str, float]] = {
    "midtrain": ("loss", 1.0),
    "sft": ("val_loss", 0.05),
    "dpo": ("loss", 0.05),
    "grpo": ("pass_rate", 0.05),
}
"""Stage -> what it is judged by, and a learning rate with which the last step is not the best."""


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_is_kept_and_exported(stage: Stage, inputs: Path, tmp_path: Path) -> None:
    """Steps that are far too large make the last weights bad ones. Its weights are those of a run that ends there.

    Saved beside training, and tracked by TensorBoard and by W&B (offline).
    """
    name, rate = WILD[stage]
    metric = metrics_of(stage)[name]
    wild = [f"optim.lr={rate}", f"optim.min_lr={rate}", "optim.schedule=constant", "optim.warmup_fraction=0"]
    if name == "val_loss":
        wild += ["validation_rows=8", "validate_every=1"]
    more = ["checkpoint.asynchronous=true", "tracking.wandb.project=floor", "tracking.wandb.mode=offline"]
    best = ["checkpoint.keep=1", "checkpoint.best=true", f"checkpoint.metric={name}"]
    output = tmp_path / "run"
    go(stage, settings(stage, inputs, output, *wild, *best, *more))
    measured = {row["step"]: row[name] for row in read_metrics(output) if name in row}
    assert list(measured) == list(range(1, STEPS + 1))
    choose = max if metric.better == "higher" else min
    expected = choose(measured, key=lambda step: measured[step])
    assert expected < STEPS, "the last step is the best: the test shows nothing"
    facts = RunDirectory(output).closing_facts()
    assert (facts["steps"], facts["exported_step"]) == (STEPS, expected)
    assert facts["measure"] == {"metric": name, "value": measured[expected]}
    kept = checkpoints(output / "checkpoints")
    assert [checkpoint_step(path) for path in kept] == [STEPS, expected]
    assert all(is_sealed(path) for path in kept)
    ends = f"{'steps' if stage == 'grpo' else 'max_steps'}={expected}"
    go(stage, settings(stage, inputs, tmp_path / "short", *wild, ends))
    assert same_weights(output, tmp_path / "short")
    assert list((output / "tensorboard").glob("events.*"))
    assert list((output / "wandb").glob("offline-run-*/run-*.wandb"))


# ---- guard and early stopping, of which the supervised stages have tests of their own ----------------------


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_batch_without_a_finite_loss_is_skipped(stage: Stage, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    outcome = go(stage, settings(stage, inputs, output, "guard.on_nan=skip"), stop_after=None, poison=2)
    assert len(outcome.digests) == STEPS
    same = [step for step in range(2, STEPS + 1) if outcome.digests[step - 1] == outcome.digests[step - 2]]
    assert same == [2]
    assert RunDirectory(output).closing_facts()["skipped_batches"] == 1
    record = (output / "guard" / "step-00000002.json").read_text("utf-8")
    assert '"action": "skip"' in record
    assert '"id": "' in record
    assert logged(output, "lr") == pytest.approx(RATES["linear"], rel=1e-12)


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_training_ends_when_the_measure_gets_no_better(stage: Stage, inputs: Path, tmp_path: Path) -> None:
    """Nothing but the first measurement is progress: it ends after that one and `patience` more."""
    rule = ["early_stopping.patience=2", "early_stopping.min_delta=100.0"]
    outcome = go(stage, settings(stage, inputs, tmp_path / "run", *rule))
    assert not outcome.preempted
    facts = RunDirectory(tmp_path / "run").closing_facts()
    assert (facts["steps"], facts["exported_step"], facts["converged"]) == (3, 3, True)
