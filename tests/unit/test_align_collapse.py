"""Collapse warnings: silent on healthy runs, each rule at its threshold, and real loops through the real measure."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phimr_nemo.align.grpo.collapse import REMEDIES, RISING, CollapseWatch
from phimr_nemo.align.grpo.log import GRPOLog
from phimr_nemo.align.grpo.rewards import Graded
from phimr_nemo.align.grpo.rollouts import Rollout, graded_rollouts, rollout_metrics
from phimr_nemo.config import GRPOConfig, TrackingConfig, load_config
from phimr_nemo.config.evaluation import MonitorConfig
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.generate.sampler import Completion
from phimr_nemo.store.runs import METRICS_FILE, read_metrics
from phimr_nemo.training.metrics import PASS_RATE_NAMES
from phimr_nemo.training.plots import plot_rounds
from phimr_nemo.training.tracking import RunLog

HEALTHY: Mapping[str, float] = {"pass_rate": 0.6, "repetitive": 0.01, "truncated": 0.1, "entropy": 0.3}
GROUP = 8


@pytest.fixture(scope="module")
def monitor(repository: Path) -> MonitorConfig:
    config: GRPOConfig = load_config(GRPOConfig, repository / "conf" / "grpo" / "tiny.yaml", [])
    return config.monitor


def steps(watch: CollapseWatch, rows: Iterable[Mapping[str, float]], start: int = 1) -> list[tuple[int, str]]:
    """(step, message) of every warning."""
    return [(step, text) for step, row in enumerate(rows, start) for text in watch.observe(step, row)]


@pytest.mark.parametrize(
    ("kind", "worse"),
    [
        ("repetition", lambda m: {"repetitive": HEALTHY["repetitive"] + m.repetitive_rise}),
        ("overlong", lambda m: {"truncated": HEALTHY["truncated"] + m.overlong_rise}),
        ("entropy gone", lambda m: {"entropy": HEALTHY["entropy"] * m.entropy_share}),
        ("entropy explosion", lambda m: {"entropy": m.max_entropy}),
        ("accuracy", lambda m: {"pass_rate": HEALTHY["pass_rate"] - m.pass_rate_drop}),
    ],
)
def test_each_rule_speaks_beyond_its_threshold_and_once(kind: str, worse: Any, monitor: MonitorConfig) -> None:
    """The window is full of bad rows `window` steps after the last healthy one; a hair inside says nothing."""
    healthy = [HEALTHY] * 10
    threshold = {**HEALTHY, **worse(monitor)}
    metric = next(name for name in HEALTHY if threshold[name] != HEALTHY[name])
    rises = threshold[metric] > HEALTHY[metric]
    inside, beyond = (
        {**threshold, metric: threshold[metric] * (1 + sign * 1e-6)} for sign in ((-1, 1) if rises else (1, -1))
    )
    assert not steps(CollapseWatch(monitor), [*healthy, *[inside] * 20])
    watch = CollapseWatch(monitor)
    ((step, text),) = steps(watch, [*healthy, *[beyond] * 20, *healthy, *[beyond] * 20])
    assert step == 10 + monitor.window
    assert watch.found == {kind: step}
    assert text.startswith(f"collapse ({kind}) at step {step}: ")
    assert text.endswith(REMEDIES[kind])


def test_one_bad_round_is_no_alarm(monitor: MonitorConfig) -> None:
    """A round at 4 times a bound above the others moves the mean of a window of 5 by 4/5 of the bound."""
    bad = {
        name: HEALTHY[name] + 4 * rise
        for name, rise in zip(RISING, (monitor.repetitive_rise, monitor.overlong_rise), strict=True)
    }
    assert monitor.window == 5
    assert not steps(CollapseWatch(monitor), [*[HEALTHY] * 5, {**HEALTHY, **bad}] * 5)


def test_a_run_that_collapses_in_its_first_steps_is_seen_when_the_window_is_full(monitor: MonitorConfig) -> None:
    """One healthy step, then nothing right: a first window of 12 % would hide the fall from 60 %."""
    watch = CollapseWatch(monitor)
    said = steps(watch, [HEALTHY, *[{**HEALTHY, "pass_rate": 0.0}] * 6])
    assert [step for step, _ in said] == [monitor.window]
    assert watch.found == {"accuracy": monitor.window}


def test_low_entropy_of_a_solved_task_is_no_fault(monitor: MonitorConfig) -> None:
    solved = {**HEALTHY, "entropy": 0.0, "pass_rate": monitor.solved_pass_rate}
    assert not steps(CollapseWatch(monitor), [*[HEALTHY] * 5, *[solved] * 30])


def test_a_set_that_begins_with_many_cut_off_is_judged_by_its_own_past(monitor: MonitorConfig) -> None:
    """Long responses that become shorter, and longer again by less than the bound: healthy."""
    shares = [0.6, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    rows = [{**HEALTHY, "truncated": share, "repetitive": 0.7 * share} for share in shares]
    assert not steps(CollapseWatch(monitor), rows)


def test_a_continued_run_remembers_and_does_not_repeat_itself(monitor: MonitorConfig) -> None:
    rows = [*[HEALTHY] * 8, *[{**HEALTHY, "pass_rate": 0.1}] * 12, *[{**HEALTHY, "repetitive": 0.9}] * 8]
    whole = CollapseWatch(monitor)
    said = steps(whole, rows)
    for cut in range(len(rows) + 1):
        watch = CollapseWatch(monitor, [{"step": number, **row} for number, row in enumerate(rows[:cut], 1)])
        assert steps(watch, rows[cut:], cut + 1) == [(step, text) for step, text in said if step > cut]
        assert watch.found == whole.found


def metrics_of(texts: list[str], right: bool) -> dict[str, float]:
    """A round of groups of these responses, through what a training step uses."""
    whole = texts[: len(texts) // GROUP * GROUP]
    completions = [
        Completion(f"{number // GROUP}/{number % GROUP}", (1,) * len(text), (-0.3,) * len(text), "stop")
        for number, text in enumerate(whole)
    ]
    verdict, reward = ("correct", 1.0) if right else ("wrong", -1.0)
    graded = [Graded(text, "1", verdict, len(text), len(text), is_truncated=False) for text in whole]
    prompt_of = dict.fromkeys(range(len(whole) // GROUP), 0)
    return rollout_metrics(graded_rollouts(completions, graded, prompt_of, lambda _: {"correctness": reward}))


def test_loops_alarm_and_healthy_solutions_do_not(monitor: MonitorConfig) -> None:
    """Healthy: worked solutions of the generated problems. Degenerate: the same, the last step over and over."""
    rollouts = teacher_rollouts(generate_problems(3, 40, "train"), 1, 0, 0.0)
    solutions: list[str] = rollouts["response"].to_pylist()
    loops = [text + ("\n" + text.splitlines()[-1] + " wait, let me check that once more.") * 60 for text in solutions]
    watch = CollapseWatch(monitor)
    assert not steps(watch, [metrics_of(solutions, right=True)] * 10)
    steps(watch, [metrics_of(loops, right=False)], start=11)
    # One round of loops in a window of five is a fifth.
    assert watch.found["repetition"] == 11


def test_recorded_loops_alarm_and_recorded_right_responses_do_not(shared_data: Path, monitor: MonitorConfig) -> None:
    """Responses of real models to competition questions; the longest wrong ones are loops that hit a limit."""
    with gzip.open(shared_data / "rollouts" / "graded_rollouts.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rng = random.Random(0)
    right = rng.sample([row["response"] for row in rows if row["correct"]], 10 * GROUP * 5)
    size = len(right) // 10
    loops = sorted((row["response"] for row in rows if not row["correct"]), key=len)[-GROUP * 5 :]
    watch = CollapseWatch(monitor)
    assert not steps(watch, [metrics_of(right[at : at + size], right=True) for at in range(0, len(right), size)])
    steps(watch, [metrics_of(loops, right=False)] * monitor.window, start=11)
    assert "repetition" in watch.found


def test_recorded_runs_alarm_where_they_collapsed_and_nowhere_else(repository: Path, monitor: MonitorConfig) -> None:
    """Three finished runs of the quickstart, and one made to collapse in its second step."""
    golden = json.loads((repository / "tests" / "golden" / "grpo_runs.json").read_text("utf-8"))["runs"]
    found = {}
    for name, columns in golden.items():
        watch = CollapseWatch(monitor)
        steps(watch, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        found[name] = watch.found
    assert found.pop("collapse") == dict.fromkeys(("repetition", "overlong", "accuracy"), monitor.window)
    assert list(found.values()) == [{}, {}, {}]


def test_a_grader_that_gives_up_alarms_and_an_older_run_that_did_not_count_that_does_not(
    monitor: MonitorConfig,
) -> None:
    """A window of five with one round at 6 %: 1.2 % on the mean, above the bound of 1 %."""
    assert (monitor.window, monitor.ungraded_warning) == (5, 0.01)
    lost = {**HEALTHY, "ungraded": 0.06}
    watch = CollapseWatch(monitor)
    assert not steps(watch, [HEALTHY] * 8)
    said = steps(watch, [lost], 9)
    assert watch.found == {"grader": 9}
    assert "gave up on 1.2%" in said[0][1]


# ---- the log -----------------------------------------------------------------------------------------------------


def rollout(slot: int, sample: int, *, correct: bool) -> Rollout:
    return Rollout(slot, sample, 0, (1, 2), (-0.1, -0.1), is_truncated=False, is_correct=correct)


def log_round(log: GRPOLog, step: int, rollouts: list[Rollout]) -> None:
    """What the trainer sends in a round, in its order."""
    log.log_metrics({**rollout_metrics(rollouts), "temperature": 0.6}, step, "train_rollouts/")
    log.log_metrics({"loss": 0.5, "optim_step": 7}, step, "train_optim/")
    log.log_metrics({"loss": 1.5, "optim_step": 8}, step, "train_optim/")
    log.log_metrics({"sample": 2.0, "rollout_time": 3.0, "train_time": 4.0}, step, "timers/")


def test_rounds_become_lines_warnings_and_a_picture(
    tmp_path: Path, monitor: MonitorConfig, caplog: pytest.LogCaptureFixture
) -> None:
    good = [rollout(slot, sample, correct=sample < 3) for slot in range(4) for sample in range(4)]
    bad = [replace(each, is_correct=False, repetition=1.0) for each in good]
    settings = replace(monitor, dashboard_every=1000)
    with closing(RunLog(tmp_path, TrackingConfig(), {}, done=0)) as writer, caplog.at_level(logging.WARNING):
        optimizer: Any = SimpleNamespace(grad_norm=2.0)
        log = GRPOLog(writer, optimizer, 1, lambda _: {}, monitor=settings, directory=tmp_path)
        for step in range(12):
            log_round(log, step, good if step < 6 else bad)
        assert not (tmp_path / "grpo.png").exists()
        log.draw()
    rows = list(read_metrics(tmp_path))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["loss"] == 1.0
    assert rows[0]["grad_norm"] == 2.0
    assert rows[0]["step_time"] == 7.0
    assert {name: rows[0][name] for name in PASS_RATE_NAMES if rows[0][name]} == {"groups_below_75": 4.0}
    assert {name: rows[11][name] for name in PASS_RATE_NAMES if rows[11][name]} == {"groups_none": 4.0}
    # The first bad round makes 1 of 5: 20 % repetitive, more than 10; the pass rate falls from 75 % to 60 %, which is
    # the bound and not beyond, and to 45 % with the second.
    assert (monitor.repetitive_rise, monitor.pass_rate_drop) == (0.1, 0.15)
    assert log.watch.found == {"repetition": 7, "accuracy": 8}
    assert len(caplog.records) == 2
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
    histogram = histograms(tmp_path / "tensorboard", "group_pass_rate")
    assert [value.num for value in histogram] == [4.0] * 12
    assert (histogram[0].min, histogram[0].max, histogram[11].max) == (0.625, 0.625, 0.0)


@pytest.mark.parametrize("last", [0.0, 0.25])
def test_a_run_in_which_nothing_had_a_gradient_ends_with_a_word(
    last: float,
    tmp_path: Path,
    monitor: MonitorConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Counted over an interruption after the second of three rounds."""
    rollouts = [rollout(slot, sample, correct=True) for slot in range(2) for sample in range(2)]
    for done, steps_here in ((0, (0, 1)), (2, (2,))):
        with closing(RunLog(tmp_path, TrackingConfig(), {}, done=done)) as writer:
            optimizer: Any = SimpleNamespace(grad_norm=0.0)
            log = GRPOLog(writer, optimizer, 1, lambda _: {}, monitor=monitor, directory=tmp_path)
            for step in steps_here:
                share = last if step == 2 else 0.0
                log.log_metrics({**rollout_metrics(rollouts), "with_gradient": share}, step, "train_rollouts/")
                log.log_metrics({"rollout_time": 3.0, "train_time": 4.0}, step, "timers/")
    log.warn_of_idleness(3)
    assert log.idle_rounds == (3 if last == 0.0 else 2)
    assert ("no response of 3 rounds had a gradient" in caplog.text) == (last == 0.0)


def histograms(directory: Path, tag: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"histograms": 0})
    events.Reload()
    return [event.histogram_value for event in events.Histograms(tag)]


def test_the_picture_is_made_of_old_metrics_too(tmp_path: Path) -> None:
    """A run from before the newer metrics, with a step without updates, and an empty run."""
    old = [{"step": step, "reward": 0.1 * step, "entropy": 0.1, "zero_gradient_groups": 0.0} for step in (1, 2, 3)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in old), "utf-8")
    assert plot_rounds(tmp_path, {"accuracy": 2}, "grpo").read_bytes().startswith(b"\x89PNG")
    (tmp_path / METRICS_FILE).write_text("", "utf-8")
    assert plot_rounds(tmp_path, {}, "grpo").read_bytes().startswith(b"\x89PNG")
