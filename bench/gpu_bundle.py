"""The GPU lane with what it needs, for a machine without a network: a folder of pieces of at most 60 MiB.

    python bench/gpu_bundle.py build --out DIR [--python-version 3.12] [--requirements FILE ...]
    python3 DIR/gpu_bundle.py unpack --into SITE

`build` takes the wheels of the requirements (for Linux on x86-64 and the Python of the other machine) and the tracked
files of this source tree, puts them into one archive, cuts it, and writes the sizes and SHA-256 of every piece and
file into DIR/manifest.json. This program goes along. `unpack`, in the other machine's Python with its standard
library alone, checks them, puts the pieces together, unpacks the wheels into SITE/packages and the tree into
SITE/phimr-nemo, and prints the command that starts the lane there. A piece that is absent or damaged is named, and
nothing is unpacked.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

MIB: Final = 2**20
MOST_BYTES: Final = 60 * MIB
READ_BYTES: Final = MIB
MANIFEST: Final = "manifest.json"
SOURCES: Final = "phimr-nemo.tar"
REQUIREMENTS: Final = Path("requirements") / "gpu-bundle.txt"
GLIBC_MINORS: Final = (39, 35, 34, 31, 28, 27, 24, 17)
"""Of manylinux tags; pip takes none but those that are named."""
OLD_TAGS: Final = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")
PURE: Final = "-none-any.whl"
EXECUTABLE: Final = 0o755
TREE_LEFT_OUT: Final = (".png", ".gif")
"""Pictures of the documents."""


class Damaged(Exception):
    """A bundle of which something is absent or not what the manifest says."""


def pack(files: Sequence[Path], out: Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Put files into one archive, cut into pieces of at most `most_bytes`, with a manifest.

    Args:
        files: of different names.
        out: a folder for the pieces, emptied of former ones.
        most_bytes: of a piece.

    Returns:
        The pieces, in order.
    """
    out.mkdir(parents=True, exist_ok=True)
    for former in out.glob("piece-*"):
        former.unlink()
    with tempfile.TemporaryFile(dir=out) as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for file in sorted(files):
                tar.add(file, arcname=file.name)
        archive.seek(0)
        pieces = list(_cut(archive, out, most_bytes))
    manifest = {
        "pieces": [_entry(piece) for piece in pieces],
        "files": [_entry(file) for file in sorted(files)],
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return pieces


def _cut(archive: BinaryIO, out: Path, most_bytes: int) -> Iterator[Path]:
    number = 0
    while block := archive.read(min(READ_BYTES, most_bytes)):
        piece = out / f"piece-{number:03}"
        with piece.open("wb") as file:
            while block:
                file.write(block)
                block = archive.read(min(READ_BYTES, most_bytes - file.tell()))
        yield piece
        number += 1


def _entry(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": _digest(file)}


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(READ_BYTES):
        found.update(block)
    return found.hexdigest()


def join(bundle: Path, into: Path) -> list[Path]:
    """Check the pieces, put them together and leave the files that went in, checked as well.

    Raises:
        Damaged: a piece or file is absent, or other than the manifest says.
    """
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    for entry in manifest["pieces"]:
        _check(bundle / entry["name"], entry)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=into) as archive:
        for entry in manifest["pieces"]:
            with (bundle / entry["name"]).open("rb") as piece:
                shutil.copyfileobj(piece, archive)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            for entry in manifest["files"]:
                member = tar.extractfile(entry["name"])
                if member is None:
                    raise Damaged(f"{entry['name']} is not in the pieces")
                with (into / entry["name"]).open("wb") as file:
                    shutil.copyfileobj(member, file)
    files = [into / entry["name"] for entry in manifest["files"]]
    for path, entry in zip(files, manifest["files"], strict=True):
        _check(path, entry)
    return files


def _check(path: Path, entry: dict[str, str | int]) -> None:
    if not path.is_file():
        raise Damaged(f"{path.name} is absent")
    found = _entry(path)
    if found != entry:
        raise Damaged(
            f"{path.name} has {found['bytes']} bytes, SHA-256 {found['sha256']}: "
            f"{entry['bytes']} bytes, {entry['sha256']} were packed"
        )


def unpack(bundle: Path, into: Path) -> tuple[Path, Path]:
    """A bundle's wheels in `into`/packages and its source tree in `into`/phimr-nemo.

    Raises:
        Damaged: as `join`.
    """
    packages, tree = into / "packages", into / "phimr-nemo"
    with tempfile.TemporaryDirectory() as scratch:
        files = join(bundle, Path(scratch))
        for folder in (packages, tree):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for file in files:
            if file.suffix == ".whl":
                _unpack_wheel(file, packages)
            else:
                _unpack_tree(file, tree)
    return packages, tree


def _unpack_tree(archive: Path, tree: Path) -> None:
    """Its files: it has no links. Not by `extractall`, whose filter came with Python 3.11.4."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            source = tar.extractfile(member) if member.isreg() else None
            if source is None or ".." in path.parts or path.is_absolute():
                continue
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            target.chmod(member.mode & EXECUTABLE)


def _unpack_wheel(wheel: Path, packages: Path) -> None:
    """Its modules. Programs and headers of a wheel's .data folder are left out: nothing here calls them."""
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            parts = Path(item.filename).parts
            if parts[0].endswith(".data"):
                if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
                    continue
                parts = parts[2:]
            if item.is_dir() or ".." in parts or Path(item.filename).is_absolute():
                continue
            target = packages.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(item) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def wheels_for(requirements: Sequence[Path], python_version: str, into: Path) -> list[Path]:
    """Wheels of pinned requirements, for Linux on x86-64; what has none is built here, if it is Python alone.

    Raises:
        RuntimeError: a requirement has no wheel for that machine and is not Python alone.
    """
    tags = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS] + [*OLD_TAGS, "linux_x86_64"]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    target += [word for tag in tags for word in ("--platform", tag)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    names = [
        line.split("#")[0].strip()
        for file in requirements
        for line in file.read_text("utf-8").splitlines()
        if line.split("#")[0].strip()
    ]
    # All at once where all have wheels; one by one to find those that have none.
    if _done([*pip, "download", "--no-deps", *target, "-d", str(into), *names]) is not None:
        for name in names:
            complaint = _done([*pip, "download", "--no-deps", *target, "-d", str(into), name])
            if complaint is None:
                continue
            before = set(into.iterdir())
            complaint = _done([*pip, "wheel", "--no-deps", "-w", str(into), name]) or ""
            built = set(into.iterdir()) - before
            if not built or not all(path.name.endswith(PURE) for path in built):
                raise RuntimeError(
                    f"{name} has no wheel for Python {python_version} on x86-64, and what is built here is not "
                    f"for it: give another --python-version, or an index that has one. {complaint[-500:]}".strip()
                )
    return sorted(into.glob("*.whl"))


def _done(command: list[str]) -> str | None:
    """None, or what a command that failed has said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr


def source_tree(repository: Path, into: Path) -> Path:
    """An archive of the tracked files as they lie there, links as what they lead to."""
    listed = subprocess.run(["git", "-C", str(repository), "ls-files", "-z"], capture_output=True, check=True)
    archive = into / SOURCES
    with tarfile.open(archive, "w", dereference=True) as tar:
        for name in listed.stdout.decode().split("\0"):
            if name and not name.endswith(TREE_LEFT_OUT) and (repository / name).exists():
                tar.add(repository / name, arcname=name, filter=_as_nobody)
        version = subprocess.run(
            ["git", "-C", str(repository), "describe", "--always", "--dirty"], capture_output=True, check=True
        )
        note = tarfile.TarInfo("COMMIT")
        note.size = len(version.stdout)
        tar.addfile(note, io.BytesIO(version.stdout))
    return archive


def _as_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def build(out: Path, requirements: Sequence[Path], python_version: str) -> list[Path]:
    """The bundle; see the module's docstring."""
    repository = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch)
        wheels = wheels_for([repository / file for file in requirements], python_version, into)
        pieces = pack([*wheels, source_tree(repository, into)], out)
    shutil.copy(__file__, out / Path(__file__).name)
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="make the folder")
    building.add_argument("--out", type=Path, required=True)
    building.add_argument("--python-version", default=".".join(map(str, sys.version_info[:2])), help="of the machine")
    building.add_argument("--requirements", type=Path, nargs="+", default=[REQUIREMENTS])
    unpacking = commands.add_parser("unpack", help="on the machine with the GPU")
    unpacking.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "build":
        try:
            pieces = build(options.out, options.requirements, options.python_version)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        size = sum(piece.stat().st_size for piece in pieces) / MIB
        print(f"{len(pieces)} pieces, {size:.0f} MiB, in {options.out}; there: ", end="")
        print(f"python3 {options.out.name}/{Path(__file__).name} unpack --into site")
        return
    try:
        packages, tree = unpack(Path(__file__).resolve().parent, options.into)
    except Damaged as error:
        raise SystemExit(f"the bundle is damaged: {error}") from None
    print(f"PYTHONPATH={packages.resolve()} python3 {tree / 'bench' / 'gpu_lane.py'} --out gpu")


if __name__ == "__main__":
    main()
