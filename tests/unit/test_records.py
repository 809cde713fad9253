"""The record kinds: what each holds, what may be null, and how kinds build on one another."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from phimr_nemo.errors import UserError
from phimr_nemo.store.records import DIFFICULTIES, KINDS, OPTIONAL_COLUMNS, Kind, schemas
from phimr_nemo.store.shards import conform, rows_to_table

SAMPLES: dict[pa.DataType, Any] = {
    pa.string(): "text",
    pa.int32(): 7,
    pa.int64(): 2**62,
    pa.float64(): 0.25,
    pa.bool_(): True,
    pa.list_(pa.int32()): [1, 2, 200_063],
    pa.list_(pa.uint8()): [0, 1, 1],
    pa.list_(pa.int64()): [2**62, 5],
    schemas()["conversations"].field("history").type: [{"role": "user", "content": "What is 1+1?"}],
}
NULLABLE = {"solution", "domain", "difficulty"}


def row(kind: Kind) -> dict[str, Any]:
    return {item.name: SAMPLES[item.type] for item in schemas()[kind]}


def test_every_kind_has_a_schema() -> None:
    assert tuple(schemas()) == KINDS


def test_difficulties_rise() -> None:
    assert DIFFICULTIES == ("elementary", "middle", "high_school", "college", "graduate")


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_makes_the_round_trip(kind: Kind) -> None:
    rows = [row(kind), row(kind)]
    assert conform(rows_to_table(rows, kind), kind).to_pylist() == rows


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in schemas()[kind].names])
def test_only_annotations_and_solutions_may_be_null(kind: Kind, name: str) -> None:
    table = rows_to_table([{**row(kind), name: None}], kind)
    if name in NULLABLE or name in OPTIONAL_COLUMNS.get(kind, ()):
        assert conform(table, kind).column(name).to_pylist() == [None]
    else:
        with pytest.raises(UserError, match=f"'{name}' holds 1 nulls"):
            conform(table, kind)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in schemas()[kind].names])
def test_every_column_is_needed_but_those_that_another_origin_lacks(kind: Kind, name: str) -> None:
    table = rows_to_table([row(kind)], kind).drop_columns([name])
    if name in OPTIONAL_COLUMNS.get(kind, ()):
        assert conform(table, kind).to_pylist() == [{**row(kind), name: None}]
        return
    with pytest.raises(UserError, match=f"'{name}'"):
        conform(table, kind)


def test_verdicts_keep_all_of_their_rollouts() -> None:
    rollouts, verdicts = schemas()["rollouts"], schemas()["verdicts"]
    assert [verdicts.field(item.name) for item in rollouts] == list(rollouts)
    assert set(verdicts.names) - set(rollouts.names) == {"verdict", "extracted", "reason", "grader"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("problems", "rows")])
def test_every_derived_record_leads_back_to_its_problem(kind: Kind) -> None:
    assert {"id", "problem_id", "question"} <= set(schemas()[kind].names)


def test_numbers_that_do_not_fit_are_refused() -> None:
    good = rows_to_table([row("rollouts")], "rollouts")
    place = good.column_names.index("tokens")
    too_large = good.set_column(place, "tokens", pa.array([2**31]))
    with pytest.raises(UserError, match="'tokens'"):
        conform(too_large, "rollouts")
    wide = good.set_column(place, "tokens", pa.array([2**31 - 1]))
    assert conform(wide, "rollouts").column("tokens").to_pylist() == [2**31 - 1]
