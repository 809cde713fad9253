"""What a thing was made from: by content, wherever it lies, and in one form in every file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.errors import UserError
from phimr_nemo.store import provenance
from phimr_nemo.store.check import open_for
from phimr_nemo.store.content import file_sha256
from phimr_nemo.store.provenance import (
    ABSENT,
    BEGUN_FILE,
    FileHashes,
    MadeFrom,
    begin,
    begun_from,
    content_of,
    read_made_from,
    tokenizer_content,
)
from phimr_nemo.store.shards import MANIFEST, finish, read_manifest, rows_to_table, shard_is_complete, write_shard

ONE = MadeFrom({"rollouts": "aaaa"}, {"seed": 1, "sizes": (1, 2)})


def conversation(number: int) -> dict[str, Any]:
    known = {"id": f"c{number}", "problem_id": f"p{number}", "question": f"{number} + 1?"}
    return {**known, "response": f"{number + 1}", "domain": None, "difficulty": None}


def records(path: Path, *numbers: int) -> Path:
    for index, number in enumerate(numbers):
        write_shard(path, index, rows_to_table([conversation(number)], "conversations"), kind="conversations")
    finish(path, kind="conversations", config={"at": str(path)})
    return path


def model(path: Path, weights: bytes = b"weights") -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    (path / "tokenizer.json").write_text('{"vocabulary": []}')
    (path / "README.md").write_text("a card")
    return path


def finished_run(path: Path) -> Path:
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"made_from": ONE.to_json(), "starts": ["now"]}))
    (path / "DONE").write_text('{"steps": 3}')
    return path


def plain(path: Path) -> Path:
    (path / "below").mkdir(parents=True)
    (path / "below" / "a.jsonl").write_text("{}\n")
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "records": lambda path: records(path, 1, 2),
    "model": model,
    "run": finished_run,
    "directory": plain,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_content_is_the_same_wherever_it_lies(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MAKERS[kind](tmp_path / "here")
    content = content_of(path)
    assert content != ABSENT
    shutil.copytree(path, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert content_of(tmp_path / "copy") == content_of(Path("here")) == content
    path.rename(tmp_path / "moved")
    assert content_of(tmp_path / "moved") == content
    assert content_of(path) == ABSENT


def test_records_made_again_alike_are_the_same_and_other_rows_are_not(tmp_path: Path) -> None:
    one, again, other = (records(tmp_path / name, 1, second) for name, second in (("a", 2), ("b", 2), ("c", 3)))
    # Their manifests name other directories.
    assert file_sha256(one / MANIFEST) != file_sha256(again / MANIFEST)
    assert content_of(one) == content_of(again) == read_manifest(one, "conversations").content
    assert content_of(one) != content_of(other)
    assert content_of(records(tmp_path / "fewer", 1)) != content_of(one)


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("weights", lambda path: (path / "model.safetensors").write_bytes(b"weightS")),
    ("config", lambda path: (path / "config.json").write_text('{"a": 1}')),
    ("tokenizer", lambda path: (path / "tokenizer.json").write_text("{}")),
    ("template", lambda path: (path / "chat_template.jinja").write_text("{{ x }}")),
    ("another shard", lambda path: (path / "model-2.safetensors").write_bytes(b"")),
]


@pytest.mark.parametrize(("what", "change"), CHANGES, ids=[what for what, _ in CHANGES])
def test_a_model_is_what_decides_its_answers(what: str, change: Callable[[Path], object], tmp_path: Path) -> None:
    path = model(tmp_path / "hf")
    content, tokenizer = content_of(path), tokenizer_content(path)
    (path / "README.md").write_text("another card")
    assert content_of(path) == content
    change(path)
    assert content_of(path) != content
    assert (tokenizer_content(path) != tokenizer) == (what in ("tokenizer", "template"))


@pytest.mark.parametrize("name", ["model.safetensors", "rows.jsonl"])
def test_equal_size_and_time_hide_no_change(name: str, tmp_path: Path) -> None:
    """A file written over in its place, or put in its place, with the old size and modification time."""
    kept, path = tmp_path / "hashes.json", tmp_path / name
    path.write_bytes(b"before")
    then = (1_000_000_000, 1_000_000_000)
    os.utime(path, then)
    before = FileHashes(kept)
    assert before.sha256(path) == file_sha256(path)
    before.keep()
    path.write_bytes(b"after!")
    os.utime(path, then)
    assert FileHashes(kept).sha256(path) == file_sha256(path)
    other = tmp_path / "other"
    other.write_bytes(b"other!")
    os.utime(other, then)
    other.replace(path)
    assert FileHashes(kept).sha256(path) == file_sha256(path)


def settled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the file had been written long ago."""
    now = path.stat().st_ctime_ns + 2 * provenance.SETTLED_NS
    monkeypatch.setattr(provenance.time, "time_ns", lambda: now)


def test_an_unchanged_file_is_not_read_again_but_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(provenance, "file_sha256", counted)
    for name in ("rows.jsonl", "model.safetensors"):
        (tmp_path / name).write_bytes(b"content")
    settled(tmp_path / "model.safetensors", monkeypatch)
    for _ in range(2):
        hashes = FileHashes(tmp_path / "hashes.json")
        for name in ("rows.jsonl", "model.safetensors"):
            assert hashes.sha256(tmp_path / name) == file_sha256(tmp_path / name)
        hashes.keep()
    assert read == ["rows.jsonl", "model.safetensors", "model.safetensors"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": {"b": 1}}'])
def test_damaged_hashes_are_forgotten(text: str, tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_text(text)
    (tmp_path / "file").write_text("x")
    assert FileHashes(tmp_path / "hashes.json").sha256(tmp_path / "file") == file_sha256(tmp_path / "file")


def test_changes_are_named_with_both_values() -> None:
    now = MadeFrom({"rollouts": "bbbb", "tokenizer": "cccc"}, {"seed": 2, "sizes": [1, 2], "new": None})
    assert ONE.changes(now) == [
        "seed: 1 there, 2 now",
        "rollouts: content aaaa there, bbbb now",
        "tokenizer: content none there, cccc now",
    ]
    assert ONE.changes(ONE) == []
    # What is gone cannot be compared.
    assert ONE.changed_inputs(MadeFrom({"rollouts": ABSENT}, {})) == []


def test_it_is_read_back_from_any_file_that_holds_it() -> None:
    assert read_made_from(json.loads(json.dumps(ONE.to_json()))) == ONE
    others: list[object] = [None, [], {}, {"inputs": 1, "config": {}}]
    assert [read_made_from(values) for values in others] == [None] * 4


def test_a_directory_is_begun_from_one_thing(tmp_path: Path) -> None:
    begin(tmp_path, ONE)
    begin(tmp_path, ONE)
    assert begun_from(tmp_path) == ONE
    with pytest.raises(UserError, match="seed: 1 there, 3 now"):
        begin(tmp_path, MadeFrom(ONE.inputs, {**ONE.config, "seed": 3}))
    (tmp_path / BEGUN_FILE).write_text("{")
    assert begun_from(tmp_path) is None


def test_a_shard_is_kept_for_what_it_was_made_from_alone(tmp_path: Path) -> None:
    table = rows_to_table([conversation(1)], "conversations")
    write_shard(tmp_path, 0, table, kind="conversations", made_from=ONE)
    write_shard(tmp_path, 1, table, kind="conversations")
    other = MadeFrom({"rollouts": "bbbb"}, ONE.config)
    assert [shard_is_complete(tmp_path, index, ONE) for index in (0, 1)] == [True, False]
    assert not shard_is_complete(tmp_path, 0, other)
    assert shard_is_complete(tmp_path, 0)
    assert shard_is_complete(tmp_path, 1)


def test_a_directory_that_is_made_from_something_else_is_unfinished(tmp_path: Path) -> None:
    for index in range(3):
        table = rows_to_table([conversation(index)], "conversations")
        write_shard(tmp_path, index, table, kind="conversations", made_from=ONE)
    finish(tmp_path, kind="conversations", **ONE.to_json())
    open_for(tmp_path, ONE, 3)
    assert (tmp_path / MANIFEST).is_file()
    open_for(tmp_path, MadeFrom({"rollouts": "bbbb"}, ONE.config), 2)
    assert not (tmp_path / MANIFEST).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"part-{index:05d}{suffix}" for index in (0, 1) for suffix in (".json", ".parquet")
    ]


def test_what_has_not_finished_has_no_content_and_other_peoples_parts_have(tmp_path: Path) -> None:
    path = records(tmp_path / "records", 1, 2)
    (path / MANIFEST).unlink()
    assert content_of(path) == ABSENT
    run = finished_run(tmp_path / "run")
    assert content_of(run) != ABSENT
    (run / "DONE").unlink()
    assert content_of(run) == ABSENT
    source = plain(tmp_path / "source")
    (source / "part-00000.json").write_text("[1]")
    before = content_of(source)
    (source / "part-00000.json").write_text("[2]")
    assert before not in (ABSENT, content_of(source))


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["results.json"],
        ["run.json"],
        ["DONE"],
        ["run.json", "DONE"],
        ["manifest.json"],
        ["part-00000.json", "part-00000.parquet"],
    ],
    ids=" and ".join,
)
def test_rows_beside_files_of_familiar_names_are_compared(names: list[str], tmp_path: Path) -> None:
    """A directory of somebody's rows is no model, evaluation or run because a file in it is called like one's."""
    source = plain(tmp_path / "source")
    for name in names:
        (source / name).write_text('{"kind": "of theirs", "pass1": 1}')
    before = content_of(source)
    (source / "below" / "a.jsonl").write_text("{ }\n")
    assert before not in (ABSENT, content_of(source))
