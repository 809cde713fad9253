"""Narrow columns and rows of text by number: whatever the shards, they are those of the whole table."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phimr_nemo.data.curate import sets
from phimr_nemo.data.curate.lengths import TokenCounter
from phimr_nemo.data.curate.narrow import NARROW, hashes, runs
from phimr_nemo.data.curate.sets import cut
from phimr_nemo.data.curate.survey import gather, shards_of, survey
from phimr_nemo.data.parallel import in_processes
from phimr_nemo.errors import UserError
from phimr_nemo.store.records import DIFFICULTIES
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from phimr_nemo.text.tokens import spells_special_token

SIZES = (3, 0, 7, 1, 5)


def row(number: int) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "problem_id": f"p{number % 4}",
        "question": "é" * (number % 3),
        "answer": "1",
        "response": "𝔸b" * number + (" <|end|>" if number == 5 else ""),
        "teacher": "t",
        "sample_index": number,
        "seed": 0,
        "finish_reason": "length" if number % 5 == 0 else "stop",
        "tokens": number - 1,
        "domain": None,
        "difficulty": [None, *DIFFICULTIES][number % 6],
        "metadata": "{}",
        "verdict": ["correct", "wrong"][number % 2],
        "extracted": "",
        "reason": "",
        "grader": "g",
    }


@pytest.fixture
def verdicts(tmp_path: Path) -> list[Path]:
    start = 0
    for index, size in enumerate(SIZES):
        rows = [row(number) for number in range(start, start + size)]
        directory, place = (tmp_path / "one", index) if index < 3 else (tmp_path / "two", index - 3)
        write_shard(directory, place, rows_to_table(rows, "verdicts"), kind="verdicts")
        start += size
    for name in ("one", "two"):
        finish(tmp_path / name, kind="verdicts", config={})
    return [tmp_path / "one", tmp_path / "two"]


def test_every_rollout_is_in_the_bucket_of_its_problem_once(
    verdicts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimr_nemo.data.outofcore.GROUP_ROWS", 6)
    shards = shards_of(verdicts)
    assert [shard.start for shard in shards] == [0, 3, 3, 10, 11]
    found = survey(shards, tmp_path / "survey", counter=TokenCounter(), workers=1)
    buckets = list(found.buckets())
    assert len(buckets) > 1
    assert found.rows == sum(SIZES)
    problems = [set(bucket["problem"].tolist()) for bucket in buckets]
    assert len(set.union(*problems)) == sum(map(len, problems)) == 4
    narrow = np.sort(np.concatenate(buckets), order="row")
    assert narrow["row"].tolist() == list(range(sum(SIZES)))
    rows = [row(number) for number in range(sum(SIZES))]
    assert narrow["tokens"].tolist() == [r["tokens"] for r in rows]
    assert narrow["characters"].tolist() == [len(r["response"]) for r in rows]
    assert narrow["bytes"].tolist() == [len((r["question"] + r["response"]).encode()) for r in rows]
    assert narrow["stopped"].tolist() == [r["finish_reason"] == "stop" for r in rows]
    assert narrow["blank"].tolist() == [not r["response"].strip() for r in rows]
    assert narrow["forged_response"].tolist() == [n == 5 for n in range(sum(SIZES))]
    assert narrow["difficulty"].tolist() == [[5, 0, 1, 2, 3, 4][n % 6] for n in range(sum(SIZES))]
    for name, key in (("problem", "problem_id"), ("rollout", "id"), ("response", "response")):
        digests = [hashlib.blake2b(r[key].encode(), digest_size=8).digest() for r in rows]
        assert narrow[name].tolist() == [int.from_bytes(digest, "little") for digest in digests]


def test_a_rollout_takes_a_few_dozen_bytes() -> None:
    assert NARROW.itemsize <= 96


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, sum(SIZES) - 1), min_size=1, unique=True))
def test_rows_come_in_the_order_asked_for(verdicts: list[Path], numbers: list[int]) -> None:
    table = gather(shards_of(verdicts), np.array(numbers), ["id", "response"])
    assert table["id"].to_pylist() == [f"r{number}" for number in numbers]
    assert table["response"].to_pylist() == [row(number)["response"] for number in numbers]


def test_a_missing_sidecar_and_empty_verdicts_are_errors(verdicts: list[Path], tmp_path: Path) -> None:
    (verdicts[0] / "part-00001.json").unlink()
    with pytest.raises(UserError, match=r"part-00001\.json is missing"):
        shards_of(verdicts)
    write_shard(tmp_path / "empty", 0, rows_to_table([], "verdicts"), kind="verdicts")
    finish(tmp_path / "empty", kind="verdicts", config={})
    with pytest.raises(UserError, match="hold no verdicts"):
        shards_of([tmp_path / "empty"])


@settings(deadline=None)
@given(st.lists(st.text(), max_size=20), st.integers(0, 5))
def test_hashes_read_slices_of_arrow_arrays(texts: list[str], start: int) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    part = pa.array(texts, pa.string()).slice(start)
    expected = [hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts[start:]]
    assert hashes(part).tolist() == [int.from_bytes(digest, "little") for digest in expected]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=40))
def test_cuts_hold_every_row_once_within_their_limits(drawn: list[tuple[int, bool]]) -> None:
    sizes = np.array([size for size, _ in drawn], np.int64)
    groups = np.cumsum([new for _, new in drawn]).astype(np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "MAX_SHARD_ROWS", 6)
        patch.setattr(sets, "MAX_SHARD_BYTES", 50)
        for slices, together in ((cut(sizes), None), (cut(sizes, groups), groups)):
            assert [place for part in slices for place in range(part.start, part.stop)] == list(range(len(sizes)))
            for number, part in enumerate(slices):
                whole = together is not None and len(set(together[part].tolist())) == 1
                single = part.stop - part.start == 1
                assert single or whole or (sizes[part].sum() <= 50 and part.stop - part.start <= 6)
                if together is not None and number:
                    assert together[part.start] != together[part.start - 1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20))
def test_runs(values: list[int]) -> None:
    array = np.sort(np.array(values, np.int64))
    found = list(runs(array))
    assert [array[start] for start, _ in found] == sorted(set(values))
    assert [end - start for start, end in found] == [values.count(value) for value in sorted(set(values))]


@pytest.mark.parametrize(
    ("text", "forged"), [("a <|end|> b", True), ("<|/x|>", True), ("<| end |>", False), ("|end|", False), ("", False)]
)
def test_special_tokens(text: str, forged: bool) -> None:
    assert spells_special_token(text) is forged


def negated(value: int) -> int:
    if value == 13:
        raise UserError("13", rule="not 13", remedy="12")
    return -value


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items_and_errors_come_through(workers: int) -> None:
    assert in_processes(negated, list(range(12)), workers, title="t") == [-value for value in range(12)]
    with pytest.raises(UserError, match="not 13"):
        in_processes(negated, [12, 13, 14], workers, title="t")
