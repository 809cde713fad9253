"""Reading the user's own problems: every format and layout, every mistake named."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.data.sources.cells import split_final_line
from phimr_nemo.data.sources.damage import EATEN
from phimr_nemo.data.sources.problems import difficulty_of, load_problems, read_problems
from phimr_nemo.errors import UserError
from phimr_nemo.verify.extract import last_box

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "Caf\u00e9 \u221a4?", "answer": "2"}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "p.jsonl": lambda path, rows: path.write_bytes(jsonl(rows)),
    "p.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), "utf-8"),
    "lines.json": lambda path, rows: path.write_bytes(jsonl(rows)),
    "mark.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + jsonl(rows)),
    "gaps.jsonl": lambda path, rows: path.write_bytes(b"\n" + jsonl(rows).replace(b"\n", b"\r\n\n")),
    "p.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(jsonl(rows))),
    "p.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "p.jsonl.zst": lambda path, rows: path.write_bytes(zstd(jsonl(rows))),
    "p.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    table = read_problems(tmp_path / name, source="mine")
    assert [(row["question"], row["answer"]) for row in table.to_pylist()] == [
        (row["question"], row["answer"]) for row in ROWS
    ]
    WRITERS["p.jsonl"](tmp_path / "other.jsonl", ROWS)
    assert table.equals(read_problems(tmp_path / "other.jsonl", source="mine"))


def one(tmp_path: Path, row: dict[str, Any], **columns: Any) -> dict[str, Any]:
    path = tmp_path / "one.jsonl"
    path.write_bytes(jsonl([row]))
    (problem,) = read_problems(path, **columns).to_pylist()
    return dict(problem)


def test_gsm8k_layout(tmp_path: Path) -> None:
    problem = one(tmp_path, {"question": "Q", "answer": "2 * 540 = 1,080\nso it is.\n#### 1,080"})
    assert (problem["answer"], problem["solution"]) == ("1080", "2 * 540 = 1,080\nso it is.")


def test_math_layout(tmp_path: Path) -> None:
    solution = r"First $\boxed{1}$, no: $\boxed{\frac{1}{\{2\}}}$."
    row = {"problem": "P", "level": "Level 3", "type": "Geometry", "solution": solution, "idx": 7}
    problem = one(tmp_path, row)
    assert problem["answer"] == r"\frac{1}{\{2\}}"
    assert problem["solution"] == solution
    assert (problem["domain"], problem["difficulty"]) == ("Geometry", "high_school")
    assert json.loads(problem["metadata"]) == {"idx": 7, "level": "Level 3"}


def test_a_turn_in_parts_is_their_text_together(tmp_path: Path) -> None:
    said = [{"type": "text", "text": "What is "}, {"type": "text", "text": "$2+2$?"}]
    problem = one(tmp_path, {"prompt": [{"role": "user", "content": said}], "answer": "4"})
    assert (problem["question"], problem["answer"]) == ("What is $2+2$?", "4")
    picture = {"prompt": [{"role": "user", "content": [*said, {"type": "image_url"}]}], "answer": "4"}
    with pytest.raises(UserError, match="no question"):
        one(tmp_path, picture)


def test_columns_are_found_whatever_the_case_of_their_names(tmp_path: Path) -> None:
    problem = one(tmp_path, {"Question": "What is $2+2$?", "ANSWER": 4, "Level": "Level 5"})
    assert (problem["question"], problem["answer"], problem["difficulty"]) == ("What is $2+2$?", "4", "high_school")


def test_chat_prompt_and_nested_answer_layout(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": " U "}]
    problem = one(tmp_path, {"prompt": turns, "reward_model": {"ground_truth": "34", "style": "rule"}})
    assert (problem["question"], problem["answer"]) == ("U", "34")


@pytest.mark.parametrize(
    ("value", "text"),
    [(142.0, "142"), (0.5, "0.5"), (-3, "-3"), (" 7 ", "7"), (["2"], "2"), (["1", 2.0], "1, 2"), (0, "0")],
)
def test_answers_of_other_types(tmp_path: Path, value: Any, text: str) -> None:
    assert one(tmp_path, {"problem": "P", "answer": value})["answer"] == text


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"question": "no", "answer": "no", "q": "yes", "meta": {"a": "5"}, "how": "1+4"}
    problem = one(tmp_path, row, question="q", answer="meta.a", solution="how")
    assert (problem["question"], problem["answer"], problem["solution"]) == ("yes", "5", "1+4")
    boxed = one(tmp_path, {"question": "Q", "answer": "ignored", "how": r"\boxed{9}"}, solution="how")
    assert boxed["answer"] == "9"


@pytest.mark.parametrize(
    ("level", "tier"),
    [
        ("Level 1", "elementary"),
        (2, "middle"),
        (5.0, "high_school"),
        ("6.0", "college"),
        (9, "graduate"),
        ("High School", "high_school"),
        ("hard", None),
        (None, None),
    ],
)
def test_levels(level: object, tier: str | None) -> None:
    assert difficulty_of(level) == tier


def test_boxes_and_final_lines() -> None:
    assert last_box(r"\boxed{a}{b} \boxed{\text{c {d}}} e}") == r"\text{c {d}}"
    assert last_box(r"\boxed{never closed") is None
    assert last_box("none") is None
    assert [last_box(text) for text in (r"$\boxed 2$.", r"\fbox{3}", r"\boxed {5}", r"\fbox{}", r"\boxed{}")] == [
        *("2", "3", "5"),
        *(None, None),
    ]
    assert last_box(r"So \boxed{1} or \boxed{2}") == "1, 2"
    assert split_final_line("a = b\nA: 12") == ("a = b", "12")
    assert split_final_line("#### -1,234.5") == ("", "-1234.5")
    assert split_final_line("the interval (1,234)") is None


def test_duplicates_are_kept_once_and_limit_counts_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(jsonl([*ROWS, ROWS[0], {"question": "1+1?", "answer": "3"}]))
    table, counts = load_problems(path)
    assert table["answer"].to_pylist() == ["2", "2", "3"]
    assert counts == {"read": 4, "duplicate": 1, "incomplete": 0}
    assert read_problems(path, limit=1).num_rows == 1
    assert read_problems(path, limit=0).num_rows == 3


def test_a_few_incomplete_rows_are_counted_and_many_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(199)]
    path.write_bytes(jsonl([*rows, {"question": "x", "answer": None}]))
    table, counts = load_problems(path)
    assert (table.num_rows, counts["incomplete"]) == (199, 1)
    path.write_bytes(jsonl([*rows[:50], {"question": "x", "answer": " "}]))
    with pytest.raises(UserError, match=r"line 51 has no answer \(answer\)"):
        read_problems(path)
    path.write_bytes(jsonl([{"question": " ", "answer": "1"}]))
    with pytest.raises(UserError, match="line 1 has no question"):
        read_problems(path)
    path.write_bytes(jsonl([{"question": "Q", "solution": "no box"}]))
    with pytest.raises(UserError, match="boxed"):
        read_problems(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b"", "holds no rows"),
        ("p.json", b"[]", "holds no rows"),
        ("p.jsonl", b"\n \n", "holds no rows"),
        ("p.jsonl", jsonl(ROWS) + b'{"question": "1+', "line 3 is not JSON"),
        ("p.jsonl", jsonl(ROWS) + b"[1]\n", "line 3 is a JSON list, not an object"),
        ("p.json", b'[{"question": "Q", "answer": "1"}, 5]', "item 2 is a JSON int"),
        ("p.json", b'[{"question": ', "the file is not JSON"),
        ("p.jsonl", b'{"question": "\xff"}\n', "line 1 is not JSON"),
        ("p.jsonl", b"[" * 200_000 + b"\n", "line 1 is not JSON"),
        ("p.jsonl.gz", gzip.compress(jsonl(ROWS))[:-12], "is damaged"),
        ("p.jsonl.gz", b"plain text", "is damaged"),
        ("p.jsonl.zst", b"plain text", "is damaged"),
        ("p.parquet", b"PAR1 nothing PAR1", "is damaged"),
        ("p.csv", b"a,b\n", "cannot tell the format"),
        ("p.jsonl", jsonl([{"q": "1", "a": "2"}]), r"lacks a question column .* its columns are \['a', 'q'\]"),
        ("p.jsonl", jsonl([{"question": "1"}]), r"lacks an answer column .* \['question'\]"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_problems(tmp_path / name)


TEXTS = [{"question": f"Combien font {n} \u00d7 2 \u00e0 peu pr\u00e8s?", "answer": str(2 * n)} for n in range(3)]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("array", [False, True])
def test_another_encoding_is_named_and_its_remedy_works(tmp_path: Path, encoding: str, array: bool) -> None:
    path = tmp_path / ("p.json" if array else "p.jsonl")
    text = json.dumps(TEXTS, ensure_ascii=False) if array else jsonl(TEXTS).decode()
    path.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="codec") as refused:
        read_problems(path)
    follow(refused.value, "convert it: ", " (if it is in")
    assert read_problems(tmp_path / f"utf8-{path.name}")["question"].to_pylist() == [row["question"] for row in TEXTS]


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_name_are_named_and_the_remedy_works(tmp_path: Path, indent: int | None) -> None:
    """Of several lists the longest: a training set beside its test set."""
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"version": "1", "test": TEXTS[:1], "train": TEXTS}, indent=indent), "utf-8")
    with pytest.raises(UserError, match="in a list under 'train'") as refused:
        read_problems(path)
    follow(refused.value, "take them out: ", None)
    assert read_problems(tmp_path / "p-rows.jsonl")["answer"].to_pylist() == [row["answer"] for row in TEXTS]


def test_a_list_without_questions_is_no_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(jsonl([{"turns": [{"who": "me", "said": "1+1?"}]}]))
    with pytest.raises(UserError, match="lacks a question column"):
        read_problems(path)


def follow(error: UserError, before: str, after: str | None) -> None:
    """Run the command that a remedy prints."""
    command = str(error).partition(before)[2]
    command = command.partition(after)[0] if after else command
    command = command.replace("python -c", f"{shlex.quote(sys.executable)} -c", 1)
    subprocess.run(command.strip(), shell=True, check=True)


def test_absent_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a directory"):
        read_problems(tmp_path)
    (tmp_path / "p.jsonl").write_bytes(jsonl(ROWS))
    with pytest.raises(UserError, match=r"lacks the answer column 'meta\.gold'"):
        read_problems(tmp_path / "p.jsonl", answer="meta.gold")


@pytest.mark.parametrize(
    ("name", "count", "first_answer"),
    [
        ("gsm8k_train.jsonl", 7473, "72"),
        ("gsm8k_test.jsonl", 1319, "18"),
        ("math_train.json", 7470, "0"),
        ("math_test.jsonl", 5000, "2"),
        ("math500.jsonl", 500, r"\left( 3, \frac{\pi}{2} \right)"),
        ("aime24.jsonl", 30, "204"),
        ("aime25.json", 30, "70"),
        ("aime_1983_2023.json", 975, "60"),
        ("amc.json", 83, "142"),
        ("deepscaler_level_1.json.gz", None, "28"),
        ("deepscaler_level_5.json.gz", None, "36"),
    ],
)
def test_real_files_load_as_they_are(shared_data: Path, name: str, count: int | None, first_answer: str) -> None:
    table, counts = load_problems(shared_data / "problems" / name)
    assert table["answer"][0].as_py() == first_answer
    assert table.num_rows == counts["read"] - counts["duplicate"] - counts["incomplete"]
    assert counts["incomplete"] == (4 if name == "math_train.json" else 0)
    assert count is None or table.num_rows == count
    assert all(table["answer"].to_pylist())
    # Rows of the published files whose LaTeX has lost its backslashes.
    repaired = {
        "aime25.json": 3,
        "math_train.json": 1,
        "deepscaler_level_1.json.gz": 18,
        "deepscaler_level_5.json.gz": 3,
    }
    assert counts.get(EATEN, 0) == repaired.get(name, 0)


def test_gsm8k_answers_are_numbers(shared_data: Path) -> None:
    answers = read_problems(shared_data / "problems" / "gsm8k_train.jsonl")["answer"].to_pylist()
    assert all(float(answer) == float(answer) for answer in answers)


REMEDIED = {
    "problems": (
        *("generate", "--config", "conf/generate/tiny.yaml", "problems.kind=file", "problems.path={file}"),
        *("rollouts_per_problem=1",),
    ),
    "recorded": (
        *("generate", "--config", "conf/generate/tiny.yaml", "problems=null"),
        *("teacher.kind=recorded", "teacher.path={file}"),
    ),
    "prepare": ("prepare", "--config", "conf/prepare/tiny.yaml", "sources=[{{name: mine, path: {file}}}]"),
}


@pytest.mark.parametrize("command", REMEDIED)
def test_the_remedy_for_columns_works_as_printed(command: str, tmp_path: Path, repository: Path) -> None:
    """The printed words with COLUMN, NAME and FILE filled in, added to the command that was refused."""
    file = tmp_path / "odd.jsonl"
    file.write_bytes(jsonl([{"task": "What is 1+1?", "key": "2", "said": "\\boxed{2}", "worked": "1 more is 2"}]))
    words = [word.format(file=file) for word in REMEDIED[command]] + [f"run.output={tmp_path / 'out'}"]
    if command == "problems":  # the teacher reads its own file, whose columns have their usual names
        solved = tmp_path / "solved.jsonl"
        solved.write_bytes(jsonl([{"question": "What is 1+1?", "answer": "2", "response": "\\boxed{2}"}]))
        words += ["teacher.kind=recorded", f"teacher.path={solved}"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = [sys.executable, "-m", "phimr_nemo.cli"]
    refused = subprocess.run(
        [*run, *words], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2, refused.stderr
    remedy = refused.stderr.partition("name them: ")[2].partition(" (a dotted name")[0]
    for key, column in (("question", "task"), ("answer", "key"), ("response", "said")):
        remedy = remedy.replace(f"{key}=COLUMN", f"{key}={column}").replace(f"{key}: COLUMN", f"{key}: {column}")
    remedy = remedy.replace("NAME", "mine").replace("FILE", str(file))
    words = [word for word in words if not word.startswith("sources=")] + shlex.split(remedy)
    if command == "problems":
        words = [word for word in words if not word.startswith("teacher.path=")]
        words += [f"teacher.path={solved}"]
    done = subprocess.run(
        [*run, *words], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
