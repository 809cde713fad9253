"""What each stage forgets: the table from verdicts written here, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from phimr_nemo.config import load_config
from phimr_nemo.config.ablations import ForgettingConfig
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from recipes.ablations.forgetting import PLOT_FILE, STAGES, TABLE_JSON, report

# For each stage, the right answers among two of each question; a word problem and three sums, one of them hard.
RIGHT = {
    0: {"w": (0, 1, 2, 2, 2), "a": (0, 2, 1, 1, 1), "b": (0, 2, 1, 1, 2), "c": (0, 0, 1, 2, 2)},
    1: {"w": (0, 1, 2, 2, 2), "a": (0, 2, 2, 2, 2), "b": (0, 2, 1, 1, 1), "c": (0, 0, 1, 2, 2)},
}
KIND = {
    "w": ("word problem", "middle"),
    "a": ("arithmetic", "elementary"),
    "b": ("arithmetic", "elementary"),
    "c": ("arithmetic", "high_school"),
}
SAMPLES = 2


def write_evaluation(directory: Path, right: dict[str, int]) -> None:
    rows = []
    for question, count in right.items():
        domain, difficulty = KIND[question]
        for sample in range(SAMPLES):
            text = dict.fromkeys(("question", "answer", "response", "teacher", "extracted", "reason", "grader"), "")
            rows.append(
                {
                    **text,
                    "id": f"{question}{sample}",
                    "problem_id": question,
                    "sample_index": sample,
                    "seed": 0,
                    "finish_reason": "stop",
                    "tokens": 1,
                    "domain": domain,
                    "difficulty": difficulty,
                    "metadata": "{}",
                    "verdict": "correct" if sample < count else "wrong",
                }
            )
    write_shard(directory / "verdicts", 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    finish(directory / "verdicts", kind="verdicts", config={}, counts={})
    RunDirectory(directory).finish()


def quickstarts(root: Path) -> ForgettingConfig:
    for seed, right in RIGHT.items():
        for place, (name, _) in enumerate(STAGES):
            counts = {question: stages[place] for question, stages in right.items()}
            write_evaluation(root / "quickstart" / f"seed-{seed}" / f"evaluate-{name}", counts)
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}"]
    path = Path(__file__).resolve().parents[2] / "conf" / "ablations" / "forgetting.yaml"
    return load_config(ForgettingConfig, path, settings)


def test_changes_are_paired_by_question_and_bold_where_they_are_clear(tmp_path: Path) -> None:
    """Elementary sums at SFT: (-.5, -.5) in seed 0 and (0, -.5) in seed 1, so -50 and -25: -37.5 +- 12.5.

    Their errors over questions are 0 and 25: root mean square 25/sqrt(2) = 17.7, pooled over two seeds 12.5. Three
    such errors: clear. The word problem has one question a seed: its error over questions is unknown.
    """
    text = report(quickstarts(tmp_path))
    assert (tmp_path / "out" / "table.md").read_text("utf-8") == text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    families = ["arithmetic, elementary", "arithmetic, high school", "word problem, middle", "all"]
    assert names == ["family", *families, "family", *families]
    changes = [cell.strip() for cell in lines["arithmetic, elementary"].split("|")[2:-1]]
    assert changes == [
        "**+100.0 ± 0.0 (0.0)**",
        "**-37.5 ± 12.5 (17.7)**",
        "+0.0 ± 0.0 (0.0)",
        "+12.5 ± 12.5 (17.7)",
    ]
    assert "**" not in lines["word problem, middle"]
    scores = json.loads((tmp_path / "out" / TABLE_JSON).read_text("utf-8"))
    (sft,) = (cell for cell in scores if cell["family"] == "arithmetic, elementary" and cell["stage"] == "SFT")
    assert sft["each"] == [0.5, 0.75]
    assert sft["questions"] == [2, 2]
    assert math.isclose(sft["mean"], 0.625)
    assert math.isclose(sft["stderr"], 0.125)
    everything = [cell["mean"] for cell in scores if cell["family"] == "all"]
    totals = [sum(stages[place] for right in RIGHT.values() for stages in right.values()) for place in range(5)]
    assert everything == [total / (SAMPLES * 8) for total in totals]
    assert (tmp_path / "out" / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_other_questions_in_a_stage_are_refused(tmp_path: Path) -> None:
    config = quickstarts(tmp_path)
    directory = tmp_path / "quickstart" / "seed-1" / "evaluate-dpo"
    for path in (directory / "verdicts").iterdir():
        path.unlink()
    write_evaluation(directory, {"w": 1, "a": 1, "c": 1})
    with pytest.raises(UserError, match="the same questions"):
        report(config)
