"""The ablation of the sampler's mismatch: what a dial does to weights, the arms, the tables, one real short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from results import plain_result
from torch import Tensor

from phimr_nemo.config import BaseConfig, GRPOConfig, load_config
from phimr_nemo.config.ablations import MismatchConfig
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.model.base import run_base
from phimr_nemo.store.runs import METRICS_FILE, RESULTS_FILE, RunDirectory, read_metrics
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from recipes.ablations import mismatch
from recipes.ablations.mismatched import Dial, MismatchedSampler, mismatched, refuse_interruptions

SEEDS = (0, 1)
SHAPE = (
    *("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4"),
    "num_key_value_heads=2",
)


def weights(value: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = value * torch.randn(40, 30, generator=generator)
    matrix[7] = 0.0
    return {"matrix": matrix, "norm": torch.linspace(0.5, 1.5, 30)}


def changed(dial: str, version: int = 0) -> dict[str, Tensor]:
    return dict(mismatched(weights().items(), Dial.parse(dial), version))


# ---- a dial ------------------------------------------------------------------------------------------------------


def test_int8_keeps_255_levels_of_a_row_and_is_off_by_half_a_level_at_most() -> None:
    before, after = weights()["matrix"], changed("int8")["matrix"]
    for row, rounded in zip(before, after, strict=True):
        level = float(row.abs().max()) / 127
        if level == 0.0:
            assert torch.equal(rounded, row)
            continue
        steps = rounded / level
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert float(steps.abs().max()) == pytest.approx(127, abs=1e-3)
        assert float((rounded - row).abs().max()) <= level / 2 * (1 + 1e-5)
    assert (after != before).any()


def test_noise_has_the_size_that_was_asked_for_and_each_version_its_own() -> None:
    before = weights()["matrix"]
    first = changed("noise=0.05")["matrix"] - before
    share = float(first.square().mean().sqrt() / before.square().mean().sqrt())
    # The root mean square of 1,200 draws has a relative standard error of 1 / sqrt(2 x 1,200) = 2 %.
    assert share == pytest.approx(0.05, rel=0.1)
    torch.testing.assert_close(changed("noise=0.1")["matrix"] - before, 2 * first, rtol=1e-3, atol=1e-5)
    assert torch.equal(changed("noise=0.05", version=3)["matrix"], changed("noise=0.05", version=3)["matrix"])
    other = changed("noise=0.05", version=1)["matrix"] - before
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.15


def test_bf16_is_the_cast_and_nothing_else_changes() -> None:
    for name, tensor in weights().items():
        assert torch.equal(changed("bf16")[name], tensor.to(torch.bfloat16).float())
        assert torch.equal(changed("none")[name], tensor)
        assert torch.equal(changed("stale=2")[name], tensor)
    for dial in ("int8", "noise=0.1"):
        assert torch.equal(changed(dial)["norm"], weights()["norm"])


@pytest.mark.parametrize(
    "text", ["", "noise", "noise=0", "noise=-1", "noise=inf", "stale=0", "stale=9", "int8=4", "x"]
)
def test_an_unknown_dial_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="noise=S"):
        Dial.parse(text)


class Recording:
    """A sampler that remembers the weights that it was given."""

    version = 0
    counts: Mapping[str, int] = {}

    def __init__(self) -> None:
        self.given: list[tuple[int, float]] = []

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.given.append((version, float(dict(tensors)["norm"][0])))

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        return []

    def close(self) -> None:
        pass


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stale_weights_are_those_of_so_many_steps_before(steps: int) -> None:
    recording = Recording()
    sampler = MismatchedSampler(recording, Dial("stale", steps))
    current = torch.zeros(1)
    for step in range(10):
        # Before it has weights it has none of anybody's: the first that it gets are dialled too.
        assert sampler.version == step - 1
        current.fill_(float(step))
        sampler.update_weights({"norm": current}.items(), step)
        if step == 5:
            sampler.update_weights({"norm": current}.items(), step)
    expected = [float(max(step - steps, 0)) for step in [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]]
    assert [value for _, value in recording.given] == expected


# ---- plan and report -----------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, repository: Path) -> MismatchConfig:
    for seed in SEEDS:
        for name in mismatch.NEEDED:
            RunDirectory(tmp_path / "quickstart" / f"seed-{seed}" / name).finish()
    settings = [f"quickstarts=[{tmp_path / 'quickstart'}]", f"output={tmp_path / 'out'}"]
    return load_config(MismatchConfig, repository / mismatch.TINY, settings)


def test_every_mismatch_meets_every_correction(config: MismatchConfig) -> None:
    steps = mismatch.plan(config)
    trained = [step for step in steps if step.arguments[0] == "grpo"]
    assert len(steps) == 2 * len(trained) == 2 * len(SEEDS) * len(config.dials) * len(config.corrections)
    assert len({step.output for step in steps}) == len(steps)
    for step in trained:
        _, dial = step.program
        (correction,) = (name for name in config.corrections if mismatch.arm_name(dial, name) == step.name)
        assert step.arguments[-len(config.corrections[correction]) :] == config.corrections[correction]
        assert str(step).startswith(
            f"python -m recipes.ablations.mismatched {dial} grpo --config conf/grpo/tiny.yaml"
        )
    assert all(step.program == () for step in steps if step.arguments[0] == "evaluate")


def test_the_report_compares_corrections_mismatch_by_mismatch(config: MismatchConfig, tmp_path: Path) -> None:
    """ "truncated" is 25 and 50 points above "none" under noise in the two seeds: 37.5 +- 12.5; else equal."""
    arms = {"none": (), "truncated": ()}
    small = load_config(
        MismatchConfig,
        Path(mismatch.TINY),
        [f"quickstarts={list(map(str, config.quickstarts))}", f"output={config.output}", "dials=[none,noise=0.1]"],
    )
    object.__setattr__(small, "corrections", arms)
    for seed in SEEDS:
        for dial in small.dials:
            for correction in arms:
                better = 0.25 * (seed + 1) if (dial, correction) == ("noise=0.1", "truncated") else 0.0
                out, name = config.output / f"seed-{seed}", mismatch.arm_name(dial, correction)
                rows = [
                    {"step": step, "pass_rate": 0.5, "entropy": 0.1, "length_spread": 0.0, "grad_norm": 1.0}
                    | {"zero_gradient_groups": 0.0, "logprob_gap": 0.01 * step}
                    | ({"sampler_masked": 0.125} if correction == "truncated" else {})
                    for step in range(1, 8)
                ]
                (out / name).mkdir(parents=True)
                (out / name / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
                RunDirectory(out / name).finish()
                per_question = {f"q{number}": 0.25 + better for number in range(4)}
                result = plain_result(0.25 + better, questions=4, stderr=0.0, per_question=per_question)
                (out / f"evaluate-{name}").mkdir()
                write_result(out / f"evaluate-{name}" / RESULTS_FILE, result, {"row": name, "benchmark": "synthetic"})
    text = mismatch.report(small)
    assert "| noise=0.1: truncated minus none | +37.5 | 12.5 | +25.0" in text
    assert "| none: truncated minus none | +0.0 | 0.0 |" in text
    # The mean of 0.01 ... 0.07; an eighth left out.
    assert "| noise-0.1-truncated | 0.0400 (0.0400, 0.0400) | 12.50" in text
    assert "| none-none | 0.0400 (0.0400, 0.0400) | - |" in text
    assert (config.output / mismatch.PICTURE).read_bytes().startswith(b"\x89PNG")


# ---- a real run ----------------------------------------------------------------------------------------------------


def test_a_run_with_a_dialled_sampler_shows_the_gap_and_trains(tmp_path: Path, repository: Path) -> None:
    run_base(load_config(BaseConfig, repository / "conf/base/tiny.yaml", [f"run.output={tmp_path / 'base'}", *SHAPE]))
    row = {"problem_id": "p", "answer": "1", "pass_rate": 0.5, "mean_length": 1.0, "length_spread": 0.0}
    rows = [{**row, "id": f"{n}", "question": f"What is {n}+1?", "hard": False} for n in range(8)]
    table = rows_to_table([{**one, "domain": None, "difficulty": None} for one in rows], "prompts")
    write_shard(tmp_path / "prompts", 0, table, kind="prompts")
    finish(tmp_path / "prompts", kind="prompts", config={})
    settings = [
        *(f"run.output={tmp_path / 'run'}", f"base={tmp_path / 'base/hf'}", f"prompts={tmp_path / 'prompts'}"),
        *("steps=2", "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "micro_batch=8", "run.log_every=1"),
        *("grader=even_length:grade", "rebalance.enabled=false", "correction.kind=masked", "correction.low=0.5"),
        *("correction.high=5", "verify_workers=1"),
    ]
    command = [sys.executable, "-m", "recipes.ablations.mismatched", "noise=0.3", "grpo"]
    done = subprocess.run(
        [*command, "--config", "conf/grpo/tiny.yaml", *settings],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(repository), str(repository / "tests" / "parity")))},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in read_metrics(tmp_path / "run") if "logprob_gap" in line]
    assert len(lines) == 2
    # Without it the built-in engine and the trainer agree to about 1e-6.
    assert all(line["logprob_gap"] > 1e-3 for line in lines)
    assert all(line["staleness"] == 0 for line in lines)


def test_responses_of_a_dialled_sampler_are_not_interrupted(repository: Path) -> None:
    """The remedy, with the rest as it was, is taken."""
    path = repository / "conf" / "grpo" / "tiny.yaml"
    asked = ["ahead=2", "correction.kind=truncated", "correction.cap=2"]
    interrupted = [*asked, "partial_rollouts=continue", "max_concurrent_rollouts=64"]
    with pytest.raises(UserError, match="partial_rollouts=continue") as caught:
        refuse_interruptions(load_config(GRPOConfig, path, interrupted))
    remedy = caught.value.remedy.removeprefix("use ").split()
    refuse_interruptions(load_config(GRPOConfig, path, [*interrupted, *remedy]))


def test_an_unknown_dial_ends_a_command_before_anything_is_loaded(repository: Path) -> None:
    command = [sys.executable, "-m", "recipes.ablations.mismatched", "loud", "grpo"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "noise=S" in done.stderr
