"""The table over seeds, the paper's numbers beside ours, and the pictures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from results import plain_result

from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import Result
from phimr_nemo.report.plots import Curve, plot_accuracy, plot_funnel, plot_losses, plot_reward_and_length, read_curve
from phimr_nemo.report.scores import (
    NOT_RUN,
    PAPER_BENCHMARKS,
    PAPER_STAGES,
    Entry,
    entry,
    paper_reference,
    paper_table,
    reference_table,
    table_markdown,
    write_table,
)


def result(pass1: float = 0.5, stderr: float = 0.02, questions: int = 30, samples: int = 64) -> Result:
    return plain_result(pass1, stderr=stderr, questions=questions, samples=samples)


ENTRIES = [
    Entry("SFT", 2, 256, 0.62, 0.03),
    Entry("SFT", 0, 256, 0.60, 0.04),
    Entry("DPO", 0, 256, 0.7, 0.02),
    Entry("SFT", 1, 256, 0.55, 0.05),
]


def test_rows_are_means_over_seeds() -> None:
    sft, dpo = paper_table(ENTRIES)
    assert (sft.row, sft.seeds, sft.each, sft.n) == ("SFT", (0, 1, 2), (0.60, 0.55, 0.62), 256)
    assert sft.pass1 == pytest.approx(np.mean([0.60, 0.55, 0.62]))
    assert sft.seed_stderr == pytest.approx(np.std([0.60, 0.55, 0.62], ddof=1) / math.sqrt(3))
    assert sft.question_stderr == pytest.approx(math.sqrt((0.03**2 + 0.04**2 + 0.05**2) / 3))
    assert (dpo.row, dpo.pass1, dpo.question_stderr) == ("DPO", 0.7, pytest.approx(0.02))
    assert math.isnan(dpo.seed_stderr)


def test_markdown_says_what_is_in_the_rows() -> None:
    lines = table_markdown(paper_table(ENTRIES)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(line) == len(cells[0]) for line in cells)
    by_title = dict(zip(cells[0], cells[2], strict=True))
    assert by_title["stage"] == "SFT"
    assert float(by_title["pass@1 (%)"]) == pytest.approx(59.0)
    assert by_title["questions"] == "256"
    assert by_title["seeds"] == "0, 1, 2"
    assert by_title["per seed"] == "60.0, 55.0, 62.0"
    assert dict(zip(cells[0], cells[3], strict=True))["SE (across seeds)"] == "-"


def test_the_time_of_training_stands_in_the_table_where_it_is_known() -> None:
    timed = [Entry("base", 0, 9, 0.0, 0.1), Entry("SFT", 0, 9, 0.5, 0.1, 100.0), Entry("SFT", 1, 9, 0.5, 0.1, 110.0)]
    titles, _, base, sft = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table_markdown(paper_table(timed)).splitlines()
    )
    assert (titles[-1], base[-1], sft[-1]) == ("training", "-", "1 min 45 s")
    assert "training" not in table_markdown(paper_table(ENTRIES))


def test_a_seed_given_twice_or_on_other_questions_is_refused() -> None:
    for wrong in (Entry("SFT", 0, 256, 0.1, 0.1), Entry("SFT", 3, 255, 0.1, 0.1)):
        with pytest.raises(UserError, match="row 'SFT'"):
            paper_table([*ENTRIES, wrong])


def test_the_json_table_has_the_agreed_form(tmp_path: Path) -> None:
    entries = [*ENTRIES, entry("base", 0, result(0.25, math.nan, questions=1), 12.5)]
    rows = write_table(tmp_path, entries)
    lines = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert lines[0] == {"row": "SFT", "seed": 2, "n": 256, "pass1": 0.62, "stderr": 0.03}
    assert lines[-1] == {"row": "base", "seed": 0, "n": 1, "pass1": 0.25, "stderr": None, "seconds": 12.5}
    assert (tmp_path / "table.md").read_text() == table_markdown(rows)


def test_the_papers_numbers() -> None:
    """As the paper prints them; each stage adds to its predecessor on every benchmark."""
    rows = {row.model: row for row in paper_reference()}
    stages = [rows[model] for model in PAPER_STAGES.values()]
    assert [s.scores["AIME24"] for s in stages] == [10.0, 30.0, 43.3, 50.0, 57.5]
    assert [s.scores["MATH-500"] for s in stages] == [71.8, 82.9, 89.3, 93.6, 94.6]
    assert [s.scores["GPQA-Diamond"] for s in stages] == [36.9, 42.6, 48.3, 49.0, 52.0]
    assert rows["Phi-4-Mini + S1K"].scores["MATH-500"] == 47.0
    assert rows["Phi-4-Mini + LIMO"].scores["AIME24"] is None


def test_what_was_not_run_says_so() -> None:
    def cells(ours: dict[tuple[str, str], dict[int, Result]]) -> list[str]:
        return [cell for row in reference_table(ours).rows for cell in row]

    assert cells({}).count(NOT_RUN) == len(paper_reference()) * len(PAPER_BENCHMARKS)
    one = {("SFT", "AIME24"): {0: result(0.4567, 0.0123)}, ("SFT", "GSM8K"): {0: result()}, ("mine", "AIME24"): {}}
    assert cells(one).count(NOT_RUN) == cells({}).count(NOT_RUN) - 1
    line = next(row for row in reference_table(one).rows if row[0] == "+ SFT")
    assert line[:4] == ("+ SFT", "43.3", "45.7 ± 1.2 (30x64)", "89.3")
    several = {("SFT", "AIME24"): {0: result(0.4), 1: result(0.5), 2: result(0.6)}}
    line = next(row for row in reference_table(several).rows if row[0] == "+ SFT")
    # The mean's error over seeds: 0.1 / sqrt(3).
    assert line[2] == "50.0 ± 5.8 (30x64, 3 seeds)"


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def colored(path: Path, color: tuple[int, int, int] = (0x4C, 0x78, 0xA8)) -> np.ndarray:
    """Which pixels have exactly the bars' color: [height, width]."""
    return (np.abs(pixels(path) * 255 - np.array(color)) < 1).all(axis=-1)


def test_bars_are_as_high_as_the_accuracies(tmp_path: Path) -> None:
    entries = [Entry("a", 0, 10, 0.2, 0.0), Entry("b", 0, 10, 0.4, 0.0), Entry("c", 0, 10, 0.8, 0.0)]
    plot_accuracy(paper_table(entries), tmp_path / "bars.png")
    columns = colored(tmp_path / "bars.png").sum(axis=0)
    tallest = int(columns.max())
    # A pixel or two belong to anti-aliased edges, grid lines and error bars.
    plateaus = [(np.abs(columns - share * tallest) <= 4).sum() for share in (0.25, 0.5, 1.0)]
    assert min(plateaus) > 0.8 * max(plateaus), "three bars of one width"
    assert sum(plateaus) > 0.9 * (columns > 10).sum(), "and nothing else in their color"


def test_the_funnel_bars_are_to_scale(tmp_path: Path) -> None:
    plot_funnel({"rollouts": 1000, "correct": 500, "kept": 125}, tmp_path / "funnel.png")
    widths = colored(tmp_path / "funnel.png").sum(axis=1)
    seen = sorted({int(w) for w in widths[widths > 10]})
    for share in (0.125, 0.5, 1.0):
        assert any(abs(width - share * seen[-1]) <= 3 for width in seen)


def test_curves_are_drawn_and_rewritten(tmp_path: Path) -> None:
    rng = random.Random(0)
    curve = Curve(list(range(50)), [rng.random() for _ in range(50)])
    single = Curve([0], [1.0])
    plot_losses({"SFT": curve, "DPO": single}, tmp_path / "losses.png")
    plot_reward_and_length(curve, curve, tmp_path / "reward.png")
    for name in ("losses.png", "reward.png"):
        halves = np.array_split(colored(tmp_path / name), 2, axis=1)
        assert all(half.sum() > 10 for half in halves), f"a panel of {name} is empty"
    first = (tmp_path / "losses.png").read_bytes()
    plot_losses({"SFT": curve, "DPO": single}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["losses.png", "reward.png"]


def test_curves_come_from_the_metrics_file(tmp_path: Path) -> None:
    lines = [{"step": 0, "loss": 2.0}, {"step": 1, "val": 9.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    assert read_curve(tmp_path, "loss") == Curve([0, 2], [2.0, 1.5])
    with pytest.raises(UserError, match="no metric 'reward'"):
        read_curve(tmp_path, "reward")
