"""Where a pipeline stands, read from its files: steps done and to come, scores, time, the newest responses."""

from __future__ import annotations

import calendar
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import QuickstartConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import read_result
from phimr_nemo.jobs.quickstart import seed_steps
from phimr_nemo.jobs.status import RunStatus, find_runs, read_status
from phimr_nemo.show.items import Response, response_of
from phimr_nemo.show.records import Records
from phimr_nemo.store.responses import DIRECTORY, kept_steps, read_responses
from phimr_nemo.store.runs import RESULTS_FILE, RUN_FILE, TIME, RunDirectory
from phimr_nemo.store.shards import SHARD_NAME

SEED: Final = re.compile(r"seed-\d+")
PRESET: Final = Path("conf/quickstart/tiny.yaml")
"""Of the quickstart: every preset has the same steps."""
SETTLED_SECONDS: Final = 60.0
"""A pipeline in which nothing runs, and nothing was written for this long, has ended or stands still."""
SHOWN: Final = 3
NOT_BEGUN: Final = "to come"


@dataclass(frozen=True)
class Step:
    """A step of a pipeline.

    Attributes:
        name: its path below the pipeline's directory.
        state: as `RunStatus.state`, or "to come".
        status: of its run; None before it has begun.
        seconds: since its last start, or from there to its end; None where that is not known.
        expected: seconds that the same step of other seeds has taken; None without one.
        score: pass@1 in per cent with its standard error, or the newest reward or loss; empty for none.
    """

    name: str
    state: str
    status: RunStatus | None
    seconds: float | None
    expected: float | None
    score: str

    @property
    def left(self) -> float | None:
        """Seconds to its end; None where nothing tells."""
        if self.state == "done":
            return 0.0
        if self.status is not None and self.status.eta_seconds is not None:
            return self.status.eta_seconds
        if self.expected is None:
            return None
        return max(0.0, self.expected - (self.seconds or 0.0)) if self.state == "running" else self.expected


@dataclass(frozen=True)
class Said:
    """A response as it is shown while a pipeline runs.

    Attributes:
        run: whose.
        question, answer: what was asked, and the gold answer.
        response: the response.
    """

    run: str
    question: str
    answer: str
    response: Response


@dataclass(frozen=True)
class Pipeline:
    """Where a pipeline stands.

    Attributes:
        steps: in their order.
        said: the newest responses.
        taken: seconds from its first start to its last sign of life.
        is_over: nothing runs, and nothing will by itself.
    """

    steps: Sequence[Step]
    said: Sequence[Said]
    taken: float
    is_over: bool

    @property
    def done(self) -> int:
        """How many steps are done."""
        return sum(step.state == "done" for step in self.steps)

    @property
    def left(self) -> float:
        """Seconds to the end of all steps whose time is known."""
        return math.fsum(step.left or 0.0 for step in self.steps)

    @property
    def unknown(self) -> int:
        """Steps whose time nothing tells."""
        return sum(step.left is None for step in self.steps)


def read_pipeline(root: Path, *, now: float, queue: Mapping[str, str]) -> Pipeline:
    """Where the runs below a directory stand.

    Of a quickstart's seeds the steps to come are known, and from finished seeds how long they take.

    Args:
        root: a directory with runs in it.
        now: seconds since the epoch.
        queue: state of each job that Slurm knows.

    Raises:
        UserError: there is no such directory.
    """
    found = {path: read_status(path, now=now, queue=dict(queue)) for path in find_runs(root)}
    began = {path: _began(path) for path in found}
    took = {path: _took(path, began[path], status, now) for path, status in found.items()}
    steps = []
    for path in _in_order(list(found), began):
        status = found.get(path)
        others = [
            took[other]
            for other, theirs in found.items()
            if other.name == path.name and other != path and theirs.state == "done"
        ]
        known = [seconds for seconds in others if seconds is not None]
        steps.append(
            Step(
                name=str(path.relative_to(root)) if path != root else path.name,
                state=NOT_BEGUN if status is None else status.state,
                status=status,
                seconds=took.get(path),
                expected=statistics.median(known) if known and SEED.fullmatch(path.parent.name) else None,
                score="" if status is None else _score(path, status),
            )
        )
    starts = [start for start in began.values() if start is not None]
    newest = max((status.updated for status in found.values()), default=0.0)
    runs = any(step.state == "running" for step in steps)
    return Pipeline(
        steps=steps,
        said=newest_responses(root, list(found)),
        taken=max(0.0, (now if runs else newest) - min(starts)) if starts else 0.0,
        is_over=not runs and now - newest >= SETTLED_SECONDS,
    )


def _in_order(runs: Sequence[Path], began: Mapping[Path, float | None]) -> Iterator[Path]:
    """Runs, and steps to come of a quickstart's seeds, in the order in which they are made."""
    seeds = sorted(
        {path.parent for path in runs if SEED.fullmatch(path.parent.name)},
        key=lambda path: (len(path.name), path.name),
    )
    config = load_config(QuickstartConfig, PRESET)
    planned = [step.output for seed in seeds for step in seed_steps(config, 0, seed)]
    first = min((start for start in began.values() if start is not None), default=0.0)
    others = sorted(set(runs) - set(planned), key=lambda path: (began[path] or first, str(path)))
    return iter([*planned, *others])


def _began(path: Path) -> float | None:
    """When a run was started last, in seconds since the epoch."""
    try:
        starts: Any = json.loads((path / RUN_FILE).read_text("utf-8"))["starts"]
        return float(calendar.timegm(time.strptime(starts[-1], TIME)))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _took(path: Path, began: float | None, status: RunStatus, now: float) -> float | None:
    if began is None:
        return None
    ended = now if status.state == "running" else status.updated
    if status.state == "done":
        try:
            ended = float(calendar.timegm(time.strptime(RunDirectory(path).finished_at(), TIME)))
        except (UserError, ValueError):
            return None
    return max(0.0, ended - began)


def _score(path: Path, status: RunStatus) -> str:
    try:
        if (path / RESULTS_FILE).is_file():
            result = read_result(path / RESULTS_FILE)
            error = "" if math.isnan(result.stderr) else f" ± {100 * result.stderr:.1f}"
            return f"pass@1 {100 * result.pass1:.1f}{error} %"
    except UserError:
        return "unreadable"
    for name in ("reward", "loss"):
        value = getattr(status, name)
        if value is not None:
            return f"{name} {value:.4g}"
    return ""


def newest_responses(root: Path, runs: Sequence[Path]) -> list[Said]:
    """The last responses of what was written last: a GRPO sample, or a shard of rollouts or verdicts.

    Args:
        root: of the pipeline.
        runs: its run directories.
    """
    for _, path, run in sorted(_written(runs), reverse=True):
        name = str(run.relative_to(root)) if run != root else root.name
        try:
            if path.parent.name == DIRECTORY:
                return [_said(name, row, row["reward"]) for row in read_responses(run, kept_steps(run)[-1])[-SHOWN:]]
            records = Records(path.parent)
            if records.kind in ("rollouts", "verdicts") and len(records):
                return [_said(name, row, None) for row in records.rows(range(len(records))[-SHOWN:])]
        except (UserError, OSError, IndexError):
            # It is being replaced, or damaged; what there was before says something too.
            continue
    return []


def _written(runs: Sequence[Path]) -> Iterator[tuple[float, Path, Path]]:
    """When each directory's newest shard, and each run's newest sample, was written; the file, and the run."""
    for run in runs:
        for directory in (run, run / "rollouts", run / "verdicts", run / DIRECTORY):
            files = [
                file
                for file in directory.glob("*.parquet")
                if SHARD_NAME.fullmatch(file.name) or directory.name == DIRECTORY
            ]
            times = []
            for file in files:
                try:
                    times.append((file.stat().st_mtime, file, run))
                except OSError:
                    continue
            if times:
                yield max(times)


def _said(run: str, row: Mapping[str, Any], reward: float | None) -> Said:
    response = response_of(row["response"], verdict=row.get("verdict") or "", tokens=row["tokens"], reward=reward)
    return Said(run, row["question"], row["answer"], response)
