"""A checkpoint is used only when it is whole: every kind of damage is found and named, the one before is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from phimr_nemo.errors import UserError
from phimr_nemo.training.seal import (
    SEAL_FILE,
    checkpoint_name,
    checkpoints,
    damaged_files,
    file_facts,
    is_sealed,
    refuse_all_damaged,
    remove_checkpoint,
    usable_checkpoints,
    write_seal,
)

FILES = {"weights/__0_0.distcp": b"a" * 1000, "weights/__1_0.distcp": b"b" * 500, "weights/.metadata": b"index"}


def make(directory: Path, step: int, *, sealed: bool = True) -> Path:
    path = directory / checkpoint_name(step)
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    if sealed:
        write_seal(path, {"weights/__0_0.distcp": file_facts(path / "weights/__0_0.distcp")})
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "weights/__0_0.distcp").read_bytes())
    content[123] ^= 1
    (path / "weights/__0_0.distcp").write_bytes(content)


def cut(path: Path) -> None:
    (path / "weights/__1_0.distcp").write_bytes(FILES["weights/__1_0.distcp"][:-1])


def lose_the_metadata(path: Path) -> None:
    (path / "weights/.metadata").unlink()


def lose_the_seal(path: Path) -> None:
    (path / SEAL_FILE).unlink()


def cut_the_seal(path: Path) -> None:
    (path / SEAL_FILE).write_text((path / SEAL_FILE).read_text()[:-20])


def test_a_whole_checkpoint_is_used(tmp_path: Path) -> None:
    paths = [make(tmp_path, step) for step in (2, 10, 9)]
    usable, notes = usable_checkpoints(tmp_path)
    # By number, not by name: "step=10" sorts before "step=2".
    assert usable == [paths[1], paths[2], paths[0]]
    assert notes == []
    assert damaged_files(paths[1]) == []


@pytest.mark.parametrize("damage", [cut, lose_the_metadata, lose_the_seal, cut_the_seal])
def test_damage_seen_without_reading_is_named_and_passed_over(damage: Callable[[Path], None], tmp_path: Path) -> None:
    good, bad = make(tmp_path, 5), make(tmp_path, 10)
    damage(bad)
    usable, notes = usable_checkpoints(tmp_path)
    assert usable == [good]
    [note] = notes
    assert str(bad) in note


def test_a_flipped_bit_is_found_by_whoever_reads_that_file(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    flip_a_bit(path)
    assert usable_checkpoints(tmp_path)[0] == [path]
    assert damaged_files(path) == ["weights/__0_0.distcp"]
    shares = [damaged_files(path, share=share, shares=2) for share in range(2)]
    assert sorted(name for share in shares for name in share) == ["weights/__0_0.distcp"]


def test_a_checkpoint_that_was_never_finished_is_no_error(tmp_path: Path) -> None:
    make(tmp_path, 3, sealed=False)
    usable, notes = usable_checkpoints(tmp_path)
    assert usable == []
    assert "step=3" in notes[0]
    assert usable_checkpoints(tmp_path / "absent") == ([], [])


def test_when_all_are_damaged_the_run_ends_and_says_which(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    cut(path)
    with pytest.raises(UserError, match="step=3") as caught:
        refuse_all_damaged(tmp_path, usable_checkpoints(tmp_path)[1])
    assert str(tmp_path) in caught.value.remedy


def test_removal_that_is_killed_leaves_no_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path, 3)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(path)
    assert path.is_dir()
    assert not is_sealed(path)


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step=abc").mkdir()
    (tmp_path / "notes").mkdir()
    path = make(tmp_path, 1)
    assert checkpoints(tmp_path) == [path]
