"""The record kinds that travel between the data steps, as pyarrow schemas.

One currency: every step reads and writes directories of zstd parquet shards of one kind
(see :mod:`phimr_nemo.store.shards`). `SCHEMA_VERSION` changes whenever a column changes meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, get_args

from phimr_nemo.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION: Final = 1

Kind = Literal["problems", "rollouts", "verdicts", "conversations", "pairs", "prompts", "rows"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

Difficulty = Literal["elementary", "middle", "high_school", "college", "graduate"]
DIFFICULTIES: Final[tuple[Difficulty, ...]] = get_args(Difficulty)

VerdictName = Literal["correct", "wrong", "unparsable", "timeout", "error", "gold_unreadable"]
UNGRADED_VERDICTS: Final[tuple[VerdictName, ...]] = ("timeout", "error", "gold_unreadable")
"""Verdicts that say nothing about the response: the grader gave up or failed, or the gold answer is at fault."""

PAIR_SIDES: Final = ("chosen", "rejected")

_OF_A_RESPONSE: Final = ("teacher", "sample_index", "verdict", "finish_reason", "repetition")
OPTIONAL_COLUMNS: Final[Mapping[Kind, frozenset[str]]] = {
    "rollouts": frozenset({"source"}),
    "verdicts": frozenset({"source"}),
    "conversations": frozenset({"source", "history", *_OF_A_RESPONSE}),
    "pairs": frozenset(
        {"domain", "difficulty", "source", *(f"{side}_{name}" for side in PAIR_SIDES for name in _OF_A_RESPONSE)}
    ),
    "prompts": frozenset({"domain", "difficulty", "source"}),
    "rows": frozenset({"questions"}),
}
"""Columns that a table of a user's own, or of an earlier release, may lack: they are null then."""

FinishReason = Literal["stop", "length"]

GOLD: Final = "gold"
"""Key in the metadata of problems, rollouts and verdicts whose answer is not simply its source's own."""
GoldKind = Literal["vote", "disputed", "none"]
"""vote: solutions agreed on it. disputed: another source has another answer. none: nobody tells an answer."""


def gold_kind(metadata: str) -> GoldKind | None:
    """The mark in a row's metadata; None where the answer is its source's own."""
    if f'"{GOLD}"' not in metadata:
        return None
    try:
        values = json.loads(metadata)
    except ValueError:
        return None
    kind = values.get(GOLD) if isinstance(values, dict) else None
    return kind if kind in get_args(GoldKind) else None


@cache
def schemas() -> Mapping[Kind, pa.Schema]:
    """The schema of each record kind. Columns marked nullable may hold null, the others may not.

    A finish reason of null is that of a response that ended by itself. `history` are the turns before `question`;
    `questions` are those of a row's documents, by number.
    """
    import pyarrow as pa

    def text(name: str, *, nullable: bool = False) -> pa.Field:
        return pa.field(name, pa.string(), nullable=nullable)

    annotations = [text("domain", nullable=True), text("difficulty", nullable=True)]
    rollouts = [
        text("id"),
        text("problem_id"),
        text("question"),
        text("answer"),
        text("response"),
        text("teacher"),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        text("finish_reason"),
        pa.field("tokens", pa.int32(), nullable=False),
        *annotations,
        text("source", nullable=True),
        text("metadata"),
    ]
    # What a response of a training set was, beside its text.
    origin = [
        text("source", nullable=True),
        text("teacher", nullable=True),
        pa.field("sample_index", pa.int32()),
        text("verdict", nullable=True),
        text("finish_reason", nullable=True),
        pa.field("repetition", pa.float64()),
    ]
    turn = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
    history = pa.field("history", pa.list_(turn))
    return {
        "problems": pa.schema(
            [
                text("id"),
                text("source"),
                text("question"),
                text("answer"),
                text("solution", nullable=True),
                *annotations,
                text("metadata"),
            ]
        ),
        "rollouts": pa.schema(rollouts),
        "verdicts": pa.schema([*rollouts, text("verdict"), text("extracted"), text("reason"), text("grader")]),
        "conversations": pa.schema(
            [text("id"), text("problem_id"), text("question"), text("response"), *annotations, *origin, history]
        ),
        "pairs": pa.schema(
            [
                *(text(name) for name in ("id", "problem_id", "question", "chosen", "rejected", "mode")),
                *annotations,
                origin[0],
                *(item.with_name(f"{side}_{item.name}") for side in PAIR_SIDES for item in origin[1:]),
            ]
        ),
        "prompts": pa.schema(
            [
                text("id"),
                text("problem_id"),
                text("question"),
                text("answer"),
                *annotations,
                origin[0],
                pa.field("pass_rate", pa.float64(), nullable=False),
                pa.field("mean_length", pa.float64(), nullable=False),
                pa.field("length_spread", pa.float64(), nullable=False),
                pa.field("hard", pa.bool_(), nullable=False),
            ]
        ),
        "rows": pa.schema(
            [
                pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
                pa.field("loss_mask", pa.list_(pa.uint8()), nullable=False),
                pa.field("document_lengths", pa.list_(pa.int32()), nullable=False),
                pa.field("questions", pa.list_(pa.int64())),
            ]
        ),
    }


def conform(table: pa.Table, kind: Kind) -> pa.Table:
    """Select and cast the columns of `kind`.

    Raises:
        UserError: a column is missing, has the wrong type, or holds null where the kind does not allow it.
    """
    import pyarrow as pa

    schema = schemas()[kind]
    absent = [name for name in schema.names if name not in table.column_names]
    missing = [name for name in absent if name not in OPTIONAL_COLUMNS.get(kind, ())]
    if missing:
        raise UserError(
            f"columns {missing} are missing; the table has {table.column_names}",
            rule=f"a {kind!r} record has the columns {schema.names}",
            remedy="map your columns to these names (see `phimr generate --help`)",
        )
    columns = []
    for item in schema:
        column = pa.nulls(table.num_rows, item.type) if item.name in absent else table.column(item.name)
        nulls = column.null_count
        if nulls and not item.nullable:
            raise UserError(
                f"column {item.name!r} holds {nulls} nulls",
                rule=f"{item.name!r} of a {kind!r} record is never null",
                remedy="drop or repair these rows in the input",
            )
        try:
            columns.append(column.cast(item.type))
        except pa.ArrowException as error:
            raise UserError(
                f"column {item.name!r} has the type {column.type}: {error}",
                rule=f"{item.name!r} of a {kind!r} record is {item.type}",
                remedy="convert this column in the input",
            ) from error
    return pa.table(columns, schema=schema)


def with_optional(table: pa.Table, kind: Kind, names: Sequence[str]) -> pa.Table:
    """The table with those of the named optional columns that it lacks, holding null."""
    import pyarrow as pa

    for name in names:
        if name in OPTIONAL_COLUMNS.get(kind, ()) and name not in table.column_names:
            item = schemas()[kind].field(name)
            table = table.append_column(item, pa.nulls(table.num_rows, item.type))
    return table
