"""`phimr report`: the page says what the runs left, hostile names stay text, nothing comes from outside."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from results import plain_result

from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import Lengths, write_result
from phimr_nemo.jobs.quickstart import write_report
from phimr_nemo.report.collect import by_benchmark, data_roots, find_evaluations, find_runs
from phimr_nemo.report.run import write_run_report
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

HOSTILE = "<script>alert('x')</script> | $\\frac{1}{0}$"
QUESTIONS = 10


def evaluation(path: Path, correct: int, *, seed: int = 0, **settings: Any) -> Path:
    """An evaluation's directory; the first `correct` questions are right."""
    per_question = {f"q{number}": float(number < correct) for number in range(QUESTIONS)}
    share = correct / QUESTIONS
    bins = [0] * 36
    bins[8] = 2 * QUESTIONS
    result = plain_result(
        share,
        questions=QUESTIONS,
        mean_tokens=16.0,
        per_question=per_question,
        majority_at_k={1: share, 2: share},
        lengths=Lengths(2 * QUESTIONS, {0.5: 16, 0.9: 16, 0.99: 16, 1.0: 16}, 16, 16, tuple(bins)),
    )
    path.mkdir(parents=True)
    write_result(path / "results.json", result, {"teacher": "abcdef", "problems": "q", **settings})
    run(path, "evaluate", seed=seed)
    return path


def run(path: Path, stage: str, *, seed: int = 0, metrics: list[dict[str, float]] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(
        f"run:\n  seed: {seed}\nproblems:\n  kind: file\n  path: own.jsonl\nx: {seed}\n"
    )
    made = {"stage": stage, "seed": seed, "starts": ["2026-01-01T00:00:00Z"], "versions": {"git": "c0ffee" * 7}}
    (path / "run.json").write_text(json.dumps(made))
    if metrics is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    evaluation(root / "a", 5, row="SFT", benchmark="AIME24", edition="tested")
    evaluation(root / "b", 8, row="DPO", benchmark="AIME24", edition="tested")
    evaluation(root / "c", 3, row=HOSTILE, benchmark="mine")
    run(root / "sft", "sft", metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.25}])
    run(root / "grpo", "grpo", metrics=[{"step": 1, "reward": 0.1, "response_length": 9.0}])
    # Native checkpoints are no runs of their own.
    run(root / "sft" / "checkpoints" / "step-1", "sft")
    return root


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_page_holds_what_the_runs_left(runs: Path, tmp_path: Path) -> None:
    page = write_run_report([runs], tmp_path / "out").read_text("utf-8")
    text = text_of(page)
    assert "SFT 50.0 10.0 - 50.0 50.0 0.0 0.0 16 10 2 0" in text
    # Three of ten questions more.
    assert "DPO - SFT +30.0" in text
    # Beside the paper's 43.3 and 50.0.
    assert "+ SFT 43.3 50.0 ± 10.0 (10x2) 89.3 not run" in text
    assert "+ rollout DPO 50.0 80.0 ± 10.0 (10x2)" in text
    assert "sft sft 0 2 1.25 - 1 no c0ffeec0ffee" in text
    assert "x: 0" in text
    assert page.count("<details>") == 5
    assert "abcdef" in text
    in_markdown = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "| SFT | 50.0 | 10.0 | - | 50.0 |" in in_markdown
    assert "| + SFT | 43.3 | 50.0 ± 10.0 (10x2) | 89.3 | not run |" in in_markdown


def test_the_page_is_self_contained_and_names_stay_text(runs: Path, tmp_path: Path) -> None:
    page = write_run_report([runs], tmp_path / "out").read_text("utf-8")
    assert "<script" not in page
    assert html.escape(HOSTILE, quote=False).split("'")[0] in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    # A score and a length picture a benchmark, loss, reward, length.
    assert len(sources) == 2 * 2 + 3
    assert 'name="viewport"' in page


def test_a_distillation_stands_on_the_page(tmp_path: Path) -> None:
    evaluation(tmp_path / "runs" / "a", 5, row="distillation", benchmark="mine")
    run(tmp_path / "runs" / "distill", "distill", metrics=[{"step": 1, "reverse_kl": 0.5, "loss": 0.75}])
    text = text_of(write_run_report([tmp_path / "runs"], tmp_path / "out").read_text("utf-8"))
    assert "distillation 50.0" in text
    assert "distill distill 0 1 0.75" in text
    assert "reverse KL from the teacher (nats per token)" in text


def test_a_second_report_is_the_same(runs: Path, tmp_path: Path) -> None:
    first = write_run_report([runs], tmp_path / "out").read_bytes()
    assert write_run_report([runs], tmp_path / "out").read_bytes() == first


def test_rows_stand_in_the_recipes_order(runs: Path) -> None:
    evaluation(runs / "0", 1, row="base", benchmark="AIME24")
    evaluation(runs / "9", 1, row="A model of mine", benchmark="AIME24")
    assert list(by_benchmark(find_evaluations([runs]))["AIME24"]) == ["base", "SFT", "DPO", "A model of mine"]


def test_a_model_twice_with_one_seed_is_refused(runs: Path, tmp_path: Path) -> None:
    evaluation(runs / "d", 6, row="SFT", benchmark="AIME24")
    with pytest.raises(UserError, match="'SFT' on AIME24 with seed 0"):
        write_run_report([runs], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["{", '{"questions": 1}', "[]"])
def test_a_damaged_result_is_named(runs: Path, tmp_path: Path, damage: str) -> None:
    (runs / "b" / "results.json").write_text(damage)
    with pytest.raises(UserError) as caught:
        write_run_report([runs], tmp_path / "out")
    assert str(runs / "b" / "results.json") in caught.value.problem


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished evaluation"):
        write_report([tmp_path], tmp_path / "out")


def test_the_command_serves_evaluations_that_are_no_quickstart(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report([runs], tmp_path / "out")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    assert not (tmp_path / "out" / "table.json").exists()


def test_data_steps_are_those_that_made_data(tmp_path: Path) -> None:
    """The responses of an evaluation are no step of the data."""

    def records(path: Path) -> None:
        row = {"id": "1", "source": str(path), "question": "q", "answer": "1", "solution": None, "domain": None}
        table = rows_to_table([{**row, "difficulty": None, "metadata": "{}"}], "problems")
        write_shard(path, 0, table, kind="problems")
        finish(path, kind="problems", config={}, counts={})

    evaluation(tmp_path / "seed-0" / "evaluate-sft", 3, row="SFT", benchmark="mine")
    records(tmp_path / "seed-0" / "evaluate-sft" / "rollouts")
    assert data_roots([tmp_path]) == []
    records(tmp_path / "seed-0" / "problems")
    records(tmp_path / "seed-1" / "problems")
    assert [path.name for path in data_roots([tmp_path])] == ["seed-0", "seed-1"]
    page = write_run_report([tmp_path], tmp_path / "out").read_text("utf-8")
    assert page.count("Records after each data step") == 2 * 2


def test_runs_are_found_once_in_order_and_behind_links(runs: Path, tmp_path: Path) -> None:
    names = ["a", "b", "c", "grpo", "sft"]
    assert [run.name for run in find_runs([runs])] == names
    (runs / "sft" / "loop").symlink_to(runs)
    assert [run.name for run in find_runs([runs])] == names
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "all").symlink_to(runs)
    assert [run.name for run in find_runs([linked])] == [f"all/{name}" for name in names]
    assert len(find_evaluations([linked])) == 3


def test_a_score_of_a_model_that_was_replaced_is_marked(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("kept", "replaced", "gone")}
    for model in models.values():
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(b"weights")
    for number, (name, model) in enumerate(models.items()):
        path = evaluation(tmp_path / "runs" / name, 4, row=f"row-{name}", benchmark="AIME24", model=str(model))
        results = json.loads((path / "results.json").read_text())
        results["made_from"] = {"inputs": {"model": content_of(model)}, "config": {"number": number}}
        (path / "results.json").write_text(json.dumps(results))
    (models["replaced"] / "model.safetensors").write_bytes(b"Weights")
    (models["gone"] / "config.json").unlink()
    (models["gone"] / "model.safetensors").unlink()
    models["gone"].rmdir()
    text = text_of(write_run_report([tmp_path / "runs"], tmp_path / "out").read_text("utf-8"))
    assert f"The score of row-replaced on AIME24 is not of what {models['replaced']} holds now." in text
    assert text.count("is not of what") == 1
