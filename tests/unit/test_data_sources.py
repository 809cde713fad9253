"""Rows of every format a source may have, and clear errors for wrong columns, paths and splits."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.sources import rawfiles
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.source import piece_rows, pieces_of, read_items, source_rows
from phimr_nemo.errors import UserError

ROWS = [{"question": f"Q{index}", "answer": f"work\n#### {index}"} for index in range(5)]
EXPECTED = [(f"Q{index}", str(index)) for index in range(5)]


def read(path: Path | str, **settings: Any) -> list[tuple[str, str]]:
    source = SourceConfig(name="s", path=str(path), **{"preset": "gsm8k", **settings})
    return [(item.question, item.answer) for _, item in read_items(source) if isinstance(item, Item)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_files_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS), "utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    (tmp_path / "a.json.zst").write_bytes(zstd(json.dumps(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == EXPECTED, path.name
        assert read(path, limit=2) == EXPECTED[:2]


def test_a_directory_of_shards_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    (tmp_path / "README.md").write_text("no rows", "utf-8")
    for name in ("dataset_infos.json", "dataset_info.json", "state.json"):
        (tmp_path / name).write_text('{"default": {}}', "utf-8")
    (tmp_path / "data" / ".cache" / "x.jsonl").write_bytes(b"not rows")
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), tmp_path / "data" / "train-00001-of-00002.parquet")
    (tmp_path / "data" / "train-00000-of-00002.jsonl").write_bytes(lines(ROWS[:3]))
    assert read(tmp_path) == EXPECTED
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no files of rows"):
        read(tmp_path / "empty")


def test_an_arrow_file_of_the_other_format_is_named_and_its_remedy_works(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="cannot be read") as refused:
        read(tmp_path / "rows.arrow")
    _, command, *words = shlex.split(str(refused.value).partition("convert it: ")[2].partition("; else download")[0])
    subprocess.run([sys.executable, command, *words], check=True)
    assert read(tmp_path / "rows.parquet") == EXPECTED


def test_datasets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "one") == EXPECTED
    assert read(next((tmp_path / "one").glob("*.arrow"))) == EXPECTED
    assert read(tmp_path / "splits") == EXPECTED
    assert read(tmp_path / "splits", split="test") == EXPECTED[:1]
    with pytest.raises(UserError, match=r"\['test', 'train'\], not 'dev'"):
        read(tmp_path / "splits", split="dev")


def test_open_reasoner_zero_has_arrays_for_rows(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": "Q"}, {"from": "assistant", "ground_truth": {"value": "142"}}]]
    (tmp_path / "orz.json").write_text(json.dumps(turns), "utf-8")
    assert read(tmp_path / "orz.json", preset="orz") == [("Q", "142")]
    (tmp_path / "orz.jsonl").write_bytes(lines(turns * 2))
    assert read(tmp_path / "orz.jsonl", preset="orz") == [("Q", "142")] * 2
    with pytest.raises(UserError, match="not an object"):
        read(tmp_path / "orz.jsonl", preset=None)


def test_wrong_columns_are_one_error_that_names_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"prompt": "Q", "gold": "1"}]))
    with pytest.raises(UserError, match=r"line 1 has the columns \['gold', 'prompt'\]") as caught:
        read(path)
    assert "['question', 'answer']" in caught.value.rule
    assert read(path, preset=None) == [("Q", "1")]
    with pytest.raises(UserError, match="the answer column 'label'"):
        read(path, preset=None, answer="label")


def test_a_later_row_of_other_columns_is_counted_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([*ROWS[:1], {"other": 1}]))
    items = list(read_items(SourceConfig(name="s", path=str(tmp_path / "a.jsonl"), preset="gsm8k")))
    assert [place for place, _ in items] == ["line 1", "line 2"]
    assert isinstance(items[1][1], UnusableRow)


def test_recorded_responses_without_a_preset(tmp_path: Path) -> None:
    row = {"problem": "Q", "gold": "4", "type": "Algebra", "level": 3, "tries": ["a", "b"], "model": "m"}
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    (item,) = [
        item
        for _, item in read_items(SourceConfig(name="s", path=str(tmp_path / "a.jsonl"), response="tries"))
        if isinstance(item, Item)
    ]
    assert [(one.teacher, one.response) for one in item.trajectories] == [("m", "a"), ("m", "b")]
    assert (item.domain, item.difficulty, item.labels["domain"]) == ("algebra", "high_school", "Algebra")
    with pytest.raises(UserError, match="the response column 'none'"):
        list(read_items(SourceConfig(name="s", path=str(tmp_path / "a.jsonl"), response="none")))


@pytest.mark.parametrize(("path", "hub"), [("no/such/file", False), ("a/b/c", True), ("./x", True)])
def test_what_does_not_exist_is_said(path: str, hub: bool) -> None:
    with pytest.raises(UserError, match="source s: "):
        read(path, hub=hub)


def test_a_hub_dataset_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_arguments: Any, **_settings: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="cannot be loaded: no route"):
        read("openai/gsm8k", hub=True, subset="main")


def test_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself needs a network; here its place is taken by an iterable dataset of the same library."""
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(path: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((path, subset, split, revision, streaming))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert read("openai/gsm8k", hub=True, subset="main", limit=3) == EXPECTED[:3]
    assert read("openai/gsm8k", hub=True, subset="main", revision="0" * 40) == EXPECTED
    assert asked == [
        ("openai/gsm8k", "main", "train", None, True),
        ("openai/gsm8k", "main", "train", "0" * 40, True),
    ]


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
@pytest.mark.parametrize("lengths", [[1, None, 40, 3], [5], [2, 2, 2, 2, 2, 2], [300, 1, None, None, 1]])
def test_parts_of_lines_are_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int | None], ending: str
) -> None:
    """Whatever the size of a part, all parts together are all rows, with the lines' own numbers."""
    path = tmp_path / "rows.jsonl"
    written = ["" if length is None else json.dumps({"q": "x" * length}) for length in lengths]
    path.write_text("\n".join(written) + ending, "utf-8")
    expected = [(f"line {number}", json.loads(line)) for number, line in enumerate(written, 1) if line]
    assert list(rawfiles.read_rows(path)) == expected
    cuts = set()
    for size in (1, 7, 30, 1 << 20):
        monkeypatch.setattr(rawfiles, "PART_BYTES", size)
        parts = list(rawfiles.parts_of(path))
        cuts.add(len(parts))
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert [row for part in parts for row in rawfiles.read_rows(path, part=part)] == expected
    assert len(cuts) > 1 or len(lengths) == 1


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        (
            "rows.jsonl",
            '{"a": 1}\n{"a": 1, "b": {"answer": "1", "answer": "2"}}\n',
            "line 2 has two values of 'answer'",
        ),
        ("rows.json", '[{"a": 1}, {"a": 1, "a": 2}]', "item 2 has two values of 'a'"),
        ("rows.json", '{\n"a": 1,\n"a": 2}', "the file has two values of 'a'"),
    ],
)
def test_two_values_of_one_name_are_refused(name: str, text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=place):
        list(rawfiles.read_rows(path))
    # The same value twice says one thing.
    path.write_text('{"a": 1, "a": 1}\n')
    assert [row for _, row in rawfiles.read_rows(path)] == [{"a": 1}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([pa.array(["1"]), pa.array(["2"])], names=["answer", "answer"]), path)
    with pytest.raises(UserError, match="its schema has two columns 'answer'"):
        list(rawfiles.read_rows(path))


def test_parts_of_parquet_are_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"q": [f"text {number}" for number in range(20)]}), path, row_group_size=6)
    whole = list(rawfiles.read_rows(path))
    assert [place for place, _ in whole] == [f"row {number}" for number in range(1, 21)]
    monkeypatch.setattr(rawfiles, "PART_BYTES", 1)
    parts = list(rawfiles.parts_of(path))
    assert [(part.start, part.before) for part in parts] == [(0, 0), (1, 6), (2, 12), (3, 18)]
    assert [row for part in parts for row in rawfiles.read_rows(path, part=part)] == whole


def test_what_can_be_read_from_its_beginning_only_is_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rawfiles, "PART_BYTES", 1)
    rows = [{"q": str(number)} for number in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for name in ("a.json", "b.jsonl.gz"):
        assert list(rawfiles.parts_of(tmp_path / name)) == [rawfiles.WHOLE]
        assert [row for _, row in rawfiles.read_rows(tmp_path / name)] == rows


def test_a_hub_dataset_is_read_by_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_arguments: Any, **_settings: Any) -> Any:
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=len(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    source = SourceConfig(name="s", path="openai/gsm8k", hub=True, preset="gsm8k")
    pieces = list(pieces_of(source))
    read_by_pieces = [list(piece_rows(source, piece)) for piece in pieces]
    assert read_by_pieces == [[(f"file {number + 1}, row 1", row)] for number, row in enumerate(ROWS)]
    assert [row for _, row in source_rows(source)] == ROWS
    assert len(list(pieces_of(dataclasses.replace(source, limit=2)))) == 1
