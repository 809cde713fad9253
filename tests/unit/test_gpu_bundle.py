"""The GPU lane's bundle: cut, carried, checked and unpacked to what went in; a damaged piece is named."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_bundle
import pytest
from gpu_bundle import Damaged, join, pack, source_tree, unpack

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_BYTES = 4096


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Smaller than a piece, larger than several, and empty."""
    draw = random.Random(0)
    folder = tmp_path / "files"
    folder.mkdir()
    made = []
    for name, size in (("a.whl", 10), ("b.whl", 5 * MOST_BYTES + 7), ("c.bin", 0), ("d.bin", MOST_BYTES)):
        (folder / name).write_bytes(draw.randbytes(size))
        made.append(folder / name)
    return made


def test_files_come_back_from_small_pieces(files: list[Path], tmp_path: Path) -> None:
    pieces = pack(files, tmp_path / "bundle", MOST_BYTES)
    assert len(pieces) > sum(file.stat().st_size for file in files) // MOST_BYTES
    assert all(0 < piece.stat().st_size <= MOST_BYTES for piece in pieces)
    assert all(piece.stat().st_size == MOST_BYTES for piece in pieces[:-1])
    back = join(tmp_path / "bundle", tmp_path / "back")
    assert {path.name: path.read_bytes() for path in back} == {path.name: path.read_bytes() for path in files}


def test_packing_again_leaves_no_former_piece(files: list[Path], tmp_path: Path) -> None:
    pack(files, tmp_path / "bundle", MOST_BYTES)
    pieces = pack(files[:1], tmp_path / "bundle", MOST_BYTES)
    assert sorted((tmp_path / "bundle").glob("piece-*")) == pieces


@pytest.mark.parametrize("damage", ["absent", "shorter", "a bit changed", "two exchanged"])
def test_a_damaged_piece_is_named_and_nothing_unpacked(files: list[Path], tmp_path: Path, damage: str) -> None:
    pieces = pack(files, tmp_path / "bundle", MOST_BYTES)
    piece, content = pieces[1], bytearray(pieces[1].read_bytes())
    if damage == "absent":
        piece.unlink()
    elif damage == "shorter":
        piece.write_bytes(content[:-1])
    elif damage == "a bit changed":
        content[100] ^= 1
        piece.write_bytes(content)
    else:
        piece.write_bytes(pieces[2].read_bytes())
        pieces[2].write_bytes(content)
    with pytest.raises(Damaged, match=piece.name):
        unpack(tmp_path / "bundle", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_bundle_unpacks_itself_and_its_modules_are_imported(tmp_path: Path) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    wheel = tmp_path / "carried-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carried/__init__.py", "VALUE = 42\n")
        archive.writestr("carried-1.0.data/purelib/beside.py", "VALUE = 43\n")
        archive.writestr("carried-1.0.data/scripts/program", "exit 1\n")
        archive.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
    bundle = tmp_path / "bundle"
    pack([wheel, source_tree(REPOSITORY, tmp_path)], bundle)
    program = bundle / "gpu_bundle.py"
    program.write_bytes(Path(gpu_bundle.__file__).read_bytes())
    # No packages and no environment of this one: the standard library alone.
    unpacking = [sys.executable, "-I", "-S", str(program), "unpack", "--into", str(tmp_path / "site")]
    done = subprocess.run(unpacking, capture_output=True, text=True, check=True)
    packages, tree = tmp_path / "site" / "packages", tmp_path / "site" / "phimr-nemo"
    assert done.stdout == f"PYTHONPATH={packages} python3 {tree / 'bench' / 'gpu_lane.py'} --out gpu\n"
    assert sorted(path.name for path in packages.iterdir()) == ["beside.py", "carried", "carried-1.0.dist-info"]
    asked = (
        "import carried, beside, importlib.metadata as m; print(carried.VALUE, beside.VALUE, m.version('carried'))"
    )
    command = [sys.executable, "-c", asked]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(packages)}, cwd=tmp_path
    )
    assert found.stdout.split() == ["42", "43", "1.0"]
    for file in ("bench/gpu_parts.py", "phimr_nemo/conf/model/phi4mini.yaml", "tests/gpu/compare.py"):
        assert (tree / file).read_bytes() == (REPOSITORY / file).read_bytes()


def test_a_piece_is_no_larger_than_sixty_mebibytes() -> None:
    assert gpu_bundle.MOST_BYTES == 60 * 2**20


def test_what_is_carried_is_what_the_tests_run_with() -> None:
    def pins(file: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        text = (REPOSITORY / "requirements" / file).read_text("utf-8")
        for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", text, flags=re.MULTILINE):
            found.setdefault(name.lower().replace("_", "-"), set()).add(version)
        return found

    tested = pins("constraints-cpu.txt")
    for name, versions in pins("gpu-bundle.txt").items():
        assert versions <= tested.get(name, set()), name


def test_the_manifest_tells_every_piece_and_file(files: list[Path], tmp_path: Path) -> None:
    pieces = pack(files, tmp_path / "bundle", MOST_BYTES)
    manifest = json.loads((tmp_path / "bundle" / gpu_bundle.MANIFEST).read_text("utf-8"))
    assert [entry["name"] for entry in manifest["pieces"]] == [piece.name for piece in pieces]
    assert [entry["name"] for entry in manifest["files"]] == [file.name for file in files]
    assert sum(entry["bytes"] for entry in manifest["pieces"]) == sum(piece.stat().st_size for piece in pieces)
