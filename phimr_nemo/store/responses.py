"""Samples of responses that a run keeps for people: one parquet file a step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_bytes
from phimr_nemo.store.unpacking import parquet_batches

DIRECTORY: Final = "responses"
FILE: Final = "step-{step:08d}.parquet"
PREFIX: Final = "step-"
COLUMNS: Final[Mapping[str, type]] = {
    **dict.fromkeys(("step", "sample", "tokens"), int),
    **dict.fromkeys(("prompt_id", "question", "answer", "response", "verdict"), str),
    **dict.fromkeys(("truncated", "trained"), bool),
    "reward": float,
}
"""What a row says of a response, and the type of each."""


def write_responses(run: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a step's sample; one that is there already is replaced.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream, compression="zstd")
    (run / DIRECTORY).mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(run / DIRECTORY / FILE.format(step=step), stream.getvalue())


def kept_steps(run: Path) -> list[int]:
    """The steps of which a run has a sample, ascending."""
    files = (run / DIRECTORY).glob(f"{PREFIX}*.parquet")
    return sorted(int(file.stem.removeprefix(PREFIX)) for file in files if file.stem.removeprefix(PREFIX).isdigit())


def read_responses(run: Path, step: int | None) -> list[dict[str, Any]]:
    """A step's sample.

    Args:
        run: the run directory.
        step: whose; None = the newest that was kept.

    Raises:
        UserError: there is none, or it is damaged.
    """
    import pyarrow as pa

    steps = kept_steps(run)
    step = (steps[-1] if steps else None) if step is None else step
    file = run / DIRECTORY / FILE.format(step=0 if step is None else step)
    if step is None or not file.is_file():
        raise UserError(
            f"{run} has no responses" if step is None else f"{run} has no responses of step {step}",
            rule=f"samples are kept of the steps {', '.join(map(str, steps)) or '(none so far)'}",
            remedy=f"use --step {steps[-1]}"
            if steps
            else "give the run.output of a grpo or distill run after its first step of monitor.responses_every",
        )
    try:
        rows: list[dict[str, Any]] = [row for batch in parquet_batches(file) for row in batch.to_pylist()]
        wrong = [name for name, kind in COLUMNS.items() for row in rows if not isinstance(row.get(name), kind)]
        if wrong or not rows:
            raise ValueError(f"no {wrong[0]}" if wrong else "no rows")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{file} is not readable ({error})",
            rule="a sample of responses is a parquet file that a run has written",
            remedy="look at another step: nothing else depends on it",
        ) from error
    return rows


def drop_later(run: Path, done: int) -> None:
    """Remove the samples of later steps than `done`, of an interrupted run that does them again."""
    for step in kept_steps(run):
        if step > done:
            (run / DIRECTORY / FILE.format(step=step)).unlink()
