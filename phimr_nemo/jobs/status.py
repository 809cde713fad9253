"""`phimr status`: where every run below a directory stands, from its files alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from phimr_nemo.config import STAGES, DPOConfig, RoundsConfig, SupervisedConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.preflight import planned_steps
from phimr_nemo.store.claims import was_left
from phimr_nemo.store.runs import CONFIG_FILE, RUN_FILE, RunDirectory, read_metrics
from phimr_nemo.store.shards import SHARD_NAME
from phimr_nemo.text.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["done", "running", "stopped", "unreadable"]
QUIET_SECONDS: Final = 600.0
"""A run that is not finished and has written nothing for this long counts as stopped, if no queue knows better."""
PACE_STEPS: Final = 20
"""Newest lines of metrics that the pace is taken from."""
QUEUE_SECONDS: Final = 10.0
LONGEST_WORD: Final = 32
"""Of a stage or a job in run.json; a longer one would push the other columns out of the table."""
MOST_STEPS: Final = 10**12
FIXED_POINT_BELOW: Final = 1e9
SECONDS_A_MINUTE: Final = 60
MINUTES_AN_HOUR: Final = 60
NO_RUNS: Final = "no runs here: a run is a directory with a run.json in it"
WORDS: Final = ("run", "stage", "state", "queue")
GAUGES: Final = ("step", "steps", "eta_seconds", "tokens_per_second_per_gpu", "loss", "reward", "starts", "shards")


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands; None where it says nothing of that.

    Attributes:
        path: the run directory.
        stage: its stage.
        state: done; running: it wrote something lately and was not ended in order, or its job runs; stopped: neither;
            unreadable: its run.json is damaged.
        starts: how often it was started; more than 1 after a requeue or a restart.
        updated: when it last wrote something (seconds since the epoch).
        step, steps: optimizer steps (GRPO: rounds) done and planned.
        shards: finished shards of a record directory.
        eta_seconds: to the end, at the pace of the newest steps.
        tokens_per_second_per_gpu, loss, reward: the newest.
        job: its Slurm job, if any.
        queue: that job's state in the queue (PENDING, RUNNING ...), if a queue knows it.
    """

    path: str
    stage: str
    state: State
    starts: int
    updated: float
    step: int | None = None
    steps: int | None = None
    shards: int | None = None
    eta_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    loss: float | None = None
    reward: float | None = None
    job: str | None = None
    queue: str | None = None


def find_runs(root: Path) -> Iterator[Path]:
    """Run directories below `root`, itself included, in the order of their names; runs inside runs as well.

    Raises:
        UserError: `root` is no directory.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} is no directory",
            rule="phimr status reads run directories below a directory",
            remedy="give the directory that holds the runs, for example runs",
        )
    for directory, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RUN_FILE in files or RUN_FILE in below:
            yield Path(directory)


def read_status(path: Path, *, now: float, queue: dict[str, str]) -> RunStatus:
    """Where one run stands.

    Args:
        path: its directory.
        now: seconds since the epoch.
        queue: state of each job that Slurm knows.

    Returns:
        Its state; "unreadable" where a file of it is not what a run writes: one bad row hides no other.
    """
    try:
        return _read(path, now=now, queue=queue)
    except Exception:  # noqa: BLE001 - files of runs are input, and any of them can hold anything
        return RunStatus(path=str(path), stage="", state="unreadable", starts=0, updated=_updated(path))


def _updated(path: Path) -> float:
    """When a file of a directory was written last; what cannot be looked at is passed over."""
    times = [0.0]
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            with contextlib.suppress(OSError):
                if file.is_file():
                    times.append(file.stat().st_mtime)
    return max(times)


def _read(path: Path, *, now: float, queue: Mapping[str, str]) -> RunStatus:
    """Where one run stands.

    Raises:
        Exception: a file of it is not what a run writes.
    """
    updated = _updated(path)
    if not (path / RUN_FILE).is_file():
        # A pipe would be waited for.
        raise FileNotFoundError(path / RUN_FILE)
    facts: dict[str, Any] = json.loads((path / RUN_FILE).read_text("utf-8"))
    stage, starts = str(facts["stage"]), len(list(facts["starts"]))
    if len(stage) > LONGEST_WORD or len(str(facts.get("slurm_job"))) > LONGEST_WORD:
        raise ValueError(stage)
    metrics = [_numbers(row) for row in read_metrics(path)]
    steps = _planned(stage, path)
    job = None if facts.get("slurm_job") is None else str(facts["slurm_job"])
    queued = queue.get(job) if job is not None else None
    is_done = RunDirectory(path).is_done
    state: State = "done" if is_done else "stopped"
    is_at_work = now - updated < QUIET_SECONDS and not was_left(path)
    if not is_done and (queued == "RUNNING" or (queued is None and is_at_work)):
        state = "running"
    step = int(metrics[-1]["step"]) if metrics else None
    shards = sum(SHARD_NAME.fullmatch(file.name) is not None for file in path.iterdir())
    return RunStatus(
        path=str(path),
        stage=stage,
        state=state,
        step=step,
        steps=steps,
        shards=shards or None,
        eta_seconds=_eta(metrics, steps) if state == "running" else None,
        tokens_per_second_per_gpu=_newest(metrics, "tokens_per_second_per_gpu"),
        loss=_newest(metrics, "loss"),
        reward=_newest(metrics, "reward"),
        starts=starts,
        job=job,
        queue=queued,
        updated=updated,
    )


def _numbers(row: Any) -> dict[str, float]:
    """A line of metrics: numbers by name, step and time among them.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    if not 0 <= row["step"] <= MOST_STEPS or not math.isfinite(row["time"]):
        raise ValueError(row)
    return {str(name): float(value) for name, value in row.items()}


def _planned(stage: str, path: Path) -> int | None:
    if stage not in STAGES or not (path / CONFIG_FILE).is_file():
        return None
    try:
        config: Any = load_config(STAGES[stage], path / CONFIG_FILE)
        is_training = isinstance(config, SupervisedConfig | DPOConfig | RoundsConfig)
        return planned_steps(stage, config) if is_training else None
    except UserError:
        return None  # a run of another version, or whose data has gone: its steps are not known


def _newest(metrics: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((float(row[name]) for row in reversed(metrics) if name in row), None)


def _eta(metrics: Sequence[dict[str, Any]], steps: int | None) -> float | None:
    """Seconds to the last step at the pace of the newest lines; a restart between them is not work."""
    lines = metrics[-PACE_STEPS:]
    if steps is None or len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return None
    pace = (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"])
    return max(0.0, pace * (steps - lines[-1]["step"]))


def slurm_queue() -> dict[str, str]:
    """Job id -> state of this user's jobs; empty where there is no Slurm or it does not answer."""
    if shutil.which("squeue") is None:
        return {}
    command = ("squeue", "--me", "--noheader", "--format=%A %T")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUEUE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def status(root: Path) -> list[RunStatus]:
    """Where every run below `root` stands.

    Raises:
        UserError: no such directory.
    """
    queue, now = slurm_queue(), time.time()
    return [read_status(path, now=now, queue=queue) for path in find_runs(root)]


def status_json(found: Sequence[RunStatus]) -> str:
    """A JSON list with an object a run."""
    return json.dumps([asdict(item) for item in found], indent=2)


def status_table(found: Sequence[RunStatus], root: Path) -> Table:
    """The table that a person reads."""
    from rich.table import Table
    from rich.text import Text

    columns: dict[str, list[str]] = {
        "run": [_name(item, root) for item in found],
        "stage": [item.stage for item in found],
        "state": [item.state for item in found],
        "step": [progress_of(item) for item in found],
        "eta": [_duration(item.eta_seconds) for item in found],
        "tok/s/gpu": [_number(item.tokens_per_second_per_gpu, "{:,.0f}") for item in found],
        "loss": [_number(item.loss, "{:.4f}") for item in found],
        "reward": [_number(item.reward, "{:.3f}") for item in found],
        "starts": [str(item.starts) for item in found],
        "queue": [" ".join(part for part in (item.job, item.queue) if part) for item in found],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in columns:
        table.add_column(
            title, justify="left" if title in WORDS else "right", no_wrap=title != "run", overflow="fold"
        )
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _name(item: RunStatus, root: Path) -> str:
    relative = Path(item.path).relative_to(root)
    return str(relative) if relative.parts else item.path


def progress_of(item: RunStatus) -> str:
    """Steps done of those planned, or finished shards; empty where there is neither."""
    if item.step is None:
        return f"{item.shards} shard{'s' if item.shards > 1 else ''}" if item.shards else ""
    return f"{item.step:,}" + (f" / {item.steps:,}" if item.steps is not None else "")


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return form.format(value) if not math.isfinite(value) or abs(value) < FIXED_POINT_BELOW else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, left = divmod(round(seconds), SECONDS_A_MINUTE)
    hours, minutes = divmod(minutes, MINUTES_AN_HOUR)
    return f"{hours}:{minutes:02}:{left:02}"


def write_prometheus(path: Path, found: Sequence[RunStatus]) -> None:
    """Write the numbers as a text file for node_exporter's textfile collector; the file appears whole."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    labels = ("run", "stage")
    states = Gauge("phimr_run_state", "1 for the state that the run is in", (*labels, "state"), registry=registry)
    gauges = {name: Gauge(f"phimr_run_{name}", f"{name} of the run", labels, registry=registry) for name in GAUGES}
    for item in found:
        states.labels(item.path, item.stage, item.state).set(1)
        for name, gauge in gauges.items():
            value = getattr(item, name)
            if value is not None:
                gauge.labels(item.path, item.stage).set(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(path), registry)
