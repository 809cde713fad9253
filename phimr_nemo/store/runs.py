"""Run directories: what made a run, and its metrics as JSONL and TensorBoard."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from phimr_nemo import __version__
from phimr_nemo.errors import UserError
from phimr_nemo.redact import redact
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.claims import LOCK_FILE

RECORDED_PACKAGES: Final = (
    "torch",
    "nemo-toolkit",
    "megatron-core",
    "nemo-aligner",
    "nemo-run",
    "transformer-engine",
    "transformers",
    "vllm",
    "math-verify",
    "pyarrow",
)
METRICS_FILE: Final = "metrics.jsonl"
RUN_FILE: Final = "run.json"
CONFIG_FILE: Final = "config.yaml"
DONE_FILE: Final = "DONE"
RESULTS_FILE: Final = "results.json"
"""The score, in the directory of an evaluation that has finished."""
NEWEST_SHARE: Final = 0.1
TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
FINISHED: Final = "finished"
"""When a run ended, among its closing facts."""
HASHES_FILE: Final = ".hashes.json"
"""Hashes of a run's inputs, so that files that have not changed are not read again."""
BEGUN_FILE: Final = "made_from.json"
"""What a record directory was begun from, before the manifest says it."""
OWN_FILES: Final = {CONFIG_FILE, RUN_FILE, HASHES_FILE, BEGUN_FILE}
"""What lies in a run directory before its stage has done anything, with its locks."""


def _now() -> str:
    return time.strftime(TIME, time.gmtime())


def git_sha() -> str:
    """The commit of the source tree, with "+dirty" when it has uncommitted changes; "unknown" outside git."""
    root = Path(__file__).resolve().parent
    try:
        # An installed package may lie in a repository that is not its own.
        _git(root, "ls-files", "--error-unmatch", Path(__file__).name)
        sha = _git(root, "rev-parse", "HEAD")
        return sha + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def code_versions() -> dict[str, str]:
    """Versions of Python, of this package with its git sha, and of the packages that matter for a result."""
    versions = {"python": platform.python_version(), "phimr-nemo": __version__, "git": git_sha()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


class RunDirectory:
    """The directory of one run: config.yaml, run.json, metrics.jsonl, tensorboard/, checkpoints/, DONE.

    Args:
        path: the directory; made if absent. An interrupted run continues in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where native checkpoints go (they serve resume only)."""
        return self.path / "checkpoints"

    @property
    def is_done(self) -> bool:
        """Whether the run has finished."""
        return (self.path / DONE_FILE).is_file()

    def describe(self, *, stage: str, config_yaml: str, seed: int, facts: Mapping[str, Any]) -> None:
        """Write config.yaml and run.json (command line, versions, git sha, seed, machine, starts, extra facts)."""
        atomic_write_text(self.path / CONFIG_FILE, config_yaml)
        write_json(
            self.path / RUN_FILE,
            {
                "stage": stage,
                "seed": seed,
                "command": [redact(argument) for argument in sys.argv],
                "versions": code_versions(),
                "machine": {"processor": platform.machine(), "system": platform.platform()},
                "starts": [*self._starts(), _now()],
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
                **facts,
            },
        )

    def description(self) -> dict[str, Any] | None:
        """What :meth:`describe` wrote; None where it did not, or where that is damaged and nothing depends on it.

        Raises:
            UserError: it is damaged, and the run has made something.
        """
        path = self.path / RUN_FILE
        try:
            described = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            described = error
        if isinstance(described, dict):
            return described
        if self._has_only_own_files():
            return None
        raise UserError(
            f"{path} is damaged: {described!r:.200}",
            rule="it is a JSON object that says what the run was made from",
            remedy="restore it; or choose another run.output, or remove the directory to make it again",
        )

    def _starts(self) -> list[str]:
        """When this run was started before."""
        starts = (self.description() or {}).get("starts", [])
        return [str(start) for start in starts] if isinstance(starts, list) else []

    def _has_only_own_files(self) -> bool:
        """Whether no stage has made anything here yet."""
        there = [entry for entry in self.path.rglob("*") if not entry.is_dir()]
        files = [entry for entry in there if not entry.name.startswith(LOCK_FILE)]
        return {str(file.relative_to(self.path)) for file in files} <= OWN_FILES

    def withdraw(self) -> None:
        """Undo :meth:`describe` for a stage that refused its input; a directory that holds more stays as it is."""
        if self.path.is_dir() and self._has_only_own_files():
            shutil.rmtree(self.path)

    def finish(self, **facts: object) -> None:
        """Mark the run as finished and record its closing facts."""
        write_json(self.path / DONE_FILE, {FINISHED: _now(), **facts})

    def closing_facts(self) -> dict[str, Any]:
        """The facts given to :meth:`finish`.

        Raises:
            UserError: the file is damaged.
        """
        return {name: value for name, value in self._done().items() if name != FINISHED}

    def finished_at(self) -> str:
        """When the run ended (UTC); of one by a version that did not record it, when its last file was written.

        Raises:
            UserError: the file is damaged.
        """
        written = (self.path / DONE_FILE).stat().st_mtime
        return str(self._done().get(FINISHED) or time.strftime(TIME, time.gmtime(written)))

    def _done(self) -> dict[str, Any]:
        path = self.path / DONE_FILE
        try:
            facts = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            facts = error
        if isinstance(facts, dict):
            return facts
        raise UserError(
            f"{path} is damaged: {facts!r:.200}",
            rule="it is a JSON object that a stage writes when it has finished",
            remedy="remove it and run the same command again: what is there is kept",
        )


class MetricsWriter:
    """Appends metrics to metrics.jsonl and to TensorBoard. Use as a context manager on one process.

    Args:
        directory: the run directory.
        from_step: lines of an interrupted run at or after this step are dropped, so that a resumed run has
            each step once.
    """

    def __init__(self, directory: Path, *, from_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        kept = [row for row in read_metrics(directory) if row["step"] < from_step]
        atomic_write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=from_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of named scalars for `step`."""
        self._file.write(json.dumps({"step": step, "time": time.time(), **{k: float(v) for k, v in metrics.items()}}))
        self._file.write("\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, float(value), step)

    def write_histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Add a distribution to TensorBoard; metrics.jsonl holds scalars only."""
        import numpy as np

        self._board.add_histogram(name, np.asarray(values, dtype=np.float64), step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def newest_mean(lines: Iterable[Mapping[str, Any]], metric: str) -> float | None:
    """Mean of a metric over the newest tenth of the lines that hold it; None where none does.

    One line tells of the last batch; a tenth tells where the run has come to.
    """
    values = [float(line[metric]) for line in lines if metric in line]
    newest = values[-math.ceil(NEWEST_SHARE * len(values)) :]
    return math.fsum(newest) / len(newest) if newest else None


def read_metrics(directory: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut by a kill is skipped.

    Raises:
        UserError: a line holds something else.
    """
    path = directory / METRICS_FILE
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError:
            continue
        except (UnicodeDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            raise UserError(
                f"{path} is damaged: {line!r:.120}",
                rule="each of its lines is a JSON object with the number of a step",
                remedy="restore it, or take that line out: only its numbers are lost",
            )
        yield row
