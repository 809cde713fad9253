"""`phimr status --watch`: the order of a pipeline, its times, what it says, and when watching ends."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from results import plain_result
from rich.console import Console
from shown import HOSTILE, row, sample
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.config import QuickstartConfig, load_config
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.jobs.quickstart import seed_steps
from phimr_nemo.jobs.status import NO_RUNS
from phimr_nemo.jobs.watch.page import MOST_POINTS, _points, write_live_page
from phimr_nemo.jobs.watch.pipeline import NOT_BEGUN, SETTLED_SECONDS, Pipeline, read_pipeline
from phimr_nemo.jobs.watch.watch import shortened, summary, watch
from phimr_nemo.store.responses import write_responses
from phimr_nemo.store.runs import DONE_FILE, METRICS_FILE, RESULTS_FILE, RUN_FILE, TIME
from phimr_nemo.store.shards import rows_to_table, write_shard

NOW = 1_700_000_000.0
"""A whole second, as run.json has it, and long ago."""
STEPS = [
    step.name for step in seed_steps(load_config(QuickstartConfig, Path("conf/quickstart/tiny.yaml")), 0, Path())
]


def stamp(seconds: float) -> str:
    return time.strftime(TIME, time.gmtime(seconds))


def run(path: Path, stage: str, began: float, ended: float | None, *, written: float | None = None) -> Path:
    """A run that began and ended so many seconds before `NOW`; `written`: when it wrote last, if it has not ended."""
    path.mkdir(parents=True)
    (path / RUN_FILE).write_text(json.dumps({"stage": stage, "starts": [stamp(NOW - began)], "slurm_job": None}))
    if ended is not None:
        (path / DONE_FILE).write_text(json.dumps({"finished": stamp(NOW - ended)}))
    age(path, ended if written is None else written)
    return path


def age(path: Path, seconds: float | None) -> None:
    for file in filter(Path.is_file, path.iterdir()):
        os.utime(file, (NOW - (seconds or 0.0),) * 2)


def read(root: Path, now: float = NOW) -> Pipeline:
    return read_pipeline(root, now=now, queue={})


def by_name(found: Pipeline) -> dict[str, Any]:
    return {step.name: step for step in found.steps}


def seeds(root: Path) -> Path:
    """A finished seed whose steps took 10 s, 20 s, ...; one that is in its third step, and has left its second."""
    at = 10_000.0
    for place, name in enumerate(STEPS, 1):
        run(root / "seed-0" / name, "evaluate", at, at - 10.0 * place)
        at -= 10.0 * place
    run(root / "seed-1" / STEPS[0], "base", 50.0, 45.0)
    run(root / "seed-1" / STEPS[1], "generate", 40.0, 30.0)
    run(root / "seed-1" / STEPS[2], "verify", 12.0, None, written=2.0)
    return root


def test_a_seeds_steps_stand_in_their_order_with_those_to_come(tmp_path: Path) -> None:
    found = read(seeds(tmp_path))
    assert [step.name for step in found.steps] == [f"seed-{seed}/{name}" for seed in (0, 1) for name in STEPS]
    states = [step.state for step in found.steps]
    count = len(STEPS)
    assert states == ["done"] * (count + 2) + ["running"] + [NOT_BEGUN] * (count - 3)
    assert (found.done, found.is_over) == (count + 2, False)


def test_times_are_those_of_the_finished_seed(tmp_path: Path) -> None:
    found = read(seeds(tmp_path))
    steps = by_name(found)
    assert [steps[f"seed-0/{name}"].seconds for name in STEPS] == [10.0 * place for place in range(1, len(STEPS) + 1)]
    third = steps[f"seed-1/{STEPS[2]}"]
    assert (third.seconds, third.expected, third.left) == (12.0, 30.0, 18.0)
    assert steps[f"seed-1/{STEPS[3]}"].left == 40.0
    assert found.left == 18.0 + sum(10.0 * place for place in range(4, len(STEPS) + 1))
    assert found.unknown == 0
    assert found.taken == 10_000.0
    assert summary(found).startswith(f"{len(STEPS) + 2} of {2 * len(STEPS)} steps done, 2 h 46 min so far, ")


def test_what_nothing_tells_is_not_made_up(tmp_path: Path) -> None:
    run(tmp_path / "seed-0" / STEPS[0], "base", 30.0, 20.0)
    found = read(tmp_path)
    assert (found.left, found.unknown) == (0.0, len(STEPS) - 1)
    assert (
        summary(found)
        == f"1 of {len(STEPS)} steps done, 10 s so far, nothing tells the time of {len(STEPS) - 1} steps"
    )


def test_runs_that_are_no_quickstart_stand_in_the_order_of_their_starts(tmp_path: Path) -> None:
    for name, began in (("a", 100.0), ("c", 300.0), ("b", 200.0)):
        run(tmp_path / name, "sft", began, began - 10.0)
    assert [step.name for step in read(tmp_path).steps] == ["c", "b", "a"]
    # A step of that name elsewhere says nothing of this one's time.
    assert [step.expected for step in read(tmp_path).steps] == [None] * 3


def test_scores_rewards_and_losses_are_shown(tmp_path: Path) -> None:
    path = run(tmp_path / "evaluate", "evaluate", 30.0, 20.0)
    write_result(path / RESULTS_FILE, plain_result(0.625), {"row": "SFT", "benchmark": "mine"})
    for name, values in (("sft", {"loss": 0.25}), ("grpo", {"reward": 0.5, "loss": 0.1})):
        run(tmp_path / name, name, 20.0, 10.0)
        (tmp_path / name / METRICS_FILE).write_text(json.dumps({"step": 1, "time": NOW, **values}) + "\n")
    run(tmp_path / "torn", "evaluate", 9.0, None, written=1.0)
    (tmp_path / "torn" / RESULTS_FILE).write_text("{")
    assert {step.name: step.score for step in read(tmp_path).steps} == {
        "evaluate": "pass@1 62.5 ± 10.0 %", "sft": "loss 0.25", "grpo": "reward 0.5", "torn": "unreadable",
    }  # fmt: skip


def test_the_newest_responses_are_shown(tmp_path: Path) -> None:
    grpo, evaluated = run(tmp_path / "grpo", "grpo", 90.0, None), run(tmp_path / "evaluate", "evaluate", 20.0, None)
    write_responses(grpo, 10, [sample(10, prompt, 0, is_right=True) for prompt in range(5)])
    write_responses(grpo, 20, [sample(20, prompt, 0, is_right=False) for prompt in range(5)])
    [*_, last] = found = read(tmp_path).said
    assert (len(found), last.question, last.response.verdict, last.response.reward) == (
        3,
        "What is 4?",
        "wrong",
        -1.0,
    )
    rows = [row(n, 0, is_right=True) for n in range(5)]
    write_shard(evaluated / "verdicts", 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    later = time.time() + 100.0
    os.utime(evaluated / "verdicts" / "part-00000.parquet", (later, later))
    assert [(one.run, one.answer) for one in read(tmp_path).said] == [("evaluate", str(n)) for n in (2, 3, 4)]
    # One that cannot be read hides not the others.
    (evaluated / "verdicts" / "part-00000.parquet").write_bytes(b"torn")
    os.utime(evaluated / "verdicts" / "part-00000.parquet", (later, later))
    assert [one.question for one in read(tmp_path).said] == ["What is 2?", "What is 3?", "What is 4?"]


def watched(root: Path, changes: Sequence[Callable[[], object]], **options: Any) -> tuple[Pipeline, str, list[float]]:
    """Watch, with a change of the runs at every look: the last state, what was printed, and the looks' times."""
    left, clock, looks = list(changes), [NOW], []

    def sleep(seconds: float) -> None:
        looks.append(clock[0])
        clock[0] += seconds
        if left:
            left.pop(0)()

    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=options.pop("terminal", False))
    found = watch(root, console, every=10.0, page=options.get("page"), clock=lambda: clock[0], sleep=sleep)
    assert found is not None
    return found, out.getvalue(), looks


def test_watching_ends_with_the_pipeline(tmp_path: Path) -> None:
    path = run(tmp_path / "sft", "sft", 100.0, None, written=0.0)
    page = tmp_path / "live" / "page.html"
    pages = []

    def finish() -> None:
        pages.append(page.read_text("utf-8"))
        (path / DONE_FILE).write_text(json.dumps({"finished": stamp(NOW + 20.0)}))
        os.utime(path / DONE_FILE, (NOW + 20.0,) * 2)

    found, printed, looks = watched(tmp_path, [lambda: None, finish], page=page)
    assert found.is_over
    # 20 s of work, and as long as a next step may take to begin.
    assert looks[-1] + 10.0 - (NOW + 20.0) == SETTLED_SECONDS
    assert "sft" in printed
    assert "1 of 1 steps done, 2 min 00 s so far" in printed
    assert '<meta http-equiv="refresh" content="10">' in pages[0]
    assert 'http-equiv="refresh"' not in page.read_text("utf-8")


def test_a_stop_ends_watching_and_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "sft", "sft", 100.0, None, written=0.0)

    def stop() -> None:
        raise KeyboardInterrupt

    found, printed, looks = watched(tmp_path, [lambda: None, stop])
    assert (len(looks), found.is_over) == (2, False)
    assert "0 of 1 steps done" in printed


def test_a_pipeline_that_is_over_is_shown_once(tmp_path: Path) -> None:
    run(tmp_path / "sft", "sft", 900.0, 800.0)
    done = CliRunner().invoke(
        app, ["status", str(tmp_path), "--watch", "--page", str(tmp_path / "p.html")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert done.output.count("1 of 1 steps done") == 1
    assert (tmp_path / "p.html").is_file()


def test_a_narrow_terminal_cuts_names_and_nothing_else(tmp_path: Path) -> None:
    path = run(tmp_path / "mine" / ("evaluate-" + "x" * 80), "evaluate", 900.0, 749.0)
    write_result(path / RESULTS_FILE, plain_result(0.5), {"row": "GRPO", "benchmark": "mine"})
    age(path, 749.0)
    out = io.StringIO()
    watch(tmp_path, Console(file=out, width=80), every=10.0, page=None, clock=lambda: NOW)
    _, line, *_ = out.getvalue().splitlines()
    assert re.fullmatch(r"mine/evaluate-x+… +done +2 min 31 s +pass@1 50\.0 ± 10\.0 %\s*", line)


@pytest.mark.parametrize("options", [[], ["--watch"]])
def test_no_runs_are_said(options: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["status", str(tmp_path), *options], catch_exceptions=False)
    assert (done.exit_code, done.output.strip().splitlines()[-1].strip()) == (0, NO_RUNS)


def test_a_low_terminal_gets_several_steps_in_one_line(tmp_path: Path) -> None:
    root = seeds(tmp_path)
    path = root / "seed-0" / "evaluate-grpo"
    write_result(path / RESULTS_FILE, plain_result(0.5), {"row": "GRPO", "benchmark": "mine"})
    found = read(root)
    count, steps = len(STEPS), list(found.steps)
    assert shortened(steps, None) == shortened(steps, 2 * count) == steps
    # The finished seed is one line.
    first, *others = shortened(steps, count + 1)
    took = sum(10.0 * place for place in range(1, count + 1))
    assert (first.name, first.state, first.seconds) == (f"seed-0: {count} steps", "done", took)
    assert first.score == "pass@1 50.0 ± 10.0 %"
    assert others == steps[count:]
    # Then what is done, then what is to come.
    first, running, *_, last = shortened(steps, 6)
    assert (first.name, first.state, first.seconds) == (f"{count + 2} steps", "done", took + 5.0 + 10.0)
    assert running.name == f"seed-1/{STEPS[2]}"
    assert (last.name, last.state) == (f"{count - 6} steps", NOT_BEGUN)
    assert last.left == sum(10.0 * place for place in range(7, count + 1))
    for most in range(3, 2 * count):
        shown = shortened(steps, most)
        assert len(shown) <= most
        assert sum(step.left or 0.0 for step in shown) == found.left


def test_neither_terminal_nor_page_obeys_a_response(tmp_path: Path) -> None:
    path = run(tmp_path / "evaluate", "evaluate", 900.0, 800.0)
    rows = [row(0, 0, is_right=True, text=HOSTILE, question="<b>\x1b[2J</b>", answer="</div>")]
    write_shard(path / "verdicts", 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    page = tmp_path / "page.html"
    _, printed, _ = watched(tmp_path, [], page=page)
    text = page.read_text("utf-8")
    for shown in (printed, text):
        assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", shown)
    assert "<script" not in text
    assert "<b>\\x1b" not in text
    assert "&lt;b&gt;\\x1b[2J" in text


def test_a_curve_is_drawn_to_scale() -> None:
    lines = [{"step": step, "loss": loss} for step, loss in ((0, 4.0), (5, 2.0), (10, 0.0), (11, float("nan")))]
    found = _points(lines, "loss")
    assert found["points"] == "6.0,6.0 160.0,60.0 314.0,114.0"
    assert found["range"] == "0 at step 10; between 0 and 4"
    assert _points(lines, "reward") == {}
    many = [{"step": step, "loss": float(step % 2)} for step in range(1000 * 2)]
    points = _points(many, "loss")["points"].split()
    assert len(points) <= MOST_POINTS


def test_the_page_shows_curves_and_scores(tmp_path: Path) -> None:
    path = run(tmp_path / "sft", "sft", 900.0, 800.0)
    (path / METRICS_FILE).write_text(
        "".join(json.dumps({"step": s, "time": NOW, "loss": 4.0 - s}) + "\n" for s in (1, 2))
    )
    age(path, 800.0)
    score = run(tmp_path / "evaluate", "evaluate", 800.0, 700.0)
    write_result(score / RESULTS_FILE, plain_result(0.25), {"row": "SFT", "benchmark": "mine"})
    write_live_page(read(tmp_path), tmp_path, tmp_path / "page.html", every=5.0)
    text = (tmp_path / "page.html").read_text("utf-8")
    assert '<polyline points="6.0,6.0 314.0,114.0">' in text
    assert "sft (SFT): loss" in text
    assert "<b>25.0 ± 10.0 %</b>" in text
    assert not re.search(r"https?://|src=|<script", text)
