"""Small files that stand for gigabytes are refused in a small process, and ordinary ones are read as they are."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.data.sources.rawfiles import CHUNK_BYTES, read_rows
from phimr_nemo.errors import UserError
from phimr_nemo.store import unpacking
from phimr_nemo.store.unpacking import MAX_ROW_BYTES, Allowance, parquet_batches
from phimr_nemo.verify.stage import verify_file

LIMIT_BYTES = 8 << 30
SMALL_PROCESS_BYTES = 2 << 30
LONG = "a" * (MAX_ROW_BYTES - 100)


def repeated(values: list[str], indices: list[int]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd", **options)


def many_long_rows(path: Path) -> None:
    parquet(path, {"question": repeated([LONG], [0] * 5000), "answer": ["1"] * 5000})


def one_long_row(path: Path) -> None:
    parquet(path, {"question": repeated([LONG * 2], [0]), "answer": ["1"]})


def a_row_of_many_texts(path: Path) -> None:
    texts = pa.ListArray.from_arrays(pa.array([0, 5000], pa.int32()), repeated([LONG], [0] * 5000))
    parquet(path, {"question": ["q"], "answer": ["1"], "texts": texts})


def a_row_of_many_numbers(path: Path) -> None:
    parquet(
        path,
        {
            "question": ["q"],
            "answer": ["1"],
            "numbers": pa.ListArray.from_arrays(
                pa.array([0, 20_000_000], pa.int32()), pa.array(np.full(20_000_000, 7))
            ),
        },
    )


def plain_pages(path: Path) -> None:
    texts = [f"{number}{LONG}" for number in range(17)]
    columns = {"question": texts, "answer": ["1"] * len(texts)}
    parquet(path, columns, use_dictionary=False)


def many_lines(path: Path) -> None:
    block = b'{"question":"q","answer":"1"}\n' * 100_000
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        for _ in range(100):
            file.write(block)


def a_long_array(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(b"[")
        file.write(b'{"question":[' + b"[]," * 340_000 + b'[]],"answer":"1"},')
        file.write(b'{"question":[' + b"[]," * MAX_ROW_BYTES + b"[]]}]")


BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "many long rows": ("x.parquet", many_long_rows),
    "one long row": ("x.parquet", one_long_row),
    "a row of many texts": ("x.parquet", a_row_of_many_texts),
    "a row of many numbers": ("x.parquet", a_row_of_many_numbers),
    "plain pages": ("x.parquet", plain_pages),
    "many lines": ("x.jsonl.zst", many_lines),
    "a long array": ("x.json.gz", a_long_array),
}
READ = """
import resource, sys
from pathlib import Path
from phimr_nemo.data.sources.rawfiles import read_rows
from phimr_nemo.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
try:
    rows = sum(1 for _ in read_rows(Path(sys.argv[1])))
except UserError as error:
    sys.stdout.write("refused: " + error.problem)
else:
    sys.stdout.write(f"{rows} rows")
# Not getrusage: it begins with what the process that started this one held.
(peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
sys.stdout.write("\\n" + str(int(peak) << 10))
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_unpacks_to_much_is_refused_in_little_memory(kind: str, tmp_path: Path) -> None:
    name, write = BOMBS[kind]
    write(tmp_path / name)
    command = [sys.executable, "-c", READ, str(tmp_path / name), str(LIMIT_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    said, peak = done.stdout.rsplit("\n", 1)
    assert said.startswith(f"refused: {tmp_path / name}"), said
    assert "unpacks to more than" in said or "longer than" in said
    assert int(peak) < SMALL_PROCESS_BYTES


def test_verify_refuses_it_too(tmp_path: Path) -> None:
    for kind in ("one long row", "a row of many texts"):
        many = tmp_path / "many.parquet"
        BOMBS[kind][1](many)
        with pytest.raises(UserError, match="unpacks to more than"):
            verify_file(many, tmp_path / "out.parquet", response="question", answer="answer", workers=1)
        assert not (tmp_path / "out.parquet").exists()


def test_ordinary_rows_arrive_unchanged(tmp_path: Path) -> None:
    rows = [
        {
            "text": f"question {number % 7} " * 30,
            "messages": [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": None}],
            "scores": [0.5, number / 3],
            "tags": [("key", f"{number % 3}")],
            "count": number,
            "none": None,
        }
        for number in range(3000)
    ]
    schema = pa.schema(
        [
            ("text", pa.string()),
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("scores", pa.list_(pa.float64())),
            ("tags", pa.map_(pa.string(), pa.string())),
            ("count", pa.int64()),
            ("none", pa.null()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "x.parquet", row_group_size=700)
    assert [row for _, row in read_rows(tmp_path / "x.parquet")] == rows
    assert {batch.schema for batch in parquet_batches(tmp_path / "x.parquet")} == {
        pq.read_schema(tmp_path / "x.parquet")
    }


def test_long_rows_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "BATCH_BYTES", 3000)
    parquet(tmp_path / "x.parquet", {"a": repeated(["x" * 1000, "y"], [0, 0, 0, 0, 0, 1, 1, 1, 1])})
    batches = [batch.to_pylist() for batch in parquet_batches(tmp_path / "x.parquet")]
    assert [row["a"][0] for batch in batches for row in batch] == list("xxxxxyyyy")
    assert max(sum(len(row["a"]) for row in batch) for batch in batches) <= 3000
    monkeypatch.setattr(unpacking, "MAX_ROW_BYTES", 900)
    monkeypatch.setattr(unpacking, "BATCH_BYTES", 900)
    with pytest.raises(UserError, match="row 1 unpacks"):
        list(parquet_batches(tmp_path / "x.parquet"))


def test_an_allowance_grows_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "FREE_BYTES", 1000)
    for size, allowed in ((0, 1000), (1, 1000), (2, 2000)):
        (tmp_path / "x").write_bytes(b"x" * size)
        allowance = Allowance(tmp_path / "x")
        allowance.spend(allowed - 1)
        allowance.spend(1)
        with pytest.raises(UserError, match=f"more than {allowed:,} bytes"):
            allowance.spend(1)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_an_array_is_read_item_by_item(count: int, indent: int | None, tmp_path: Path) -> None:
    long = 'é√\U0001f600\\"]}' * (CHUNK_BYTES // 16)
    rows = [{"a": number, "b": [1.5e300, {"c": "],"}], "d": long if number == 1 else ""} for number in range(count)]
    for text in (json.dumps(rows, indent=indent), json.dumps(rows, indent=indent, ensure_ascii=False) + "\n"):
        (tmp_path / "x.json").write_text("\ufeff" + text, "utf-8")
        found = list(read_rows(tmp_path / "x.json"))
        assert [row for _, row in found] == rows
        assert [place for place, _ in found] == [f"item {number + 1}" for number in range(count)]


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}', '[{"a": 1},', '[{"a": 1} {"a": 2}]', '[{"a": 1}] x', '[{"a": 1},]', "[", '[{"a": 1]', "[[[["],
)
def test_a_broken_array_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        list(read_rows(tmp_path / "x.json"))


def test_the_limit_of_the_tests_is_one(tmp_path: Path) -> None:
    """The twin: a process of that size does die of what it is not protected from."""
    many_long_rows(tmp_path / "x.parquet")
    limit = (3 << 30, 3 << 30)
    code = "import pyarrow.parquet as pq, sys; pq.read_table(sys.argv[1]).to_pylist()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.parquet")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0
