"""`phimr continue`: an earlier checkpoint with other settings, more steps for a finished run, in all four stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from floor_runs import LR, MIN_LR, STAGES, STEPS, go, logged, make_inputs, same_weights, settings

from phimr_nemo.config import OptimConfig
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.continuing import Continuation, continuation
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.training.metrics import Stage
from phimr_nemo.training.schedule import learning_rate
from phimr_nemo.training.seal import checkpoint_step, checkpoints, is_sealed

BACK, MORE = 2, 6
"""The step to go back to, and the last step of the longer run."""
OTHER_LR = 4e-4
MORE_OF: dict[Stage, tuple[str, ...]] = {
    # Data for more steps than are made.
    "dpo": ("epochs=2", f"max_steps={STEPS}"),
    # A round that is sampled ahead is to be taken along.
    "grpo": ("ahead=1", "correction.kind=truncated", "correction.cap=2"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("continuing"))


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Stage, Path]:
    """A run of each stage that came to its end, with the checkpoints of its last three steps."""
    root = tmp_path_factory.mktemp("finished")
    for stage in STAGES:
        go(stage, settings(stage, inputs, root / stage, *MORE_OF.get(stage, ())))
    return {stage: root / stage for stage in STAGES}


def steps(stage: Stage, count: int) -> str:
    return f"{'steps' if stage == 'grpo' else 'max_steps'}={count}"


def go_on(stage: Stage, asked: Continuation) -> None:
    asked.begin()
    go(stage, asked.settings, preset=asked.config)


def rate(step: int, last: int, lr: float) -> float:
    """The rate of a step, from 1, of the runs here: linear after a warm-up of half the steps."""
    optim = OptimConfig(
        lr=lr, min_lr=MIN_LR, warmup_fraction=0.5, schedule="linear", weight_decay=0.0, beta1=0.9, beta2=0.95,
        eps=1e-8, clip_grad=1.0, distributed=True,
    )  # fmt: skip
    return learning_rate(step - 1, last, optim)


def plain(output: Path, *, first: int = 1, last: int = MORE) -> list[dict[str, Any]]:
    """The lines of metrics of these steps, without what depends on the clock or the machine."""
    names = ("step", "loss", "grad_norm", "accuracy", "reward", "response_length", "staleness")
    return [
        {name: row[name] for name in names if name in row}
        for row in read_metrics(output)
        if first <= row["step"] <= last
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_an_earlier_checkpoint_goes_on_with_another_rate_and_more_steps(
    stage: Stage, finished: dict[Stage, Path], tmp_path: Path
) -> None:
    """The next step has the old run's weights and data: its loss is the old run's, its rate the new settings'."""
    target = tmp_path / "run"
    asked = continuation(finished[stage], target, BACK, [f"optim.lr={OTHER_LR}", steps(stage, MORE)])
    before = {path: path.stat().st_mtime_ns for path in finished[stage].rglob("*") if path.is_file()}
    go_on(stage, asked)
    assert {path: path.stat().st_mtime_ns for path in finished[stage].rglob("*") if path.is_file()} == before
    facts = RunDirectory(target).closing_facts()
    assert (facts["steps"], facts["exported_step"]) == (MORE, MORE)
    assert plain(target, last=BACK) == plain(finished[stage], last=BACK)
    assert [row["step"] for row in plain(target) if "loss" in row] == list(range(1, MORE + 1))
    assert logged(target, "loss")[BACK] == logged(finished[stage], "loss")[BACK]
    rates = [rate(step, STEPS, LR) for step in range(1, BACK + 1)]
    rates += [rate(step, MORE, OTHER_LR) for step in range(BACK + 1, MORE + 1)]
    assert logged(target, "lr") == pytest.approx(rates, rel=1e-12)
    assert not same_weights(target, finished[stage])
    # The same command again: nothing is left to do.
    again = continuation(finished[stage], target, BACK, [f"optim.lr={OTHER_LR}", steps(stage, MORE)])
    assert again.checkpoint is None


@pytest.mark.parametrize("stage", STAGES)
def test_with_the_same_settings_it_is_the_old_run_bit_for_bit(
    stage: Stage, finished: dict[Stage, Path], tmp_path: Path
) -> None:
    target = tmp_path / "run"
    go_on(stage, continuation(finished[stage], target, STEPS - 1, []))
    assert same_weights(target, finished[stage])
    assert plain(target) == plain(finished[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_gets_more_steps(stage: Stage, finished: dict[Stage, Path], tmp_path: Path) -> None:
    target = tmp_path / "run"
    go_on(stage, continuation(finished[stage], target, None, [steps(stage, STEPS + 1)]))
    assert RunDirectory(target).closing_facts()["steps"] == STEPS + 1
    assert plain(target, last=STEPS) == plain(finished[stage])
    assert logged(target, "lr")[-1] == pytest.approx(rate(STEPS + 1, STEPS + 1, LR))
    assert all(is_sealed(path) for path in checkpoints(target / "checkpoints"))


# ---- what cannot be continued ------------------------------------------------------------------------------


def refused(*parts: str, **asked: Any) -> None:
    with pytest.raises(UserError) as caught:
        continuation(**asked)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_cannot_go_on_is_one_clear_error(finished: dict[Stage, Path], tmp_path: Path) -> None:
    run, target = finished["dpo"], tmp_path / "run"
    common = {"run": run, "target": target, "step": None}
    longer = [steps("dpo", MORE)]
    refused("stands at step 4", "raise max_steps", **common, overrides=[])
    refused("global_batch: 8", "leave global_batch out", **common, overrides=[*longer, "global_batch=4"])
    refused("run.seed: 0", "run.seed", **common, overrides=[*longer, "run.seed=1"])
    refused("run.output", "second argument", **common, overrides=["run.output=elsewhere"])
    missing = {**common, "step": 7}
    refused("no whole checkpoint of step 7", "2, 3, 4", **missing, overrides=longer)
    refused("holds no training run", **{**common, "run": tmp_path / "nowhere"}, overrides=longer)
    refused("holds a run already", **{**common, "target": finished["sft"]}, overrides=longer)
    assert not target.exists()


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(finished: dict[Stage, Path], tmp_path: Path) -> None:
    run = tmp_path / "old"
    shutil.copytree(finished["dpo"], run)
    shard = max((run / "checkpoints" / "step=4").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = continuation(run, tmp_path / "new", None, [steps("dpo", MORE)])
    assert found.checkpoint is not None
    assert checkpoint_step(found.checkpoint) == STEPS - 1
    refused("step=4 is damaged", ": 2, 3 (", run=run, target=tmp_path / "new", step=4, overrides=[steps("dpo", MORE)])


def test_inputs_that_were_moved_are_the_same_and_others_are_refused(
    inputs: Path, finished: dict[Stage, Path], tmp_path: Path
) -> None:
    run = tmp_path / "old"
    [data] = [Path(item.removeprefix("data=")) for item in settings("sft", inputs, run) if item.startswith("data=")]
    shutil.copytree(finished["sft"], run)
    shutil.copytree(data, tmp_path / "moved")
    described = json.loads((run / "run.json").read_text("utf-8"))
    described.pop("made_from", None)
    (run / "run.json").write_text(json.dumps(described))
    longer = [steps("sft", MORE), f"data={tmp_path / 'moved'}"]
    refused("leave data out", run=run, target=tmp_path / "new", step=None, overrides=longer)
    described["made_from"] = {"inputs": {"data": content_of(data)}, "config": {}}
    (run / "run.json").write_text(json.dumps(described))
    assert continuation(run, tmp_path / "new", None, longer).checkpoint is not None
    other = [steps("sft", MORE), f"data={inputs}"]
    refused("leave data out", run=run, target=tmp_path / "new", step=None, overrides=other)


@pytest.mark.parametrize("content", ["{", "[]", '{"run": 3}', '{"run": "a", "step": null}'])
def test_a_damaged_origin_is_named(content: str, finished: dict[Stage, Path], tmp_path: Path) -> None:
    (tmp_path / "continues.json").write_text(content)
    refused("continues.json is damaged", run=finished["sft"], target=tmp_path, step=None, overrides=["max_steps=9"])


def test_a_copy_that_was_killed_is_made_again(
    finished: dict[Stage, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its last file a directory is not taken for a run that goes on."""
    target = tmp_path / "run"
    asked = continuation(finished["dpo"], target, BACK, [])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("phimr_nemo.jobs.continuing.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            asked.begin()
    again = continuation(finished["dpo"], target, BACK, [])
    assert again.checkpoint is not None
    again.begin()
    assert json.loads((target / "continues.json").read_text("utf-8"))["step"] == BACK
    assert [checkpoint_step(path) for path in checkpoints(target / "checkpoints")] == [BACK]
    assert {row["step"] for row in read_metrics(target)} == {1, BACK}
    refused("continues", "from step 2", run=finished["dpo"], target=target, step=3, overrides=[])
