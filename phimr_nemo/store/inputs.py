"""What a path was likely meant for when it is not what a step reads: remedies that can be typed. Needs no torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import RUN_FILE

MODEL_FILE: Final = "config.json"
RECORDS_FILE: Final = "manifest.json"
MODEL: Final = "hf"
SHOWN: Final = 3
LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that Git keeps in place of a large file."""
DATA_SUFFIXES: Final = frozenset((".json", ".jsonl", ".ndjson", ".parquet", ".gz", ".zst", ".csv", ".tsv", ".txt"))
DEEPEST: Final = 2
HUB_NAME: Final = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/\w[\w.-]*", re.ASCII)
MAX_HUB_NAME: Final = 96
MADE_BY: Final[dict[Kind, str]] = {
    "problems": "phimr prepare",
    "rollouts": "phimr generate",
    "verdicts": "phimr verify",
    "conversations": "phimr curate",
    "pairs": "phimr curate",
    "prompts": "phimr curate",
    "rows": "phimr pack",
}
TABLES: Final = {".csv": "", ".tsv": ', delimiter="\\t"'}
"""Text tables by suffix -> what tells Python's csv module of them."""


def model_remedy(path: Path) -> str:
    """What to do when a path is no model directory, or is not there."""
    if path.is_file():
        return did_you_mean([path.parent]) if (path.parent / MODEL_FILE).is_file() else "give the model's directory"
    if path.is_dir():
        found = [below for below in _below(path, MODEL_FILE) if not (below / RUN_FILE).is_file()]
        if found:
            return did_you_mean(found)
        kind = _kind(path)
        if kind is not None:
            return f"{path} holds {kind!r} records; a model is the directory {MODEL} of a training run"
        stage = _read(path / RUN_FILE).get("stage")
        if stage is not None:
            return f"the run of {stage} in {path} has made no model: finish it, or give another run's {MODEL}"
        return "give the directory that holds config.json, *.safetensors and the tokenizer's files"
    # A run that has not come to its end has no model yet.
    stage = _read(path.parent / RUN_FILE).get("stage")
    if stage is not None:
        return f"the run of {stage} in {path.parent} has not finished: run its command again, it continues"
    first, _, name = str(path).partition("/")
    is_data = path.suffix.lower() in DATA_SUFFIXES
    if HUB_NAME.fullmatch(str(path)) and not is_data and not Path(first).exists():
        where = f"models/{name}"
        return f"a model of the hub is downloaded first: huggingface-cli download {path} --local-dir {where}"
    return "run the stage that makes it first, or correct the path"


def is_hub_name(text: str) -> bool:
    """Whether it names a repository of the hub, owner/name, and no directory of this machine."""
    is_name = HUB_NAME.fullmatch(text) is not None and not any(twice in text for twice in ("--", ".."))
    is_allowed = len(text) <= MAX_HUB_NAME and not text.endswith((".", "-", ".git"))
    return is_name and is_allowed and not Path(text.partition("/")[0]).exists()


def is_pointer(file: Path) -> bool:
    """Whether a file is the small text that Git LFS keeps in place of a large one."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def download_remedy(file: Path) -> str:
    """What to do with a model's file whose content is not what its name says."""
    if is_pointer(file):
        return f"{file.name} is a pointer of Git LFS: run `git lfs pull` in {file.parent}, or download the model anew"
    return f"copy or download {file.name} again"


def records_remedy(directory: Path, kind: Kind) -> str:
    """What to do when a directory holds no finished records of a kind, or is not there."""
    made = f"run the step that makes it first, `{MADE_BY[kind]}`"
    if (directory / MODEL_FILE).is_file():
        return f"{directory} is a model; {made}"
    # The preceding step often writes several directories side by side.
    is_ours = _kind(directory) is not None or (directory.parent / RUN_FILE).is_file()
    for root in (directory, directory.parent) if is_ours else (directory,):
        found = [below for below in _below(root, RECORDS_FILE) if _kind(below) == kind]
        if found:
            return did_you_mean(found)
    stage = _read(directory / RUN_FILE).get("stage")
    if stage is not None and _kind(directory) is None:
        return f"finish the run of {stage} in {directory} (its command continues it), or give another"
    return made


def table_remedy(path: Path) -> str:
    """What to do with a file whose format is not read."""
    delimiter = TABLES.get(path.suffix.lower())
    if delimiter is None:
        return "convert it to JSON lines, a JSON object a row, or to parquet; a spreadsheet is saved as CSV first"
    source, target = str(path), str(path.with_suffix(".jsonl"))
    # utf-8-sig: spreadsheets put a mark before the first column's name.
    code = (
        "import csv, json, sys; [print(json.dumps(row)) for row in "
        f'csv.DictReader(open(sys.argv[1], newline="", encoding="utf-8-sig"){delimiter})]'
    )
    return f"convert it: {shlex.join(('python', '-c', code, source))} > {shlex.quote(target)}"


def did_you_mean(paths: list[Path]) -> str:
    """A question with the paths that would do."""
    shown = " or ".join(str(path) for path in paths[:SHOWN])
    return f"did you mean {shown}?" + (" (there are more)" if len(paths) > SHOWN else "")


def _below(root: Path, file: str) -> Iterator[Path]:
    """Directories with such a file, the nearest first; hidden ones and checkpoints are passed over."""
    level = [root]
    for _ in range(DEEPEST):
        level = [
            below
            for directory in level
            for below in _directories(directory)
            if not below.name.startswith(".") and below.name != "checkpoints"
        ]
        yield from (directory for directory in level if (directory / file).is_file())


def _directories(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if entry.is_dir())
    except OSError:
        return []


def _kind(directory: Path) -> str | None:
    kind = _read(directory / RECORDS_FILE).get("kind")
    return kind if isinstance(kind, str) and kind in MADE_BY else None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
