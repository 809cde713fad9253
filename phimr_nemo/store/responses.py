"""Samples of responses that a run keeps for people: one parquet file a step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_bytes

DIRECTORY: Final = "responses"
FILE: Final = "step-{step:08d}.parquet"
PREFIX: Final = "step-"


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


def read_responses(run: Path, step: int) -> list[dict[str, Any]]:
    """A step's sample.

    Raises:
        UserError: there is none, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = run / DIRECTORY / FILE.format(step=step)
    if not file.is_file():
        steps = kept_steps(run)
        raise UserError(
            f"{run} has no responses of step {step}",
            rule=f"samples are kept of the steps {', '.join(map(str, steps)) or '(none so far)'}",
            remedy=f"use --step {steps[-1]}" if steps else "set monitor.responses_every, and let the run come so far",
        )
    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
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
