"""Record directories: nothing lost, nothing half-written, damage is named, ids depend on content alone."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import start

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_directory, atomic_file, atomic_write_bytes, atomic_write_text
from phimr_nemo.store.content import content_id, content_seed, file_sha256
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.records import schemas
from phimr_nemo.store.shards import (
    MANIFEST,
    conform,
    finish,
    is_complete,
    iter_shards,
    read_manifest,
    read_table,
    rows_to_table,
    shard_is_complete,
    write_shard,
)

WAIT_SECONDS = 60.0


def conversation(number: int, response: str | None = None) -> dict[str, Any]:
    return dict.fromkeys(schemas()["conversations"].names) | {
        "id": content_id("conversation", str(number)),
        "problem_id": content_id("problem", str(number)),
        "question": f"{number} + 1?",
        "response": response if response is not None else f"\\boxed{{{number + 1}}}",
        "domain": "algebra",
        "difficulty": None,
    }


def make_directory(path: Path, shards: int = 3, rows: int = 4) -> list[dict[str, Any]]:
    everything = []
    for index in range(shards):
        part = [conversation(index * rows + row) for row in range(rows)]
        write_shard(path, index, rows_to_table(part, "conversations"), kind="conversations")
        everything += part
    finish(path, kind="conversations", config={"seed": 1}, counts={"kept": shards * rows, "too long": 2})
    return everything


def visible(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir() if not item.name.startswith("."))


# --- round trip --------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = make_directory(tmp_path / "out")
    assert read_table(tmp_path / "out", "conversations").to_pylist() == rows
    assert [table.num_rows for table in iter_shards(tmp_path / "out", "conversations")] == [4, 4, 4]
    ids = read_table(tmp_path / "out", "conversations", columns=["id"])
    assert ids.column_names == ["id"]
    assert ids.column("id").to_pylist() == [row["id"] for row in rows]


@settings(deadline=None)
@given(
    responses=st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=5
    )
)
def test_any_text_survives(responses: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("any") / "out"
    rows = [conversation(i, response) for i, response in enumerate(responses)]
    write_shard(directory, 0, rows_to_table(rows, "conversations"), kind="conversations")
    finish(directory, kind="conversations", config={})
    assert read_table(directory, "conversations").to_pylist() == rows


def test_manifest_tells_what_made_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = rows_to_table([conversation(0)], "conversations")
    write_shard(out, 0, table, kind="conversations")
    inputs = {"rollouts": "0123456789abcdef"}
    written = finish(out, kind="conversations", config={"a": [1, {"b": None}]}, inputs=inputs, counts={"wrong": 7})
    manifest = read_manifest(out, "conversations")
    assert manifest == written
    assert manifest.rows == 1
    assert manifest.shards == {"part-00000.parquet": file_sha256(out / "part-00000.parquet")}
    assert manifest.config == {"a": [1, {"b": None}]}
    assert manifest.counts == {"wrong": 7}
    assert manifest.inputs == inputs
    assert manifest.made_from == MadeFrom(inputs, {"a": [1, {"b": None}]})
    assert "python" in manifest.versions


def test_shards_beyond_the_padding_keep_their_order(tmp_path: Path) -> None:
    for index in (99_999, 100_000, 2):
        write_shard(tmp_path, index, rows_to_table([conversation(index)], "conversations"), kind="conversations")
    finish(tmp_path, kind="conversations", config={})
    questions = read_table(tmp_path, "conversations").column("question").to_pylist()
    assert questions == [f"{index} + 1?" for index in (2, 99_999, 100_000)]


# --- ids ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(parts=st.lists(st.text(max_size=8), max_size=4), other=st.lists(st.text(max_size=8), max_size=4))
def test_ids_depend_on_content_and_on_where_parts_end(parts: list[str], other: list[str]) -> None:
    assert (content_id(*parts) == content_id(*other)) == (parts == other)
    assert 0 <= content_seed(*parts) < 2**63
    assert len(content_id(*parts)) == 16


def test_ids_are_the_same_in_another_process() -> None:
    program = "from phimr_nemo.store.shards import content_id; print(content_id('a', 'b'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == content_id("a", "b")


def test_a_lone_surrogate_has_an_id() -> None:
    assert content_id("\ud800") != content_id("\ud801")


# --- bad input ---------------------------------------------------------------------------------------------


def test_missing_columns_are_named(tmp_path: Path) -> None:
    table = rows_to_table([conversation(0)], "conversations").drop_columns(["question", "domain"])
    with pytest.raises(UserError, match=r"'question', 'domain'"):
        write_shard(tmp_path / "out", 0, table, kind="conversations")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_nulls_are_counted_and_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [conversation(i) for i in range(3)]
    rows[0]["question"] = rows[2]["question"] = None
    with pytest.raises(UserError, match=r"'question' holds 2 nulls"):
        write_shard(tmp_path, 0, rows_to_table(rows, "conversations"), kind="conversations")
    rows = [{**conversation(0), "domain": None}]
    assert conform(rows_to_table(rows, "conversations"), "conversations").to_pylist() == rows


def test_wrong_types_are_named() -> None:
    good = rows_to_table([conversation(0)], "conversations")
    bad = good.set_column(good.column_names.index("question"), "question", pa.array([["a", "list"]]))
    with pytest.raises(UserError, match="'question'"):
        conform(bad, "conversations")


def test_extra_columns_are_dropped_and_order_does_not_matter() -> None:
    good = rows_to_table([conversation(0)], "conversations")
    shuffled = good.select(list(reversed(good.column_names))).append_column("more", pa.array([1]))
    assert conform(shuffled, "conversations").equals(good)


def test_only_finished_directories_of_the_kind_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "nothing", "conversations")
    write_shard(tmp_path / "out", 0, rows_to_table([conversation(0)], "conversations"), kind="conversations")
    assert not is_complete(tmp_path / "out", "conversations")
    with pytest.raises(UserError, match="not finished"):
        read_table(tmp_path / "out", "conversations")
    finish(tmp_path / "out", kind="conversations", config={})
    assert is_complete(tmp_path / "out", "conversations")
    assert not is_complete(tmp_path / "out", "pairs")
    with pytest.raises(UserError, match="holds 'conversations' records"):
        read_table(tmp_path / "out", "pairs")


def test_an_older_schema_is_refused(tmp_path: Path) -> None:
    make_directory(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text("utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 0}), "utf-8")
    with pytest.raises(UserError, match=r"(?s)schema version 0.*this version reads .* 1.*remedy: run the step"):
        read_table(tmp_path, "conversations")


def test_shards_of_an_older_schema_are_made_again(tmp_path: Path) -> None:
    make_directory(tmp_path)
    sidecar = tmp_path / "part-00001.json"
    facts = json.loads(sidecar.read_text("utf-8"))
    sidecar.write_text(json.dumps({**facts, "schema_version": 0}), "utf-8")
    assert [shard_is_complete(tmp_path, index) for index in range(3)] == [True, False, True]


def test_finish_needs_shards_of_one_kind_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shard"):
        finish(tmp_path, kind="conversations", config={})
    write_shard(tmp_path, 0, rows_to_table([conversation(0)], "conversations"), kind="conversations")
    with pytest.raises(UserError, match="conversations"):
        finish(tmp_path, kind="pairs", config={})
    (tmp_path / "part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000.parquet"):
        finish(tmp_path, kind="conversations", config={})
    assert not (tmp_path / MANIFEST).exists()


# --- damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    make_directory(tmp_path / "out")
    return tmp_path / "out"


def test_every_flipped_bit_of_a_shard_is_noticed(finished: Path) -> None:
    path = finished / "part-00001.parquet"
    good = path.read_bytes()
    for position in random.Random(0).sample(range(len(good) * 8), 40):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bad)
        assert not shard_is_complete(finished, 1)
        with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
            read_table(finished, "conversations")
    path.write_bytes(good)
    assert shard_is_complete(finished, 1)
    assert read_table(finished, "conversations").num_rows == 12


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_shard_is_noticed(keep: float, finished: Path) -> None:
    path = finished / "part-00002.parquet"
    with path.open("rb+") as handle:
        handle.truncate(int(path.stat().st_size * keep))
    with pytest.raises(UserError, match=r"part-00002\.parquet is damaged"):
        read_table(finished, "conversations")


def test_a_missing_shard_is_noticed(finished: Path) -> None:
    (finished / "part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet is missing"):
        read_table(finished, "conversations")


def test_the_remedy_for_a_damaged_shard_works(finished: Path) -> None:
    expected = read_table(finished, "conversations")
    (finished / "part-00001.parquet").write_bytes(b"PAR1")
    (finished / MANIFEST).unlink()
    (finished / "part-00001.json").unlink()
    assert [shard_is_complete(finished, i) for i in range(3)] == [True, False, True]
    part = [conversation(number) for number in range(4, 8)]
    write_shard(finished, 1, rows_to_table(part, "conversations"), kind="conversations")
    finish(finished, kind="conversations", config={})
    assert read_table(finished, "conversations").equals(expected)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "conversations"}', "\x00\x00", '{"sha256": 3}'])
def test_a_damaged_sidecar_makes_its_shard_incomplete(text: str, finished: Path) -> None:
    (finished / "part-00001.json").write_text(text, "utf-8")
    assert not shard_is_complete(finished, 1)
    with pytest.raises(UserError, match=r"part-00001\.json"):
        finish(finished, kind="conversations", config={})


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"kind": "conversations"}', b"3"])
def test_a_damaged_manifest_is_named(damage: bytes, finished: Path) -> None:
    (finished / MANIFEST).write_bytes(damage)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_table(finished, "conversations")
    assert not is_complete(finished, "conversations")


def test_a_manifest_cannot_name_files_elsewhere(finished: Path, tmp_path: Path) -> None:
    pq.write_table(rows_to_table([conversation(0)], "conversations"), tmp_path / "other.parquet")
    manifest = json.loads((finished / MANIFEST).read_text("utf-8"))
    for shards in ({"../other.parquet": file_sha256(tmp_path / "other.parquet")}, ["../other.parquet"], 3):
        manifest["shards"] = shards
        (finished / MANIFEST).write_text(json.dumps(manifest), "utf-8")
        with pytest.raises(UserError, match="names other files than shards"):
            read_table(finished, "conversations")


# --- atomic files and directories --------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError):
        half_a_file(tmp_path / "file")
    assert (tmp_path / "file").read_text("utf-8") == "old"
    assert os.listdir(tmp_path) == ["file"]
    atomic_write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def half_a_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half", "utf-8")
        raise ZeroDivisionError


def half_a_directory(path: Path) -> None:
    with atomic_directory(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("half", "utf-8")
        raise ZeroDivisionError


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        half_a_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == []
    with atomic_directory(tmp_path / "deep" / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("whole", "utf-8")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "sub" / "file").read_text("utf-8") == "whole"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_finished_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as temporary:
        (temporary / "file").write_text("1", "utf-8")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "empty"):
        pytest.fail("the body must not run")
    (tmp_path / "file").write_text("1", "utf-8")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "file"):
        pytest.fail("the body must not run")


def test_a_file_where_a_directory_must_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1", "utf-8")
    table = rows_to_table([conversation(0)], "conversations")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            write_shard(place, 0, table, kind="conversations")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match="directory"):
        atomic_write_text(tmp_path / "directory", "text")


def test_an_unreadable_input_is_not_taken_for_the_output(tmp_path: Path) -> None:
    def read() -> bytes:
        raise PermissionError(13, "Permission denied", "elsewhere/input")

    with pytest.raises(PermissionError, match="elsewhere/input"):
        atomic_write_bytes_from(tmp_path / "out", read)


def atomic_write_bytes_from(path: Path, read: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(read())


# --- a full disk -------------------------------------------------------------------------------------------

FILL = """
import os, random, sys
from pathlib import Path
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_directory
from phimr_nemo.store.shards import rows_to_table, shard_is_complete, write_shard
random.seed(0)
out = Path(sys.argv[1])
def rows(count):
    text = lambda: "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4000))
    return rows_to_table([{"id": str(i), "problem_id": "p", "question": "q", "response": text()}
                          for i in range(count)], "conversations")
write_shard(out, 0, rows(2), kind="conversations")
for attempt in (lambda: write_shard(out, 1, rows(2000), kind="conversations"),
                lambda: fill(out.parent / "model")):
    def fill(path):
        with atomic_directory(path) as temporary:
            (temporary / "weights").write_bytes(os.urandom(4 << 20))
    try:
        attempt()
    except UserError as error:
        print("REFUSED", str(error).splitlines()[0])
print(shard_is_complete(out, 0), shard_is_complete(out, 1), sorted(os.listdir(out)), os.listdir(out.parent))
"""
AFTER_FULL_DISK = "True False ['part-00000.json', 'part-00000.parquet'] ['out']"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(small_disk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(small_disk / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *refused, state = done.stdout.splitlines()
    assert [line.split(" while ")[0] for line in refused] == ["REFUSED no space left"] * 2
    assert state == AFTER_FULL_DISK


def test_a_file_size_limit_is_one_clear_error_too(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    *refused, state = done.stdout.splitlines()
    assert [line.split(" while ")[0] for line in refused] == ["REFUSED no space left"] * 2
    assert state == AFTER_FULL_DISK


# --- sudden death ------------------------------------------------------------------------------------------

SHARDS = 6
STEP = f"""
import os, sys
from pathlib import Path
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import finish, is_complete, rows_to_table, shard_is_complete, write_shard
out, fatal = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os._exit(9)  # no clean-up, as after a kill
        return function(*args, **kwargs)
    return call
for name in ("open", "fsync", "replace", "rename", "chmod"):
    setattr(os, name, dying(getattr(os, name)))
redone = 0
if not is_complete(out, "conversations"):
    for index in range({SHARDS}):
        if not shard_is_complete(out, index):
            redone += 1
            rows = [dict(id=content_id(str(index), str(row)), problem_id="p", question=f"{{index}}",
                         response="r" * row) for row in range(50)]
            write_shard(out, index, rows_to_table(rows, "conversations"), kind="conversations")
    finish(out, kind="conversations", config={{}})
print(redone, calls)
"""


def run_step(out: Path, fatal: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STEP, str(out), str(fatal)], capture_output=True, text=True, check=False
    )


def assert_sound(out: Path) -> int:
    """Nothing visible is half-written; returns how many shards are complete."""
    for name in visible(out) if out.is_dir() else []:
        if name.endswith(".parquet"):
            assert pq.read_table(out / name).num_rows == 50
        else:
            json.loads((out / name).read_text("utf-8"))
    complete = sum(shard_is_complete(out, index) for index in range(SHARDS))
    if is_complete(out, "conversations"):
        assert read_table(out, "conversations").num_rows == 50 * SHARDS
    return complete


def test_dying_at_any_system_call_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    clean = run_step(tmp_path / "clean", 0)
    calls = int(clean.stdout.split()[1])
    expected = read_table(tmp_path / "clean", "conversations")
    # Every call of the first shard and of the manifest, a sample between.
    per_shard = calls // (SHARDS + 1)
    points = {*range(1, per_shard + 1), *range(calls - 5, calls + 1)}
    for fatal in sorted(points):
        out = tmp_path / f"died-{fatal}"
        assert run_step(out, fatal).returncode == 9
        complete = assert_sound(out)
        again = run_step(out, 0)
        assert again.returncode == 0, again.stderr
        redone = int(again.stdout.split()[0])
        assert redone in (SHARDS - complete, 0)
        assert read_table(out, "conversations").equals(expected)


def test_killed_again_and_again_it_still_ends_with_the_same_rows(tmp_path: Path) -> None:
    assert run_step(tmp_path / "clean", 0).returncode == 0
    out = tmp_path / "out"
    for wanted in range(1, SHARDS):
        # SIGKILL from outside, each time after one more shard has appeared.
        step = start([sys.executable, "-c", STEP, str(out), "0"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT_SECONDS
        while step.poll() is None and len(list(out.glob("part-*.json"))) < wanted:
            assert time.monotonic() < deadline
        step.kill()
        step.wait()
        assert assert_sound(out) >= wanted
    assert run_step(out, 0).returncode == 0
    assert read_table(out, "conversations").equals(read_table(tmp_path / "clean", "conversations"))


def test_a_finished_step_is_a_no_op(tmp_path: Path) -> None:
    run_step(tmp_path / "out", 0)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").iterdir()}
    assert run_step(tmp_path / "out", 0).stdout.split()[0] == "0"
    after = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").iterdir()}
    assert after == before
