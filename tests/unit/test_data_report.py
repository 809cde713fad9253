"""`phimr data report`: the numbers are the manifests', hostile text stays text, pictures show what is there."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from phimr_nemo.data.curate.shape import LENGTH_BINS, TIERS, bin_start, length_bins, shape, shape_where
from phimr_nemo.errors import UserError
from phimr_nemo.report.data import difficulty_of, find_steps, funnel, pass_rates, read_shape, tiles, write_data_report
from phimr_nemo.report.data_figures import short_name, short_number
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

VERDICTS = {"correct": 5, "wrong": 2, "timeout": 1}
HOSTILE = "<script>alert('x')</script> $\\frac{1}{0}$ & \"quoted\""


def directory(
    path: Path, kind: Kind, rows: list[dict[str, Any]], counts: dict[str, int], made_of: list[Path]
) -> Path:
    half = (len(rows) + 1) // 2
    for index, part in enumerate((rows[:half], rows[half:])):
        write_shard(path, index, rows_to_table(part, kind), kind=kind)
    inputs = {f"verdicts.{number}": content_of(source) for number, source in enumerate(made_of)}
    finish(path, kind=kind, config={}, inputs=inputs, counts=counts)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    names = [name for name, count in VERDICTS.items() for _ in range(count)]
    base = {"question": "q", "answer": "1", "response": "r", "teacher": "t", "seed": 0, "finish_reason": "stop"}
    graded = [
        {**base, "id": f"{i}", "problem_id": f"{i}", "sample_index": 0, "tokens": 100 * i, "domain": None}
        | {
            "difficulty": "middle" if i % 2 else None,
            "metadata": "{}",
            "verdict": name,
            "extracted": "",
            "reason": "",
        }
        | {"grader": "g"}
        for i, name in enumerate(names)
    ]
    verdicts = directory(root / "verdicts", "verdicts", graded, VERDICTS, [])
    conversations = [
        {"id": f"{i}", "problem_id": "p", "question": "q", "response": "r", "difficulty": "graduate"}
        for i in range(3)
    ]
    drops = {"dropped: verdict wrong": 2, f"dropped: {HOSTILE}": 3, "input: rollouts": 8}
    directory(root / "curated" / "midtrain", "conversations", conversations, drops, [verdicts])
    table = np.zeros((len(TIERS), LENGTH_BINS), int)
    table[4, 12:15] = 1
    (root / "curated" / "midtrain" / "shape.json").write_text(json.dumps({"kept": table.tolist()}), "utf-8")
    (root / "curated" / "shape.json").write_text(json.dumps({"correct": table.tolist()}), "utf-8")
    pairs = [{"id": "a", "problem_id": "p", "question": "q", "chosen": "c", "rejected": "r", "mode": "random"}]
    of_pairs = {"dropped: no partner left": 6, "input: rollouts": 8}
    directory(root / "curated" / "pairs", "pairs", [*pairs, {**pairs[0], "id": "b"}], of_pairs, [verdicts])
    sides = {"chosen": table[4].tolist(), "rejected": table[4].tolist()}
    (root / "curated" / "pairs" / "shape.json").write_text(json.dumps(sides), "utf-8")
    prompts = [
        {"id": f"{i}", "problem_id": f"{i}", "question": "q", "answer": "1", "pass_rate": i / 4, "mean_length": 10.0}
        | {"length_spread": 0.1, "hard": i < 2}
        for i in range(1, 4)
    ]
    directory(root / "curated" / "prompts", "prompts", prompts, {"input: problems": 8}, [verdicts])
    return root


def test_steps_stand_in_order_with_their_inputs(run: Path) -> None:
    steps = find_steps([run])
    assert [(step.name, step.kind, step.inputs) for step in steps] == [
        ("verdicts", "verdicts", ()),
        ("curated/midtrain", "conversations", ("verdicts",)),
        ("curated/pairs", "pairs", ("verdicts",)),
        ("curated/prompts", "prompts", ("verdicts",)),
    ]
    assert [step.name for step in find_steps([run / "verdicts", run / "curated"])][:2] == [
        "verdicts",
        "curated/midtrain",
    ]
    assert funnel(steps) == {
        "verdicts": 8,
        "verdicts: correct": 5,
        "curated/midtrain": 3,
        "curated/pairs": 2,
        "curated/prompts": 3,
    }
    assert {tile["name"]: tile["value"] for tile in tiles(steps)} == {
        "verdicts": "8",
        "of the verdicts are correct": "62.5%",
        "conversations": "3",
        "pairs": "2",
        "prompts": "3",
    }


def test_a_step_is_shown_once_however_often_it_is_named(run: Path) -> None:
    assert len(find_steps([run, run / "curated"])) == len(find_steps([run])) == 4


def test_narrow_columns(run: Path) -> None:
    verdicts, _, _, prompts = find_steps([run])
    assert difficulty_of(verdicts).tolist() == [0, 4, 0, 0, 0, 4]
    rates, hard = pass_rates(prompts)
    assert rates.tolist() == [0.25, 0.5, 0.75]
    assert hard.tolist() == [True, False, False]


def test_the_page_holds_the_numbers_and_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    page = write_data_report([run], tmp_path / "out").read_text("utf-8")
    for reason, count in (("verdict wrong", 2), ("no partner left", 6), ("conversations written", 3)):
        assert re.search(rf"{reason}</td>.*?<td class=\"count\">{count}</td>", page, re.DOTALL)
    # 2 of 8 rollouts are a quarter of the bar; 2 pairs of 8 rollouts, two each, are half.
    assert re.search(r"verdict wrong</td>\s*<td><div class=\"track\"><div class=\"fill\" style=\"width: 25.00%", page)
    assert re.search(r"pairs written, 2 rollouts each</td>\s*<td>.{,60}width: 50.00%", page)
    assert "<script" not in page
    assert html.escape(HOSTILE, quote=False).replace("'", "&#39;").replace('"', "&#34;") in page
    sources = re.findall(r"(?:src|href)=\"([^\"]{,30})", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


def test_the_pictures_are_pictures(run: Path, tmp_path: Path) -> None:
    page = write_data_report([run], tmp_path / "out").read_text("utf-8")
    embedded = [base64.b64decode(data) for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert sorted(embedded) == sorted(files.values())
    assert {name.rstrip("0123456789.png-") for name in files} == {
        "funnel",
        "lengths-by-verdict",
        "lengths",
        "difficulty",
        "pass-rates",
    }
    for path in (tmp_path / "out").glob("*.png"):
        pixels = imread(path)[..., :3]
        assert pixels.shape[1] == 1040
        # Ink, but mostly paper.
        assert 0.01 < (pixels.min(axis=2) < 0.9).mean() < 0.8


def test_a_directory_with_a_hostile_name(tmp_path: Path) -> None:
    root = tmp_path / "<img src=x onerror=alert(1)> $x^$"
    directory(root / "prompts", "prompts", [], {}, [])
    page = write_data_report([root], tmp_path / "out").read_text("utf-8")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; $x^$" in page


def test_what_is_damaged_or_absent_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished record directory under"):
        write_data_report([tmp_path / "out"], tmp_path / "out")
    shape_file = run / "curated" / "midtrain" / "shape.json"
    for text in ("{", "[]", '{"kept": [1, 2]}', '{"kept": "x"}', '{"kept": [[1e99]]}'):
        shape_file.write_text(text, "utf-8")
        with pytest.raises(UserError, match=r"shape\.json is damaged"):
            write_data_report([run], tmp_path / "out")
    shape_file.unlink()
    (run / "curated" / "prompts" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-00000\.parquet cannot be read"):
        write_data_report([run], tmp_path / "out")


def test_shapes_count_difficulty_and_length(tmp_path: Path) -> None:
    tokens = np.array([0, 1, 2, 3, 4, 1024, 1448, 1449, 10**9, -1])
    characters = np.full(len(tokens), 3300)
    bins = length_bins(tokens, characters)
    for place, count in zip(bins[:-2].tolist(), tokens[:-2].tolist(), strict=True):
        assert bin_start(place) <= max(count, 1) < bin_start(place + 1)
    assert bins[-2] == LENGTH_BINS - 1
    # 3,300 characters are 1,000 tokens.
    assert bins[-1] == length_bins(np.array([1000]), np.array([0]))[0]
    difficulty = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 5], np.uint8)
    table = shape(difficulty, bins)
    assert table.sum(axis=1).tolist() == np.bincount(difficulty, minlength=len(TIERS)).tolist()
    assert table.sum(axis=0).tolist() == np.bincount(bins, minlength=LENGTH_BINS).tolist()
    fates = (np.arange(10) % 3).astype(np.uint8)
    parts = [shape_where(fates, value, difficulty, bins) for value in range(3)]
    assert np.array_equal(sum(parts), table)
    (tmp_path / "shape.json").write_text(json.dumps({"a": table.tolist()}), "utf-8")
    assert np.array_equal(read_shape(tmp_path / "shape.json")["a"], table)


def test_numbers_and_names_are_short() -> None:
    assert [short_number(n) for n in (0, 950, 12_345, 1_600_000, 3 * 10**10)] == [
        "0",
        "950",
        "12.3 K",
        "1.6 M",
        "30 B",
    ]
    assert short_name("a" * 30) == "…" + "a" * 23
    assert len(short_name("a" * 30)) == len(short_name("a" * 24)) == 24
