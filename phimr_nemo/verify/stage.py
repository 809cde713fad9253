"""The stage `verify`: rollouts -> verdicts, and `phimr verify IN OUT` for a file of the user's own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import VerifyConfig
from phimr_nemo.endpoint import OpensModel
from phimr_nemo.errors import UserError
from phimr_nemo.process.memory import return_free_memory
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.check import open_for
from phimr_nemo.store.inputs import TABLES, table_remedy
from phimr_nemo.store.progress import Progress
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.records import GoldKind, gold_kind
from phimr_nemo.store.shards import (
    check_shard,
    finish,
    is_complete,
    read_manifest,
    rows_to_table,
    shard_is_complete,
    write_shard,
)
from phimr_nemo.store.unpacking import parquet_batches
from phimr_nemo.verify.answer import DEADLINE_SECONDS, Grader
from phimr_nemo.verify.jsonl import is_json_lines, open_json_lines, read_batches, write_row
from phimr_nemo.verify.judge import Judge, Judging, judged_grader, write_report
from phimr_nemo.verify.plug import plugged_name
from phimr_nemo.verify.verdict import GRADER_VERSION, Verdict

if TYPE_CHECKING:
    import pyarrow as pa

JUDGE_DIRECTORY: Final = "judge"
FINISH_REASON: Final = "finish_reason"
LENGTH: Final = "length"
"""The finish reason of a response that was cut off."""
UNSETTLED: Final[Mapping[GoldKind | None, Verdict]] = {
    "disputed": Verdict("gold_unreadable", "", "sources disagree on the gold answer"),
    "none": Verdict("gold_unreadable", "", "nobody tells a gold answer"),
}
"""Rollouts of these kinds are not graded: what they are compared with is in doubt."""


def run_verify(config: VerifyConfig, open_model: OpensModel) -> dict[str, Any] | None:
    """Grade this process's share of a directory of rollouts.

    Args:
        config: of the stage.
        open_model: opens the judge, where there is one.

    Returns:
        Rows and counts, or None when other processes still have shards to write.

    Raises:
        UserError: the rollouts are absent, unfinished or damaged.
    """
    return verify_rollouts(
        config.rollouts,
        config.run.output,
        workers=config.workers,
        deadline_seconds=config.deadline_seconds,
        judging=None if config.judge is None else Judging(config.judge, open_model(config.judge.ask)),
        function=config.grader,
        shard_index=config.shard.index,
        shard_count=config.shard.count,
    )


def verify_rollouts(
    rollouts_dir: Path,
    out_dir: Path,
    *,
    workers: int,
    deadline_seconds: float = DEADLINE_SECONDS,
    judging: Judging | None = None,
    function: str | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> dict[str, Any] | None:
    """Turn a finished directory of rollouts into one of verdicts, shard by shard.

    A verdict shard that is there already is kept when it was made from the same rollouts by this version of
    the grader with the same settings, and made again when not. Memory is that of one shard.

    Args:
        rollouts_dir: record directory of kind "rollouts".
        out_dir: record directory of kind "verdicts".
        workers: grader processes.
        deadline_seconds: wall time for one answer.
        judging: the second opinion on answers that the grader does not accept; None for none.
        function: a grader of the user's own as MODULE:FUNCTION; None for mathematics.
        shard_index: this process does shards `shard_index`, `shard_index + shard_count`, ...
        shard_count: how many processes share the work.

    Returns:
        Rows and counts by verdict (and by the judge's opinion), or None when other processes still have shards
        to write.

    Raises:
        UserError: the rollouts are absent, unfinished or damaged, or the judge fails.
    """
    manifest = read_manifest(rollouts_dir, "rollouts")
    name_of_grader = GRADER_VERSION if function is None else plugged_name(function)
    if judging is not None:
        name_of_grader = judged_grader(name_of_grader, judging)
    deciding = {"grader": name_of_grader, "deadline_seconds": deadline_seconds}
    whole = MadeFrom({"rollouts": manifest.content}, deciding)
    if is_complete(out_dir, "verdicts") and (done := read_manifest(out_dir, "verdicts")).made_from == whole:
        return {"rows": done.rows, **done.counts}
    shards = sorted(manifest.shards.items(), key=lambda item: (len(item[0]), item[0]))
    made_from = [MadeFrom({"rollouts": sha256}, deciding) for _, sha256 in shards]
    open_for(out_dir, whole, len(shards))
    with (
        Grader(workers=workers, deadline_seconds=deadline_seconds, function=function) as grader,
        contextlib.nullcontext()
        if judging is None
        else Judge(judging, out_dir / JUDGE_DIRECTORY, shard_index) as judge,
        Progress(manifest.rows, title="verify", unit="answer") as progress,
    ):
        for index, (name, sha256) in enumerate(shards):
            if index % shard_count != shard_index:
                continue
            table = _read_shard(rollouts_dir / name, sha256)
            rows = table.num_rows
            if not shard_is_complete(out_dir, index, made_from[index]):
                table = _grade_shard(grader, table)
                if judge is not None:
                    table = _named(judge.review(table), name_of_grader)
                write_shard(out_dir, index, table, kind="verdicts", made_from=made_from[index])
            del table
            return_free_memory()
            progress.update(rows)
    if not all(shard_is_complete(out_dir, index, of_it) for index, of_it in enumerate(made_from)):
        return None
    counts = _count(out_dir)
    if judging is not None:
        counts |= write_report(out_dir, out_dir / JUDGE_DIRECTORY)
    written = finish(out_dir, kind="verdicts", **whole.to_json(), counts=counts)
    return {"rows": written.rows, **counts}


def _read_shard(path: Path, sha256: str) -> pa.Table:
    import pyarrow.parquet as pq

    check_shard(path, sha256)
    return pq.read_table(path)


def _grade_shard(grader: Grader, table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    verdicts = grader.grade_many(
        [(row["response"], row["answer"]) for row in rows], [row["finish_reason"] == LENGTH for row in rows]
    )
    for row, graded in zip(rows, verdicts, strict=True):
        verdict = UNSETTLED[kind] if (kind := gold_kind(row["metadata"])) in UNSETTLED else graded
        row.update(verdict=verdict.verdict, extracted=graded.extracted, reason=verdict.reason, grader=grader.name)
    return rows_to_table(rows, "verdicts")


def _named(verdicts: pa.Table, grader: str) -> pa.Table:
    import pyarrow as pa

    place = verdicts.schema.get_field_index("grader")
    return verdicts.set_column(place, verdicts.schema.field(place), pa.array([grader] * verdicts.num_rows))


def _count(out_dir: Path) -> dict[str, int]:
    """Rows by verdict over all shards, from the one column."""
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    for path in sorted(out_dir.glob("part-*.parquet")):
        counts.update(pq.read_table(path, columns=["verdict"]).column("verdict").to_pylist())
    return dict(counts)


# A file of the user's own ----------------------------------------------------------------------------


def verify_file(source: Path, target: Path, *, response: str, answer: str, workers: int) -> dict[str, int]:
    """Grade every row of a file and write the same rows, in the same order, with `verdict` and `extracted`.

    Args:
        source: JSON lines (``.jsonl``, ``.json``; also ``.gz``, ``.zst``) or parquet.
        target: a file of the same family; columns `verdict` and `extracted` of the input are replaced.
        response: the column with the responses.
        answer: the column with the gold answers. A column `finish_reason`, where there is one, says "length" of
            responses that were cut off.
        workers: grader processes.

    Returns:
        Counts by verdict, and "rows".

    Raises:
        UserError: a file is missing, empty, malformed (the line is named) or of an unknown kind, or a column
            is missing. Nothing is written then.
    """
    if not source.is_file():
        is_directory = source.is_dir()
        raise UserError(
            f"input {source} {'is a directory' if is_directory else 'does not exist'}",
            rule="IN is a file of JSON lines or parquet",
            remedy=f"to grade rollouts: phimr verify rollouts={source} run.output=..."
            if is_directory
            else "correct the path",
        )
    if source.suffix.lower() in TABLES:
        raise UserError(
            f"input {source} is a table of text",
            rule="IN is a file of JSON lines or parquet",
            remedy=table_remedy(source),
        )
    if target.exists() and source.samefile(target):
        raise UserError(f"IN and OUT are both {source}", rule="OUT is another file", remedy="name another OUT")
    if is_json_lines(source) != is_json_lines(target):
        raise UserError(
            f"IN is {source.name}, OUT is {target.name}",
            rule="OUT is of the same family as IN: JSON lines (.jsonl, also .gz and .zst) or parquet",
            remedy="choose a name for OUT with the suffix of IN",
        )
    counts: Counter[str] = Counter()
    with Grader(workers=workers) as grader, atomic_file(target) as temporary:
        if is_json_lines(source):
            _verify_json_lines(grader, source, temporary, target, response, answer, counts)
        else:
            _verify_parquet(grader, source, temporary, response, answer, counts)
        if not counts:
            raise UserError(
                f"input {source} holds no row",
                rule="IN has at least one row",
                remedy="look at the step that wrote it",
            )
    return {"rows": counts.total(), **counts}


def _verify_json_lines(
    grader: Grader, source: Path, temporary: Path, target: Path, response: str, answer: str, counts: Counter[str]
) -> None:
    with open_json_lines(temporary, "w", named=target) as output:
        for batch in read_batches(source):
            for number, row in batch:
                _check_columns(f"{source}, line {number}", list(row), response, answer)
            pairs = [(row[response], row[answer]) for _, row in batch]
            verdicts = _grade_values(grader, pairs, [row.get(FINISH_REASON) for _, row in batch], counts)
            for (_, row), verdict in zip(batch, verdicts, strict=True):
                write_row(output, {**row, "verdict": verdict.verdict, "extracted": verdict.extracted})


def _verify_parquet(
    grader: Grader, source: Path, temporary: Path, response: str, answer: str, counts: Counter[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(source).names
        _check_columns(str(source), columns, response, answer)
        with _ParquetOutput(temporary) as output:
            for batch in parquet_batches(source):
                output.write(_graded(grader, pa.Table.from_batches([batch]), response, answer, counts))
    except pa.ArrowException as error:
        raise UserError(
            f"input {source} is no parquet file ({error})",
            rule="a name without .jsonl or .json is read as parquet",
            remedy="rename the file to what it holds",
        ) from error


def _graded(grader: Grader, table: pa.Table, response: str, answer: str, counts: Counter[str]) -> pa.Table:
    """The rows with their verdicts and extracted answers."""
    import pyarrow as pa

    pairs = list(zip(table.column(response).to_pylist(), table.column(answer).to_pylist(), strict=True))
    known = FINISH_REASON in table.column_names
    reasons = table.column(FINISH_REASON).to_pylist() if known else [None] * len(pairs)
    verdicts = _grade_values(grader, pairs, reasons, counts)
    for name in ("verdict", "extracted"):
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array([getattr(v, name) for v in verdicts], pa.string()))
    return table


class _ParquetOutput:
    """A parquet file whose schema is that of the first table written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def __enter__(self) -> _ParquetOutput:
        return self

    def write(self, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _check_columns(where: str, names: list[str], response: str, answer: str) -> None:
    for option, column in (("--response", response), ("--answer", answer)):
        if column not in names:
            raise UserError(
                f"{where} has no column {column!r}; it has {names}",
                rule=f"{option} names a column of every row",
                remedy=f"give {option} one of the columns above",
            )


def _grade_values(
    grader: Grader, pairs: list[tuple[Any, Any]], reasons: list[Any], counts: Counter[str]
) -> list[Verdict]:
    verdicts = grader.grade_many(
        [(_as_text(response), _as_text(answer)) for response, answer in pairs],
        [reason == LENGTH for reason in reasons],
    )
    counts.update(verdict.verdict for verdict in verdicts)
    return verdicts


def _as_text(value: Any) -> str:
    """A cell as text: a number as it prints, a list as its values, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(_as_text(item) for item in value)
    return value if isinstance(value, str) else str(value)
