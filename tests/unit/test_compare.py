"""`phimr compare`: differences of settings, curves over each other, the paired difference, flipped questions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from shown import HOSTILE, SAMPLES, evaluation
from typer.testing import CliRunner

from phimr_nemo.cli.main import app
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.statistics import paired_bootstrap
from phimr_nemo.report.plots import Curve
from phimr_nemo.report.tables import RESAMPLES, Table
from phimr_nemo.show.compare import compare, write_comparison
from phimr_nemo.show.curves import text_plot
from phimr_nemo.store.runs import METRICS_FILE, RunDirectory

BEFORE, AFTER = [2, 1, 0, 2, 0, 1], [0, 1, 1, 2, 2, 2]


def training(path: Path, lr: float, losses: Sequence[float]) -> Path:
    config = f"run:\n  output: {path}\n  seed: 0\nbase: {path.parent}/base/hf\noptim:\n  lr: {lr}\n"
    RunDirectory(path).describe(stage="sft", config_yaml=config, seed=0, facts={})
    lines = [{"step": step, "time": float(step), "loss": loss} for step, loss in enumerate(losses, 1)]
    (path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    for name, right, lr in (("one", BEFORE, 0.5), ("two", AFTER, 0.25)):
        evaluation(tmp_path / name / "evaluate-sft", "SFT", right, hostile=2)
        training(tmp_path / name / "sft", lr, [4.0, 3.0, 2.0, 1.0] if name == "one" else [4.0, 2.0, 1.0, 0.5])
    training(tmp_path / "two" / "dpo", 1.0, [1.0])
    return tmp_path / "one", tmp_path / "two"


def cells(table: Table | None) -> list[tuple[str, ...]]:
    assert table is not None
    return list(table.rows)


def test_only_settings_that_differ_are_named(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    # The directory's own name is no difference, neither in run.output nor in the model that it was made from.
    assert cells(found.settings) == [("sft", "optim.lr", "0.5", "0.25")]
    assert found.alone == ["dpo: only in two"]
    assert found.names == ("one", "two")


def test_the_difference_is_the_paired_bootstraps(two: tuple[Path, Path]) -> None:
    [row] = cells(compare(*two).scores)
    before, after = (np.array(counts) / SAMPLES for counts in (BEFORE, AFTER))
    known = paired_bootstrap(before.tolist(), after.tolist(), resamples=RESAMPLES, confidence=0.95, seed=0)
    assert row[0] == "evaluate-sft"
    assert [cell.partition(" ")[0] for cell in row[1:3]] == [f"{100 * share.mean():.1f}" for share in (before, after)]
    assert row[3:] == (
        f"{100 * (after - before).mean():+.1f}",
        f"{100 * known.low:+.1f} to {100 * known.high:+.1f}",
        str(int((after > before).sum())),
        str(int((after < before).sum())),
        "6",
    )


def test_flipped_questions_come_with_the_largest_change_first(two: tuple[Path, Path]) -> None:
    flipped = cells(compare(*two).flipped)
    assert [(row[1], *row[4:]) for row in flipped] == [
        ("p0", "2 of 2", "0 of 2"),
        ("p4", "0 of 2", "2 of 2"),
        ("p2", "0 of 2", "1 of 2"),
        ("p5", "1 of 2", "2 of 2"),
    ]
    assert flipped[0][2:4] == ("What is $1 \\cdot 0$?", "0")


def test_questions_that_only_one_was_asked_are_left_out(tmp_path: Path) -> None:
    one, two = evaluation(tmp_path / "a", "SFT", [2, 0, 1]), evaluation(tmp_path / "b", "DPO", [2, 2])
    found = compare(one, two)
    assert [row[3:] for row in cells(found.scores)] == [("+50.0", "+0.0 to +100.0", "1", "0", "2 of 3 and 2")]
    assert found.scores is not None
    assert "asked different questions" in found.scores.note
    assert [row[1] for row in cells(found.flipped)] == ["p1"]
    for path in (tmp_path / "c", tmp_path / "d"):
        evaluation(path, "SFT", [2] if path.name == "c" else [2, 2])
    asked = json.loads((tmp_path / "d" / "results.json").read_text())
    asked["per_question"] = {"other": 1.0}
    (tmp_path / "d" / "results.json").write_text(json.dumps(asked))
    assert [row[3:] for row in cells(compare(tmp_path / "c", tmp_path / "d").scores)] == [
        ("-", "-", "-", "-", "0 of 1")
    ]


def test_two_runs_are_compared_whatever_their_names(two: tuple[Path, Path]) -> None:
    found = compare(two[0] / "sft", two[1] / "dpo")
    assert [row[:2] for row in cells(found.settings)] == [("sft", "base"), ("sft", "optim.lr")]
    assert list(found.curves) == ["SFT: loss"]
    assert (found.scores, found.flipped) == (None, None)
    # Their names are as long as they have to be.
    assert compare(two[0] / "sft", two[1] / "sft").names == ("one/sft", "two/sft")


def test_what_cannot_be_compared_is_said(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is compared with itself"):
        compare(two[0], two[0] / ".." / "one")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="have no run in common"):
        compare(two[0], tmp_path / "none")


def test_the_terminal_and_the_page_say_the_same(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["compare", *map(str, two), "--out", str(out)], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0
    for words in ("optim.lr", "0.25", "evaluate-sft", "dpo: only in two", "1 one, 2 two, * both", "sft: loss"):
        assert words in done.output
    page = (out / "compare.html").read_text("utf-8")
    for row in (*cells(compare(*two).settings), *cells(compare(*two).scores)):
        assert all(f"<td>{cell}</td>" in page for cell in row)
    assert page.count('src="data:image/png;base64,') == 1
    assert (out / "curve-0.png").read_bytes().startswith(b"\x89PNG")
    assert "responses.html" in page
    assert "<script>document" not in page + (out / "responses.html").read_text("utf-8").partition("<script>")[0]
    assert HOSTILE not in done.output


def test_hostile_names_and_questions_stay_text(tmp_path: Path) -> None:
    evil = "<script>x</script>\x1b[2J"
    found = compare(evaluation(tmp_path / "a", "SFT", [2, 0]), evaluation(tmp_path / "b", evil, [1, 2]))
    write_comparison(found, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert "<script" not in page


# ---- curves as text


def marked(lines: Sequence[str]) -> dict[tuple[int, int], str]:
    """(line from the top, column) -> mark."""
    field = [line.partition("|")[2] for line in lines if "|" in line]
    return {(y, x): mark for y, row in enumerate(field) for x, mark in enumerate(row) if mark != " "}


def test_every_value_stands_where_it_belongs() -> None:
    lines = text_plot({"a": Curve([0, 1, 2], [0.0, 5.0, 10.0])}, "t", width=21, height=11)
    assert marked(lines) == {(10, 0): "1", (5, 10): "1", (0, 20): "1"}
    assert (lines[0], lines[1].split("|")[0].strip(), lines[11].split("|")[0].strip()) == ("t", "10", "0")
    assert re.fullmatch(r" +0 +2 steps", lines[-2])
    assert lines[-1].split() == ["1", "a"]


def test_runs_share_a_scale_and_meet_in_a_star() -> None:
    lines = text_plot({"a": Curve([0, 10], [1.0, 3.0]), "b": Curve([0, 5], [1.0, 2.0])}, "t", width=11, height=3)
    assert marked(lines) == {(2, 0): "*", (0, 10): "1", (1, 5): "2"}


def test_a_column_is_a_mean_and_no_number_is_no_point() -> None:
    curve = Curve(list(range(100)), [float("nan") if step == 50 else float(step % 2) for step in range(100)])
    lines = text_plot({"a": curve}, "t", width=2, height=3)
    # Of 0 to 49 a half are odd; 50 is left out, and of 51 to 99 25 are.
    assert [lines[place].split("|")[0].strip() for place in (1, 3)] == [f"{25 / 49:.4g}", "0.5"]
    assert text_plot({"a": Curve([1], [float("inf")])}, "t") == ["t", "  (no values)"]
    assert set(marked(text_plot({"a": Curve([3], [2.0])}, "t", width=9, height=5))) == {(2, 0)}
